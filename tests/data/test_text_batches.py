"""Batches with embedded captions: in memory, in parts, from workers."""

import dataclasses
import itertools

import chex
import numpy as np
import pytest

from rdm_jax.data import pipeline
from rdm_jax.data.image_sets import open_prepared
from rdm_jax.data.images import ImageSpec
from rdm_jax.data.pipeline import train_iterator
from rdm_jax.data.prepare import prepare
from rdm_jax.data.text_table import TokenFile, embedded
from tests.support.configs import write_images
from tests.support.fake_encoder import FakeEncoder

COUNT = 23


def take(count, iterator):
    return list(itertools.islice(iterator, count))


@pytest.fixture
def captioned(tmp_path):
    """Returns a function that opens 23 images of 6 x 4, each with a caption of its own."""
    write_images(tmp_path / "images", count=COUNT)
    path = prepare(f"folder:{tmp_path / 'images'}", tmp_path / "set", ImageSpec(6, 4))
    words = ("red", "green", "a blue")
    texts = embedded([f"{words[i % 3]} {i}" for i in range(COUNT)], FakeEncoder(tokens=5, width=7))
    texts.values.tofile(tmp_path / "tokens.bin")

    def opened(cache_bytes=0):
        images = open_prepared(path, cache_bytes=cache_bytes)
        values = TokenFile.of(tmp_path / "tokens.bin")
        images.add_text(dataclasses.replace(texts, values=values))
        return images

    return opened


def test_batches_have_captions_on_request(captioned):
    """The same for a set in memory and one that is not, in parts of any size."""
    images = captioned()
    for cached in (0, 2**20):
        found = next(train_iterator(captioned(cached), batch_size=8, seed=2, text=True))
        assert next(train_iterator(images, batch_size=8, seed=2)).keys() == {"image", "label"}
        order = np.random.default_rng((2, 0)).permutation(COUNT)[:8]
        chex.assert_trees_all_equal(found, images.batch(order, text=True))
        assert found["text"].shape == (8, 5, 7) and found["text"].dtype == np.float16
        assert set(found["text_length"].tolist()) <= {2, 3}


def test_elements_travel_with_their_captions(captioned, monkeypatch):
    """6 x 4 x 3 bytes of pixels and 2 x 5 x 7 of tokens are two images in 300 bytes."""
    monkeypatch.setattr(pipeline, "ELEMENT_BYTES", 300)
    images = captioned()
    assert (images.image_bytes(text=False), images.image_bytes(text=True)) == (72, 142)
    for text, parts in ((False, 2), (True, 4)):
        made = train_iterator(images, batch_size=8, seed=0, workers=1, text=text)
        assert made._parts == parts


@pytest.mark.second
def test_workers_read_captions(captioned):
    images = captioned()
    wanted = take(4, train_iterator(images, batch_size=8, seed=2, text=True))
    iterator = train_iterator(images, batch_size=8, seed=2, text=True, workers=2)
    chex.assert_trees_all_equal(take(4, iterator), wanted)
    iterator.close()
    assert "text_length" in wanted[0]
