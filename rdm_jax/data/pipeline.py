"""An image set -> batches: the same order whatever the number of processes and workers, resumed
exactly."""

import functools
import multiprocessing
import queue
import sys
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
from absl import flags

from rdm_jax.data.image_sets import Batch, ImageSet
from rdm_jax.runtime.console import log
from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.lazy import lazy_import
from rdm_jax.runtime.signals import obey_parent_alone

grain = lazy_import("grain")


def train_iterator(
    images: ImageSet,
    *,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 0,
    worker_timeout: float = 300.0,
    threads: int = 2,
    prefetch: int = 4,
    first: tuple[int, int] = (0, 0),
) -> "TrainIterator":
    """Batches without end, epoch after epoch in a new order, every image once an epoch.

    Global batch k takes the positions k * batch_size, ... of the epochs laid end to end (counted
    from `first`); process i takes its i-th part. So neither the global batches nor the iterator's
    state, {'next_index': k} for the next k to be handed out (JSON), know of the number of processes
    and workers, and a run goes on exactly on another number of them.

    Args:
      images: what to draw from.
      batch_size: of the global batch; it may exceed the number of images.
      seed: of the orders.
      process_index, process_count: whose part to yield.
      workers: processes that make batches; 0 for threads of this one alone, as for a set in memory
        whatever is asked for.
      worker_timeout: seconds that workers may take for a batch. Where they take longer, or are
        killed, others take their place, once, with the same batch.
      first: a batch, and the position that it begins with: where the batch size was another one
        before.
      threads, prefetch: how many threads make how many batches ahead of need, where there are no
        workers.

    Raises:
      InputError: the batch size is not a positive multiple of the number of processes, or the seed
        is negative; and from the iterator, where an image cannot be read, or workers have failed
        twice.
    """
    if batch_size < 1 or batch_size % process_count:
        raise InputError(
            f"batch_size={batch_size} cannot be shared by {process_count} processes; a multiple would do."
        )
    if not 0 <= process_index < process_count:
        raise InputError(
            f"process_index={process_index} of {process_count} processes; 0 to {process_count - 1} would do."
        )
    if seed < 0:
        raise InputError(f"seed={seed} is negative; 0 or more would do.")
    batches = _Batches(images, batch_size, seed, process_index, process_count, first)
    workers = 0 if images.is_cached else workers
    # A worker keeps two batches in the memory that processes share; threads that make more ahead
    # would not make them sooner.
    options = grain.ReadOptions(
        num_threads=1 if workers else threads, prefetch_buffer_size=1 if workers else prefetch
    )
    return TrainIterator(batches, options, workers, worker_timeout)


class TrainIterator:
    """Batches {'image': uint8 (b, h, w, c), 'label': int32 (b,)} of one process; made by
    `train_iterator`.

    Its state is its own and not grain's, whose state with workers fits the same number of workers
    alone.
    """

    def __init__(self, batches: "_Batches", options: Any, workers: int, worker_timeout: float):
        self._batches, self._options, self._workers = (
            grain.MapDataset.source(batches),
            options,
            workers,
        )
        self._worker_timeout = worker_timeout
        self._next, self._iterator, self._others = 0, None, set()

    def __iter__(self) -> "TrainIterator":
        return self

    def __next__(self) -> Batch:
        if self._iterator is None:
            self._iterator = self._start()
        batch = self._from_workers() if self._workers else next(self._iterator)
        self._next += 1
        return batch

    def _from_workers(self) -> Batch:
        """The next batch of the workers or, where they fail, of others; grain alone would wait for
        ever for one that hangs."""
        try:
            return _within(self._worker_timeout, self._iterator)
        except _WorkersFailed as failure:
            log.warning("data: %s; others take their place, with the same batch", failure)
        self._kill_workers()
        self._iterator = self._start()
        try:
            return _within(self._worker_timeout, self._iterator)
        except _WorkersFailed as failure:
            self._kill_workers()
            would_do = "none (config.data.workers=0), or a larger config.data.worker_timeout,"
            raise InputError(
                f"config.data.workers={self._workers} have failed twice ({failure}); {would_do} would do."
            ) from failure

    def _kill_workers(self) -> None:
        for process in set(multiprocessing.active_children()) - self._others:
            process.kill()
        self.close()

    def _start(self) -> Any:
        remaining = self._batches[self._next :].to_iter_dataset(self._options)
        if self._workers:
            if not flags.FLAGS.is_parsed():  # grain's workers ask for them, in a notebook too
                flags.FLAGS.mark_as_parsed()
            self._others = set(multiprocessing.active_children())
            options = grain.MultiprocessingOptions(num_workers=self._workers)
            remaining = remaining.mp_prefetch(options, worker_init_fn=_in_worker)
        return iter(remaining)

    def get_state(self) -> dict[str, int]:
        """The number of the next batch."""
        return {"next_index": self._next}

    def set_state(self, state: dict[str, int]) -> None:
        """Goes on with the batch of that number."""
        self.close()
        self._next = state["next_index"]

    def close(self) -> None:
        """Ends the workers. The next batch, if one is asked for, starts others."""
        if self._iterator is not None:
            self._iterator.close()
        self._iterator = None


class _WorkersFailed(RuntimeError):
    """A worker was killed, or hangs."""


def _within(seconds: float, batches: Iterator[Batch]) -> Batch:
    """The next batch. Raises `_WorkersFailed` where none comes in so many seconds, or a worker has
    ended."""
    answers: queue.SimpleQueue = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put((next(batches), None))
        except BaseException as error:
            answers.put((None, error))

    threading.Thread(target=ask, daemon=True).start()
    try:
        batch, error = answers.get(timeout=seconds)
    except queue.Empty:
        raise _WorkersFailed(f"workers have made no batch in {seconds:g} s") from None
    if isinstance(error, RuntimeError):  # grain's, for a worker that is gone
        raise _WorkersFailed(" ".join(str(error).split())) from error
    if error is not None:
        raise error
    return batch


def _in_worker(index: int, count: int) -> None:
    obey_parent_alone()


@functools.lru_cache(
    maxsize=8
)  # Two epochs for a batch across them and two for prefetching, of two iterators.
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(count)


class _Batches:
    """One process's part of every global batch, by number.

    A batch is one element to grain, as its bookkeeping costs more than the look-up of a cached
    image; and its own shuffle adds the epoch to the seed, so that the second epoch of seed 0 would
    be the first of seed 1.
    """

    def __init__(
        self,
        images: ImageSet,
        batch_size: int,
        seed: int,
        process_index: int,
        process_count: int,
        first: tuple[int, int],
    ):
        self._images, self._batch_size, self._seed, self._first = images, batch_size, seed, first
        self._part = np.arange(batch_size).reshape(process_count, -1)[process_index]

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> Batch:
        batch, position = self._first
        epochs, positions = np.divmod(
            position + (index - batch) * self._batch_size + self._part, len(self._images)
        )
        several = range(int(epochs[0]), int(epochs[-1]) + 1)
        parts = [
            _order(self._seed, epoch, len(self._images))[positions[epochs == epoch]]
            for epoch in several
        ]
        return self._images.batch(np.concatenate(parts))
