"""The weights in experiments/emoji_text, which everybody can sample from."""

import rdm_jax
from rdm_jax.checkpoints import shared
from tests.support.paths import ROOT

RELAY = ROOT / "experiments/emoji_text/relay"


def test_released_relay_is_read_by_this_version(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert shared.is_shared(RELAY)
    pipe = rdm_jax.load(RELAY)
    assert [stage.resolution for stage in pipe.config.stages] == [(16, 16), (64, 64)]
    assert pipe.config.data.text_encoder == "minilm"
