"""What a user sees while it runs: log lines on stdout, bars on stderr."""

import logging
import sys

from tqdm import tqdm

log = logging.getLogger("rdm_jax")


class _BesideBars(logging.Handler):
    """Writes lines without tearing a bar that is on the screen."""

    def emit(self, record: logging.LogRecord):
        tqdm.write(self.format(record), file=sys.stdout)
        sys.stdout.flush()


def show_log(quiet: bool = False) -> None:
    """Sends the project's log to the terminal; libraries keep their own settings. `quiet` leaves warnings alone, and no bars."""
    if not log.handlers:
        handler = _BesideBars()
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        log.addHandler(handler)
    log.setLevel(logging.WARNING if quiet else logging.INFO)
    log.propagate = False


def progress(total: int, description: str, done: int = 0) -> tqdm:
    """A bar with images a second and the time left; where nobody watches a terminal, one line every 10 s."""
    kwargs = {"total": total, "desc": description, "unit": " images", "initial": done, "disable": log.level > logging.INFO}
    if sys.stderr.isatty():
        return tqdm(mininterval=0.2, **kwargs)
    line = "{desc}: {n_fmt}/{total_fmt} images, {rate_fmt}, {remaining} left {postfix}\n"
    # A bar within another would move the cursor, which a file has not.
    return tqdm(mininterval=10, maxinterval=20, bar_format=line, position=0, **kwargs)
