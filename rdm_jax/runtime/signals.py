"""Stopping without losing work: Ctrl-C and SIGTERM are noted, and handled between two steps."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from types import FrameType

from rdm_jax.runtime.errors import Interrupted

# Printed at the first signal and at the second one.
ANSWERS = (
    b"\nsaving, then stopping\n",
    b"the next signal stops at once and loses the steps since the last checkpoint\n",
)


class StopOnSignal:
    """A context in which the first SIGINT or SIGTERM sets `requested`; a third interrupts at once.

    The second one only warns: a shell and the process that it started may each send the same one.
    Long loops call `check` where everything is saved, or read `requested` and save first. Python
    delivers signals to its main thread only: in another thread, such as a notebook server's, the
    context installs nothing and leaves signals to the caller.
    """

    def __init__(self) -> None:
        self.requested: int | None = None
        self._signals = 0

    def __enter__(self) -> "StopOnSignal":
        self._previous = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.requested = self.requested or number
        self._signals += 1
        if self._signals > len(ANSWERS):
            raise Interrupted(number, at_once=True)
        # Not by print: the signal may have come in the middle of another print.
        with contextlib.suppress(OSError, AttributeError):  # there may be no stderr
            os.write(sys.stderr.fileno(), ANSWERS[self._signals - 1])

    @property
    def interruption(self) -> Interrupted:
        """The exception to raise once everything is saved.

        If another process received the signal, it is that of SIGTERM.
        """
        return Interrupted(self.requested or signal.SIGTERM)

    def check(self) -> None:
        """Raises `Interrupted` if a signal has come."""
        if self.requested:
            raise self.interruption


def obey_parent_alone() -> None:
    """In a worker process: ignores Ctrl-C, and exits as soon as the parent process has ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
