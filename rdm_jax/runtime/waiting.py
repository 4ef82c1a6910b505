"""Waiting for the other processes of a run: announced, and ended with a message.

JAX's own timeout ends in an abort by XLA.
"""

import contextlib
import itertools
import os
import sys
import threading
import time
from collections.abc import Iterator

import jax

# The cluster that JAX has detected, and its services; no public API tells them.
from jax._src.distributed import global_state

from rdm_jax.runtime.console import log
from rdm_jax.runtime.errors import InputError

SECONDS_TO_ANNOUNCE = 1
SECONDS_TO_JOIN = 120
# Between two log lines of a wait, and until it is given up: more than preparing ImageNet takes.
SECONDS_BETWEEN_LINES = 60
SECONDS_TO_WAIT = 24 * 3600

_meetings = itertools.count()  # equal in all processes, as all of them come to each


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


def hears_preemption() -> bool:
    """Whether JAX's service for preemptions runs in this process."""
    return global_state.preemption_sync_manager is not None


def meet(what: str, seconds: float | None = None) -> None:
    """Waits until all processes have called it, which they do together.

    Nothing waits on the devices, whose collectives have time limits of their own or none. Every
    minute a log line says what is waited for.

    Args:
      what: the text of that line, 'process 0, which ...'.
      seconds: to wait; None for `SECONDS_TO_WAIT`. Those of the process that comes first count.

    Raises:
      InputError: the others have not come in time.
    """
    seconds = SECONDS_TO_WAIT if seconds is None else seconds
    client = global_state.client
    if client is None or jax.process_count() == 1:
        return
    with _announced(what):
        try:
            name, milliseconds = f"rdm_jax {next(_meetings)}", int(1000 * seconds)
            client.wait_at_barrier(name, milliseconds)
        except Exception as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
            raise InputError(
                f"waited {seconds / 3600:.3g} h for {what}",
                "See the log of the process that is late, and start all of them again. "
                "--mode=prepare --coordinator=none prepares images in one process before.",
            ) from error


@contextlib.contextmanager
def _announced(what: str) -> Iterator[None]:
    """Logs what is waited for, also in processes that log warnings only."""
    over, began = threading.Event(), time.monotonic()

    def watch() -> None:
        while not over.wait(SECONDS_BETWEEN_LINES):
            minutes = (time.monotonic() - began) / 60
            log.warning("waiting for %s (for %.0f min so far)", what, minutes)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        over.set()
