"""Batches that are made of smaller elements: the same images, in the same order."""

import itertools
import multiprocessing
import os
import signal
import time

import chex
import numpy as np
import pytest

from rdm_jax.data import pipeline
from rdm_jax.data.image_sets import ImageSet, open_prepared
from rdm_jax.data.images import ImageSpec
from rdm_jax.data.pipeline import train_iterator
from rdm_jax.data.prepare import prepare
from tests.support.configs import write_images

COUNT, BATCH, SEED = 23, 20, 4
IMAGE_BYTES = 4 * 4 * 3


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_images(root / "images", count=COUNT, size=4)
    return prepare(f"folder:{root}/images", root / "set", ImageSpec(4, 4))


@pytest.fixture
def read(monkeypatch):
    """The numbers of images that are read at a time."""
    numbers, batch = [], ImageSet.batch

    def noted(self, indices, *, text=False):
        numbers.append(len(indices))
        return batch(self, indices, text=text)

    monkeypatch.setattr(ImageSet, "batch", noted)
    return numbers


def wanted(directory, batches):
    """Batches of the orders that the documentation of `train_iterator` gives."""
    epochs = [np.random.default_rng((SEED, epoch)).permutation(COUNT) for epoch in range(9)]
    images = open_prepared(directory)
    order = np.concatenate(epochs).reshape(-1)[: BATCH * batches].reshape(batches, BATCH)
    return [images.batch(indices) for indices in order]


def take(count, iterator):
    return list(itertools.islice(iterator, count))


def half(batch, process):
    return {key: values.reshape(2, -1, *values.shape[1:])[process] for key, values in batch.items()}


@pytest.mark.parametrize("largest, threads", [(1, 1), (3, 2), (7, 5), (99, 2), (99, 9), (99, 99)])
def test_small_elements_make_the_same_batches(directory, read, monkeypatch, largest, threads):
    monkeypatch.setattr(pipeline, "ELEMENT_BYTES", largest * IMAGE_BYTES)
    batches = wanted(directory, 8)
    read.clear()
    iterator = train_iterator(
        open_prepared(directory), batch_size=BATCH, seed=SEED, threads=threads
    )
    chex.assert_trees_all_equal(take(3, iterator), batches[:3])
    assert max(read) <= largest and len(read) >= 3 * min(BATCH, threads) / pipeline.PREFETCH
    assert iterator.get_state() == {"next_index": 3}
    for process in range(2):
        part = train_iterator(
            open_prepared(directory),
            batch_size=BATCH,
            seed=SEED,
            threads=threads,
            process_index=process,
            process_count=2,
        )
        part.set_state({"next_index": 2})
        chex.assert_trees_all_equal(take(6, part), [half(batch, process) for batch in batches[2:]])


def test_first_moves_the_batches_of_small_elements(directory, monkeypatch):
    """A batch size that has changed: batch 5 begins at position 7."""
    monkeypatch.setattr(pipeline, "ELEMENT_BYTES", 3 * IMAGE_BYTES)
    epochs = np.concatenate([np.random.default_rng((SEED, i)).permutation(COUNT) for i in range(3)])
    iterator = train_iterator(open_prepared(directory), batch_size=BATCH, seed=SEED, first=(5, 7))
    iterator.set_state({"next_index": 6})
    found = next(iterator)
    chex.assert_trees_all_equal(found, open_prepared(directory).batch(epochs[27:47]))


@pytest.mark.parametrize("threads", [1, 2, 16, 64])
def test_threads_share_four_batches(directory, read, threads):
    """Each has something to do, and their number does not change how much is read ahead."""
    iterator = train_iterator(open_prepared(directory), batch_size=64, seed=0, threads=threads)
    next(iterator)
    time.sleep(0.2)  # for the threads to run ahead
    iterator.close()
    assert len(read) <= 5 * 64 and pipeline.PREFETCH * 64 / max(read) >= threads
    assert sum(read) <= (pipeline.PREFETCH + 1) * 64 + max(read)


def test_default_is_a_thread_per_core(directory, monkeypatch):
    monkeypatch.setattr(pipeline, "cores", lambda: 12)
    images = open_prepared(directory)
    assert train_iterator(images, batch_size=BATCH, seed=0)._options.num_threads == 12
    workers = train_iterator(images, batch_size=BATCH, seed=0, workers=2)
    assert workers._options.num_threads == 1


def test_large_batches_travel_in_small_elements(directory, monkeypatch):
    """4,096 images of 256 x 256 x 3: 805 MB."""
    images = open_prepared(directory)
    monkeypatch.setattr(images, "image_shape", (256, 256, 3))
    for workers in (0, 8):
        iterator = train_iterator(images, batch_size=4096, seed=0, workers=workers)
        largest = -(-4096 // iterator._parts) * 256 * 256 * 3
        assert 2**20 < largest <= pipeline.ELEMENT_BYTES <= 64 * 2**20


@pytest.mark.second
@pytest.mark.parametrize("workers", [1, 3])
def test_workers_send_small_elements(directory, monkeypatch, workers):
    monkeypatch.setattr(pipeline, "ELEMENT_BYTES", 3 * IMAGE_BYTES)
    batches = wanted(directory, 6)
    iterator = train_iterator(
        open_prepared(directory), batch_size=BATCH, seed=SEED, workers=workers
    )
    chex.assert_trees_all_equal(take(2, iterator), batches[:2])
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    chex.assert_trees_all_equal(take(2, iterator), batches[2:4])
    iterator.set_state({"next_index": 1})
    chex.assert_trees_all_equal(take(2, iterator), batches[1:3])
    iterator.close()
