"""Waiting for the other processes of a run: it is said, and has an end of ours, where jax's own is
an abort by XLA."""

import contextlib
import os
import sys
import threading
from collections.abc import Iterator

from jax._src.distributed import (
    global_state,  # what jax has found in the surroundings, which it tells nowhere else
)

from rdm_jax.runtime.console import log

SECONDS_TO_SAY, SECONDS_TO_JOIN = 1, 120


@contextlib.contextmanager
def waiting(seconds: int) -> Iterator[None]:
    """A part that calls `jax.distributed.initialize`, which waits in C++ for all processes.

    After `SECONDS_TO_SAY` a line says for whom. After `seconds` the process ends with status 2 and
    a line that says why: a wait that jax itself gives up is ended by XLA with SIGABRT and a stack
      trace, and cannot be left in another way.
    """
    over = threading.Event()

    def watch() -> None:
        if over.wait(SECONDS_TO_SAY):
            return
        log.info("waiting up to %d s for %s; --coordinator=none works alone", seconds, _who())
        if over.wait(seconds - SECONDS_TO_SAY):
            return
        would_do = "starting all of them, as srun and mpirun do, a longer --join_timeout, or --coordinator=none to work alone,"
        print(
            f"error: {_who()} have not all come within {seconds} s; {would_do} would do.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(2)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _who() -> str:
    if global_state.coordinator_address is None:  # jax is still asking the surroundings
        return "the processes that the surroundings name"
    about = f"this is process {global_state.process_id}"
    return f"the {global_state.num_processes} processes of this run at {global_state.coordinator_address} ({about})"
