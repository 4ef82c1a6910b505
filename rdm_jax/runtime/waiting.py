"""Waiting for the other processes of a run: announced, and ended with a message.

JAX's own timeout ends in an abort by XLA.
"""

import contextlib
import os
import sys
import threading
from collections.abc import Iterator

# The cluster that JAX has detected; no public API tells it.
from jax._src.distributed import global_state

from rdm_jax.runtime.console import log

SECONDS_TO_ANNOUNCE = 1
SECONDS_TO_JOIN = 120


@contextlib.contextmanager
def waiting(seconds: int) -> Iterator[None]:
    """Wraps a call of `jax.distributed.initialize`, which waits in C++ for all processes.

    After `SECONDS_TO_ANNOUNCE` a log line names the processes that are awaited. After `seconds`
    this process ends with status 2 and an error message: when JAX's own timeout expires, XLA
    aborts (SIGABRT) with a stack trace, and nothing else can end the wait.
    """
    over = threading.Event()

    def watch() -> None:
        if over.wait(SECONDS_TO_ANNOUNCE):
            return
        log.info("waiting up to %d s for %s; --coordinator=none runs alone", seconds, _awaited())
        if over.wait(seconds - SECONDS_TO_ANNOUNCE):
            return
        print(
            f"error: {_awaited()} have not all started within {seconds} s. Start all of them, as "
            "srun and mpirun do, raise --join_timeout, or pass --coordinator=none to run alone.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(2)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _awaited() -> str:
    if global_state.coordinator_address is None:  # JAX is still detecting the cluster
        return "the processes that the environment names"
    return (
        f"the {global_state.num_processes} processes of this run at "
        f"{global_state.coordinator_address} (this is process {global_state.process_id})"
    )
