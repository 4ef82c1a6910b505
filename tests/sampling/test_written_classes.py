"""The classes of written samples, and who reads them."""

import numpy as np
import pytest
from PIL import Image

from rdm_jax.data.classes import Classes, matched
from rdm_jax.data.sources import open_source
from rdm_jax.evaluation.image_streams import NpzStream
from rdm_jax.runtime.errors import InputError
from rdm_jax.sampling.low_images import LowImages
from tests.support.fake_pipeline import FakeRelay
from tests.support.sampled import config_of, sample

BY_TEXT = tuple(sorted(map(str, range(12))))  # 0, 1, 10, 11, 2, ...: an order that folders had once


@pytest.mark.parametrize("labels", ["balanced", "10", "11,2"])
def test_pngs_are_read_with_their_classes(tmp_path, labels):
    """Folders that are called by numbers, in another order than the numbers'."""
    classes, seeds = Classes(BY_TEXT), np.arange(12)
    sample(tmp_path, classes=classes, files="png", labels=labels)
    source = open_source(f"folder:{tmp_path / 'samples/images'}")
    assert source.class_names == BY_TEXT
    asked = FakeRelay(config_of(labels=labels), classes).labels(seeds)
    assert [BY_TEXT[source.label(n)] for n in range(12)] == [BY_TEXT[n] for n in asked]
    in_order = Classes(tuple(map(str, range(12))))  # real images that were prepared since
    numbers = matched(Classes(source.class_names), in_order)
    assert [numbers[source.label(n)] for n in range(12)] == [int(BY_TEXT[n]) for n in asked]
    assert labels != "10" or set(asked.tolist()) == {2}


def test_npz_stream_matches_classes_by_name(tmp_path):
    random = np.random.default_rng(0)
    images, labels = random.integers(0, 256, (12, 8, 8, 3), np.uint8), np.arange(12)
    np.savez(tmp_path / "named.npz", images=images, labels=labels, class_names=np.asarray(BY_TEXT))
    np.savez(tmp_path / "numbers.npz", images=images, labels=labels)
    np.savez(
        tmp_path / "others.npz",
        images=images,
        labels=labels % 2,
        class_names=np.asarray(["x", "1"]),
    )
    in_order = Classes(tuple(map(str, range(12))))
    stream = NpzStream("npz", tmp_path / "named.npz", (8, 8, 3), in_order, 4)
    assert stream.batch(0, 12)[1].tolist() == [int(name) for name in BY_TEXT] and not stream.notes
    stream = NpzStream("npz", tmp_path / "numbers.npz", (8, 8, 3), in_order, 4)
    assert (
        set(stream.batch(0, 12)[1].tolist()) == {-1} and "no array class_names" in stream.notes[0]
    )
    with pytest.raises(
        InputError, match="npz has the classes x, 1 .2., and the accuracy is that of 0, 1"
    ):
        NpzStream("npz", tmp_path / "others.npz", (8, 8, 3), in_order, 4)
    assert set(
        NpzStream("npz", tmp_path / "others.npz", (8, 8, 3), Classes(), 4).batch(0, 12)[1].tolist()
    ) == {-1}


def test_low_images_of_samples_keep_their_classes(tmp_path):
    """Pictures of a network whose classes are called by numbers are labelled by name, not by the
    place of the name."""
    sample(tmp_path, classes=Classes(BY_TEXT), files="png")
    for path in (tmp_path / "samples/images").glob("*.png"):
        Image.new("RGB", (4, 4)).save(path)
    low = LowImages(config_of(low=f"folder:{tmp_path / 'samples/images'}"))
    assert low.labels(np.arange(12), Classes(BY_TEXT)).tolist() == list(range(12))
    in_order = Classes(tuple(map(str, range(12))))
    assert low.labels(np.arange(12), in_order).tolist() == [int(name) for name in BY_TEXT]
    with pytest.raises(
        InputError, match="has images of the classes 0, 1, 10.*, and the network knows a, b"
    ):
        low.labels(np.arange(12), Classes(("a", "b")))
