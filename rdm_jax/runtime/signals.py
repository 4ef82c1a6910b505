"""Stopping without losing anything: Ctrl-C and SIGTERM are noted, and obeyed between two steps."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading

from rdm_jax.runtime.errors import Interrupted

# To the first signal and to the second one.
ANSWERS = (
    b"\nstopping as soon as everything is saved\n",
    b"once more stops at once, and loses the last steps\n",
)


class StopOnSignal:
    """A context in which the first SIGINT or SIGTERM sets `requested`, and a third one interrupts
    at once.

    A second one is warned of that, and no more: a shell and what it started may each send the same
      one. Long loops call `check`
    where everything is saved, or look at `requested` and save first. Python gives signals to its
    main thread alone: in another thread, such as a notebook server's, nothing is installed, and the
      context leaves signals to the caller.
    """

    def __init__(self):
        self.requested: int | None = None
        self._signals = 0

    def __enter__(self) -> "StopOnSignal":
        here = threading.current_thread() is threading.main_thread()
        self._previous = {
            number: signal.signal(number, self._note)
            for number in (signal.SIGINT, signal.SIGTERM)
            if here
        }
        return self

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame):
        self.requested = self.requested or number
        self._signals += 1
        if self._signals > len(ANSWERS):
            raise Interrupted(number, at_once=True)
        # Not by print, in the middle of which the signal may have come.
        with contextlib.suppress(OSError, AttributeError):  # there may be no stderr
            os.write(sys.stderr.fileno(), ANSWERS[self._signals - 1])

    @property
    def interruption(self) -> Interrupted:
        """What to raise once everything is saved; where another process was told to stop, as if
        this one were by SIGTERM."""
        return Interrupted(self.requested or signal.SIGTERM)

    def check(self) -> None:
        """Raises `Interrupted` if a signal has come."""
        if self.requested:
            raise self.interruption


def obey_parent_alone() -> None:
    """In a worker process: leaves the terminal's Ctrl-C to the parent, and ends at once when that
    is gone, however it went."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
