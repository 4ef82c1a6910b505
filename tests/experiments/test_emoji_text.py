"""The weights in experiments/emoji_text, which everybody can sample from."""

from rdm_jax.checkpoints import shared
from rdm_jax.workdir import Workdir
from tests.support.paths import ROOT

RELAY = ROOT / "experiments/emoji_text/relay"


def test_released_relay_is_read_by_this_version(tmp_path):
    config, workdir = shared.read_config(RELAY), Workdir(tmp_path / "run")
    assert [stage.resolution for stage in config.stages] == [(16, 16), (64, 64)]
    shared.unpack(RELAY, config, workdir.checkpoints, workdir.captions)
    assert workdir.stages_with_checkpoints(config) == [1, 2]
    assert workdir.captions.is_file()
