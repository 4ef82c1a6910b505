"""The captions that a workdir keeps."""

import pytest

from rdm_jax.runtime.errors import InputError
from rdm_jax.sampling import captions
from rdm_jax.sampling.captions import Captions, read_captions


def test_captions_are_kept_once_and_mixed(tmp_path):
    many = [f"image {i}" for i in range(50)]
    kept = Captions.of([*many, *many, "", "ü 漢"], ["Image  3", "new", "new", ""])
    assert sorted(kept.training) == sorted([*many, "ü 漢"]) and kept.held_out == ("new",)
    assert kept.training[:50] != (*many,) and kept == Captions.of(["ü 漢", *many[::-1]], ["new"])
    kept.write(tmp_path / "captions.json")
    assert read_captions(tmp_path / "captions.json") == kept
    assert "漢" in (tmp_path / "captions.json").read_text("utf-8")


def test_held_out_is_said_of_what_is_known(monkeypatch):
    """Of more captions than are kept, others may have been trained on."""
    asked = ["A cat", "a dog", "a bird"]
    assert Captions.of(["a cat"], ["a dog"]).are_held_out(asked) == [False, True, True]
    monkeypatch.setattr(captions, "MOST", 1)
    some = Captions.of(["a cat", "a bird"], ["a dog"])
    assert not some.complete and len(some.training) == 1
    assert some.are_held_out(asked) == [False, True, False]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"version": 2, "training": [], "held_out": [], "complete": true}',
        '{"version": 1, "training": [1], "held_out": [], "complete": true}',
        '{"version": 1, "training": [], "complete": true}',
        '{"version": 1, "training": [], "held_out": [], "complete": 1}',
    ],
)
def test_damaged_captions_are_refused(tmp_path, text):
    assert read_captions(tmp_path / "captions.json") is None
    (tmp_path / "captions.json").write_text(text)
    with pytest.raises(InputError, match="captions.json cannot be read as the captions of a run"):
        read_captions(tmp_path / "captions.json")
