"""Writes the shards of a set, over several processes where that pays."""

import concurrent.futures
import contextlib
import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rdm_jax.data.shards import Shard
from rdm_jax.data.sources import cores
from rdm_jax.runtime.console import progress
from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.signals import obey_parent_alone

# Seconds of work in this process before others, which take a few seconds to start, help.
ALONE_SECONDS = 3.0
# What the indices that processes hold of a source may take in all.
LISTINGS_BYTES = 8 * 2**30


def write_shards(
    shards: Sequence[Shard], description: str, check_stop: Callable[[], None]
) -> list[dict[str, Any]]:
    """Writes all shards; those that were finished before are kept.

    Args:
      description: of the progress bar.
      check_stop: called after every shard; an exception ends the work.

    Returns:
      What `Shard.write` returns, of every shard.

    Raises:
      InputError: as for `Shard.write`, or a process has ended.
      OSError: a file cannot be written.
    """
    results: list[dict[str, Any]] = [{}] * len(shards)
    waiting = list(enumerate(shards))
    began = time.perf_counter()
    processes = _process_count(shards)
    with progress(sum(map(len, shards)), description) as bar:

        def note(number: int, written: dict[str, Any]) -> None:
            results[number] = written
            bar.update(len(shards[number]))
            check_stop()

        # In this process: a single remaining shard, and everything until it takes long.
        while waiting and (
            len(waiting) == 1 or processes == 1 or time.perf_counter() - began < ALONE_SECONDS
        ):
            number, shard = waiting.pop(0)
            note(number, shard.write())

        # In others: the rest.
        if waiting:
            with _pool(min(processes, len(waiting)), check_stop) as pool:
                # Processes inherit what is blocked, so that Ctrl-C only reaches this one, from
                # their first moment.
                signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
                try:
                    futures = {pool.submit(shard.write): number for number, shard in waiting}
                finally:
                    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
                for future in concurrent.futures.as_completed(futures):
                    note(futures[future], future.result())
    return results


def _process_count(shards: Sequence[Shard]) -> int:
    """One per core, or fewer if each has to hold a large index in memory."""
    each = sum(map(len, shards)) * shards[0].memory_per_image
    return cores() if not each else max(1, min(cores(), LISTINGS_BYTES // each))


@contextlib.contextmanager
def _pool(count: int, check_stop: Callable[[], None]) -> Iterator[concurrent.futures.Executor]:
    # Spawned: a fork of a process whose threads hold locks may wait for them forever.
    context = multiprocessing.get_context("spawn")
    others = multiprocessing.active_children()
    pool = concurrent.futures.ProcessPoolExecutor(
        count, mp_context=context, initializer=obey_parent_alone
    )
    try:
        yield pool
    except BaseException as error:
        # Unfinished shards are useless: do not wait for them.
        for process in multiprocessing.active_children():
            if process not in others:
                process.kill()
        check_stop()
        if isinstance(error, concurrent.futures.process.BrokenProcessPool):
            raise InputError(
                "a process that reads images has ended",
                "Run the same again with more memory; in a script, put the call below "
                "`if __name__ == '__main__':`.",
            ) from error
        raise
    finally:
        pool.shutdown(cancel_futures=True)
