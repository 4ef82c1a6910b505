"""What a user sees during a run: log lines on stdout, progress bars on stderr."""

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
    """Writes lines without breaking a progress bar that is on the screen."""

    def emit(self, record: logging.LogRecord) -> None:
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        # Characters that the terminal cannot encode are escaped, and raise nothing.
        line = self.format(record).encode(encoding, "backslashreplace").decode(encoding)
        if sys.stderr.isatty():
            tqdm.write(line, file=sys.stdout)
        else:  # no bar is on a screen, and clearing one would put spaces before the line
            print(line)
        sys.stdout.flush()


class _MayBeUnread:
    """A stream that may be closed, unread or on a full disk: writes that fail are dropped."""

    def __init__(self, stream: Any):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):  # ValueError: the stream is closed
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def leave(self) -> None:
        """Flushes; on failure redirects to /dev/null, as Python would flush again and exit 120."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


@contextlib.contextmanager
def tolerate_closed_streams() -> Iterator[None]:
    """Inside this context, work continues when stdout or stderr are closed, unread or full."""
    before = sys.stdout, sys.stderr
    with open(os.devnull, "w") as devnull:
        streams = [_MayBeUnread(stream or devnull) for stream in before]
        sys.stdout, sys.stderr = streams
        try:
            yield
        finally:
            for stream in streams:
                stream.leave()
            sys.stdout, sys.stderr = before


def show_log(quiet: bool = False) -> None:
    """Sends this project's log to stdout; loggers of libraries keep their settings.

    Args:
      quiet: show warnings only, and no progress bars.
    """
    if not log.handlers:
        handler = _BesideBars()
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        log.addHandler(handler)
    log.setLevel(logging.WARNING if quiet else logging.INFO)
    log.propagate = False


def quiet_libraries() -> None:
    """Silences third-party loggers; real problems surface as exceptions."""
    absl_logging.set_verbosity(absl_logging.FATAL)
    # Of several failures in one save, asyncio logs all after the first.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)


@contextlib.contextmanager
def without_warnings_of_absl() -> Iterator[None]:
    """Inside this context, libraries that log with absl log errors only."""
    before = absl_logging.get_verbosity()
    absl_logging.set_verbosity(min(before, absl_logging.ERROR))  # a lower number says less
    try:
        yield
    finally:
        absl_logging.set_verbosity(before)


def progress(total: int, description: str, done: int = 0) -> tqdm:
    """Returns a progress bar in images, with rate and time left.

    Without a terminal it prints one line every 10 s instead. `show_log(quiet=True)` disables it.
    """
    kwargs: dict[str, Any] = {"mininterval": 0.2}
    if not sys.stderr.isatty():
        line = "{desc}: {n_fmt}/{total_fmt} images, {rate_fmt}, {remaining} left {postfix}\n"
        # position=0: a nested bar would move the cursor, which a file does not have.
        kwargs = {"mininterval": 10, "maxinterval": 20, "bar_format": line, "position": 0}
    return tqdm(
        total=total,
        desc=description,
        unit=" images",
        initial=done,
        disable=log.level > logging.INFO,
        **kwargs,
    )
