"""Batches of an image set, in an order that is independent of processes and workers.

The state of an iterator is one index, from which training resumes exactly.
"""

import functools
import itertools
import multiprocessing
import queue
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from absl import flags

from rdm_jax.data.image_sets import Batch, ImageSet
from rdm_jax.data.sources import cores
from rdm_jax.runtime.console import log
from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.lazy import lazy_import
from rdm_jax.runtime.signals import obey_parent_alone

grain = lazy_import("grain")

# The most that travels from a worker at a time: shared memory is scarce in containers.
ELEMENT_BYTES = 16 * 2**20
# Batches that threads of this process prepare ahead.
PREFETCH = 4
# Threads for a set in memory, whose batches are lookups.
IN_MEMORY = 2


def as_trained(cell: int, *sets: ImageSet) -> list[ImageSet]:
    """Sets that are used together: as moments of latents, or sums of cell x cell pixels, or pixels.

    All have the same of these, the first that all of them have.
    """
    latents = [images.latents for images in sets if images.latents is not None]
    if len(latents) == len(sets):
        return latents
    sums = [images.of_cells(cell) for images in sets]
    return sums if all(images.cell == cell for images in sums) else list(sets)


def train_iterator(
    images: ImageSet,
    *,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 0,
    worker_timeout: float = 300.0,
    threads: int | None = None,
    first: tuple[int, int] = (0, 0),
    text: bool = False,
) -> "TrainIterator":
    """Endless batches; every epoch has a new order and contains every image once.

    Global batch k has the positions k * batch_size, ... of the concatenated epochs (counted from
    `first`); process i has its i-th part. Neither the global batches nor the iterator's state,
    {'next_index': k} for the next batch k (JSON), depend on the number of processes and workers, so
    that a run resumes exactly with another number of them.

    Args:
      images: the set to draw from.
      batch_size: of the global batch; it may exceed the number of images.
      seed: of the orders.
      process_index, process_count: of the process whose part to yield.
      workers: number of processes that read images; 0 for threads of this process. A set in memory
        always uses threads.
      worker_timeout: seconds that workers may take per batch. If they take longer, or are killed,
        they are restarted once and the batch is retried.
      first: a batch, and the position that it begins with: where the batch size last changed.
      threads: without workers, number of threads that read images; None for one per core.
      text: whether batches have the embedded captions of the images.

    Raises:
      InputError: the batch size is not a positive multiple of the number of processes, or the seed
        is negative; from the iterator, an image cannot be read, or workers have failed twice.
    """
    if batch_size < 1 or batch_size % process_count:
        raise InputError(
            f"batch_size={batch_size} cannot be divided by {process_count} processes",
            f"Use a multiple of {process_count}.",
        )
    if not 0 <= process_index < process_count:
        raise InputError(
            f"process_index={process_index} is out of range for {process_count} processes",
            f"Use 0 to {process_count - 1}.",
        )
    if seed < 0:
        raise InputError(f"seed={seed} is negative", "Use 0 or more.")
    share, parts = batch_size // process_count, 1
    if images.is_cached:
        workers, threads = 0, IN_MEMORY
    else:
        threads = 1 if workers else threads or cores()
        most = max(1, ELEMENT_BYTES // images.image_bytes(text=text))  # images per element
        # Few enough to travel, and enough elements for all threads to have one.
        parts = min(share, max(-(-share // most), -(-threads // PREFETCH)))
    # A worker holds two elements in shared memory; prefetching more would not make them sooner.
    options = grain.ReadOptions(
        num_threads=threads, prefetch_buffer_size=1 if workers else PREFETCH * parts
    )
    elements = _Elements(images, batch_size, seed, process_index, process_count, first, parts, text)
    return TrainIterator(elements, options, workers, worker_timeout)


class TrainIterator:
    """Batches of one process as `ImageSet.batch` gives them; made by `train_iterator`.

    It keeps a state of its own, as grain's state with workers only fits the same number of workers.
    """

    def __init__(self, elements: "_Elements", options: Any, workers: int, worker_timeout: float):
        self._elements = grain.MapDataset.source(elements)
        self._parts = elements.parts  # elements per batch
        self._options = options
        self._workers = workers
        self._worker_timeout = worker_timeout
        self._next = 0  # index of the next batch
        self._iterator: Iterator[Batch] | None = None
        self._others: set = set()  # child processes that are not workers

    def __iter__(self) -> "TrainIterator":
        return self

    def __next__(self) -> Batch:
        if self._iterator is None:
            self._iterator = self._start()
        batch = self._from_workers() if self._workers else self._joined()
        self._next += 1
        return batch

    def _joined(self) -> Batch:
        """The elements of the next batch as one."""
        parts = list(itertools.islice(self._iterator, self._parts))
        if len(parts) == 1:
            return parts[0]
        return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}

    def _from_workers(self) -> Batch:
        """The next batch of the workers, which are restarted once if they fail.

        grain itself waits forever for a worker that hangs.
        """
        try:
            return _within(self._worker_timeout, self._joined)
        except _WorkersFailed as failure:
            log.warning("data: %s; restarting the workers and retrying the batch", failure)
        self._kill_workers()
        self._iterator = self._start()
        try:
            return _within(self._worker_timeout, self._joined)
        except _WorkersFailed as failure:
            self._kill_workers()
            raise InputError(
                f"config.data.workers={self._workers}: the workers failed twice ({failure})",
                "Set config.data.workers=0, or a larger config.data.worker_timeout.",
            ) from failure

    def _kill_workers(self) -> None:
        for process in set(multiprocessing.active_children()) - self._others:
            process.kill()
        self.close()

    def _start(self) -> Any:
        remaining = self._elements[self._next * self._parts :].to_iter_dataset(self._options)
        if self._workers:
            if not flags.FLAGS.is_parsed():  # grain's workers need them, also in a notebook
                flags.FLAGS.mark_as_parsed()
            self._others = set(multiprocessing.active_children())
            options = grain.MultiprocessingOptions(num_workers=self._workers)
            remaining = remaining.mp_prefetch(options, worker_init_fn=_in_worker)
        return iter(remaining)

    def get_state(self) -> dict[str, int]:
        """The index of the next batch."""
        return {"next_index": self._next}

    def set_state(self, state: dict[str, int]) -> None:
        """Resumes with the batch of that index."""
        self.close()
        self._next = state["next_index"]

    def close(self) -> None:
        """Stops the workers; the next batch, if requested, starts new ones."""
        if self._iterator is not None:
            self._iterator.close()
        self._iterator = None


class _WorkersFailed(RuntimeError):
    """A worker was killed or hangs."""


def _within(seconds: float, next_batch: Callable[[], Batch]) -> Batch:
    """The next batch.

    Raises:
      _WorkersFailed: it was not made in so many seconds, or a worker has ended.
    """
    answers: queue.SimpleQueue = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put((next_batch(), None))
        except BaseException as error:
            answers.put((None, error))

    threading.Thread(target=ask, daemon=True).start()
    try:
        batch, error = answers.get(timeout=seconds)
    except queue.Empty:
        raise _WorkersFailed(f"workers made no batch in {seconds:g} s") from None
    if isinstance(error, RuntimeError):  # grain's, for a worker that has ended
        raise _WorkersFailed(" ".join(str(error).split())) from error
    if error is not None:
        raise error
    return batch


def _in_worker(index: int, count: int) -> None:
    obey_parent_alone()


# Of two iterators: two epochs for a batch across both, and two for prefetching.
@functools.lru_cache(maxsize=8)
def epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """The order of `count` images in an epoch: int64 (count,), the same in all processes."""
    return np.random.default_rng((seed, epoch)).permutation(count)


class _Elements:
    """Equal parts, up to one image, of one process's share of every global batch, by index.

    Element k is part k % parts of batch k // parts. grain's own shuffle adds the epoch to the seed:
    the second epoch of seed 0 would be the first of seed 1.
    """

    def __init__(
        self,
        images: ImageSet,
        batch_size: int,
        seed: int,
        process_index: int,
        process_count: int,
        first: tuple[int, int],
        parts: int,
        text: bool,
    ):
        self.parts = parts
        self._images = images
        self._batch_size = batch_size
        self._seed = seed
        self._first = first
        self._text = text
        share = np.arange(batch_size).reshape(process_count, -1)[process_index]
        self._shares = np.array_split(share, parts)

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> Batch:
        (batch, part), (first, position) = divmod(index, self.parts), self._first
        epochs, positions = np.divmod(
            position + (batch - first) * self._batch_size + self._shares[part], len(self._images)
        )
        indices = [
            epoch_order(self._seed, epoch, len(self._images))[positions[epochs == epoch]]
            for epoch in range(int(epochs[0]), int(epochs[-1]) + 1)
        ]
        return self._images.batch(np.concatenate(indices), text=self._text)
