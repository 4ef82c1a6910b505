"""What a user sees while it runs: log lines on stdout, bars on stderr."""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any

from absl import logging as absl_logging
from tqdm import tqdm

log = logging.getLogger("rdm_jax")


class _BesideBars(logging.Handler):
    """Writes lines without tearing a bar that is on the screen."""

    def emit(self, record: logging.LogRecord):
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        # A name that the terminal has no letters for is written with escapes, and ends nothing.
        tqdm.write(
            self.format(record).encode(encoding, "backslashreplace").decode(encoding),
            file=sys.stdout,
        )
        sys.stdout.flush()


class _MayBeUnread:
    """A stream whose reader may have gone, or whose disk may be full: what cannot be written is
    lost, and nothing else."""

    def __init__(self, stream: Any):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):  # the second where it is closed
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def leave(self) -> None:
        """Lets Python end without another attempt, whose failure would be its exit status."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


@contextlib.contextmanager
def tolerate_closed_streams() -> Iterator[None]:
    """A part in which work goes on where stdout or stderr are closed, their reader has gone, or
    their disk is full."""
    before = sys.stdout, sys.stderr
    with open(os.devnull, "w") as nowhere:
        sys.stdout, sys.stderr = streams = [_MayBeUnread(stream or nowhere) for stream in before]
        try:
            yield
        finally:
            for stream in streams:
                stream.leave()
            sys.stdout, sys.stderr = before


def show_log(quiet: bool = False) -> None:
    """Sends the project's log to the terminal; libraries keep their own settings. `quiet` leaves
    warnings alone, and no bars."""
    if not log.handlers:
        handler = _BesideBars()
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        log.addHandler(handler)
    log.setLevel(logging.WARNING if quiet else logging.INFO)
    log.propagate = False


def quiet_libraries() -> None:
    """Of what libraries log, nothing: what matters in it surfaces as an exception."""
    absl_logging.set_verbosity(absl_logging.FATAL)
    logging.getLogger("asyncio").setLevel(
        logging.CRITICAL
    )  # of several failures in a save, it tells those after the first


def progress(total: int, description: str, done: int = 0) -> tqdm:
    """A bar with images a second and the time left; where nobody watches a terminal, one line every
    10 s."""
    kwargs = {
        "total": total,
        "desc": description,
        "unit": " images",
        "initial": done,
        "disable": log.level > logging.INFO,
    }
    if sys.stderr.isatty():
        return tqdm(mininterval=0.2, **kwargs)
    line = "{desc}: {n_fmt}/{total_fmt} images, {rate_fmt}, {remaining} left {postfix}\n"
    # A bar within another would move the cursor, which a file has not.
    return tqdm(mininterval=10, maxinterval=20, bar_format=line, position=0, **kwargs)
