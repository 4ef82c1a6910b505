"""The captions that a workdir keeps."""

import json

import pytest

from rdm_jax.data import records
from rdm_jax.data.image_sets import open_prepared
from rdm_jax.data.images import ImageSpec
from rdm_jax.data.prepare import prepare
from rdm_jax.data.text_table import embedded
from rdm_jax.runtime.errors import InputError
from rdm_jax.sampling import run_captions
from rdm_jax.sampling.run_captions import Captions, pairs_of, read_captions
from tests.support import captioned_runs
from tests.support.captioned_runs import ENCODER
from tests.support.configs import write_images


def of(training, held_out=()):
    """Of images without classes."""
    return Captions.of(*([(caption, "") for caption in part] for part in (training, held_out)))


def test_captions_are_kept_once_and_mixed(tmp_path):
    many = [f"image {i}" for i in range(50)]
    kept = of([*many, *many, "", "ü 漢"], ["Image  3", "new", "new", ""])
    assert sorted(kept.training) == sorted([*many, "ü 漢"]) and kept.held_out == ("new",)
    assert kept.training[:50] != (*many,) and kept == of(["ü 漢", *many[::-1]], ["new"])
    assert kept.training_classes == kept.held_out_classes == ()
    kept.write(tmp_path / "captions.json")
    assert read_captions(tmp_path / "captions.json") == kept
    assert "漢" in (tmp_path / "captions.json").read_text("utf-8")


def test_captions_are_kept_with_each_of_their_classes(tmp_path):
    images = captioned_runs.captioned(
        ["a cat", "a dog", "a cat", "a cat", "a bird"]
    )  # of a, b, a, b, a
    kept = Captions.of(pairs_of(images), [("a  Cat", "b"), ("a cow", "b")])
    pairs = zip(kept.training, kept.training_classes, strict=True)
    assert sorted(pairs) == [("a bird", "a"), ("a cat", "a"), ("a cat", "b"), ("a dog", "b")]
    assert (kept.held_out, kept.held_out_classes) == (("a cow",), ("b",)) and kept.complete
    kept.write(tmp_path / "captions.json")
    assert read_captions(tmp_path / "captions.json") == kept
    _, held_out = images.split(2)
    assert pairs_of(held_out) == [("a dog", "b"), ("a cat", "b")]


def test_classes_of_prepared_images_are_read_without_decoding(tmp_path, monkeypatch):
    """A set may have more images than can be decoded before each training."""
    write_images(tmp_path / "images", count=6)
    prepared = prepare(f"folder:{tmp_path / 'images'}", tmp_path / "set", ImageSpec(8, 8))
    images, in_memory = open_prepared(prepared), open_prepared(prepared, cache_bytes=2**20)
    assert not images.is_cached and in_memory.is_cached
    monkeypatch.setattr(records, "open_image", None)
    for each in (images, in_memory):
        each.add_text(embedded([f"image {i}" for i in range(6)], ENCODER))
        assert each.labels().tolist() == [0, 0, 0, 1, 1, 1]
    learnt, held_out = images.split(2)
    assert sorted(pairs_of(learnt) + pairs_of(held_out)) == pairs_of(images) == pairs_of(in_memory)
    assert pairs_of(images)[2:4] == [("image 2", "a"), ("image 3", "b")]


def test_captions_of_an_earlier_version_are_read(tmp_path):
    """As today's training keeps them."""
    written = {"version": 1, "training": ["a cat", "ü"], "held_out": ["a dog"], "complete": True}
    (tmp_path / "captions.json").write_text(json.dumps(written))
    assert read_captions(tmp_path / "captions.json") == Captions(("a cat", "ü"), ("a dog",))


def test_captions_of_an_evaluation_are_kept():
    """Those of 50,000 images, on which distances are measured."""
    kept = of(f"image {i}" for i in range(50_000))
    assert kept.complete and len(set(kept.training)) == 50_000
    assert kept.training[:9] != tuple(f"image {i}" for i in range(9))


def test_held_out_is_said_of_what_is_known(monkeypatch):
    """Of more captions than are kept, others may have been trained on."""
    asked = ["A cat", "a dog", "a bird"]
    assert of(["a cat"], ["a dog"]).are_held_out(asked) == [False, True, True]
    monkeypatch.setattr(run_captions, "MOST", 1)
    some = of(["a cat", "a bird"], ["a dog"])
    assert not some.complete and len(some.training) == 1
    assert some.are_held_out(asked) == [False, True, False]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"version": 2, "training": [], "held_out": [], "complete": true}',
        '{"version": 1, "training": [1], "held_out": [], "complete": true}',
        '{"version": 1, "training": "ab", "held_out": [], "complete": true}',
        '{"version": 1, "training": [], "complete": true}',
        '{"version": 1, "training": [], "held_out": [], "complete": 1}',
        '{"version": 1, "training": ["a"], "held_out": [], "complete": true, '
        '"training_classes": ["a", "b"]}',
    ],
)
def test_damaged_captions_are_refused(tmp_path, text):
    assert read_captions(tmp_path / "captions.json") is None
    (tmp_path / "captions.json").write_text(text)
    with pytest.raises(InputError, match="captions.json cannot be read as the captions of a run"):
        read_captions(tmp_path / "captions.json")
