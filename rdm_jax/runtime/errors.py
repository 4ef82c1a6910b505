"""The errors that a user is meant to read."""

import errno
import os
import signal

# Of the system's errors, those whose message says enough in whatever a library makes of them.
KNOWN = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ENOTDIR, errno.ESTALE)


class InputError(ValueError):
    """A user's input cannot be used: printed as one line, without a traceback; exit status 2.

    Attributes:
      problem: names the field or file and its value, and says what is wrong; without a final stop.
      fix: what to do instead: one imperative sentence.
    """

    def __init__(self, problem: str, fix: str):
        super().__init__(problem, fix)
        self.problem, self.fix = problem, fix

    def __str__(self) -> str:
        return f"{self.problem}. {self.fix}" if self.fix else self.problem


class BadImage(InputError):
    """One image of a set cannot be used; `--skip_bad` leaves it out and continues.

    Args:
      reason: what is wrong: a predicate such as "is empty", without the image's name.
      fix: as for `InputError`.
      image: the name of the image, where it is known; `problem` then begins with it.

    Attributes:
      reason: as given.
    """

    def __init__(self, reason: str, fix: str = "", image: str = ""):
        super().__init__(f"image {image!r} {reason}" if image else reason, fix)
        self.args, self.reason = (reason, fix, image), reason


class Diverged(RuntimeError):
    """Too many consecutive steps had a loss or gradient that is not finite."""


# Like KeyboardInterrupt a BaseException, so that no `except Exception` swallows it.
class Interrupted(BaseException):
    """Work was stopped by a signal.

    Attributes:
      status: the exit status, 128 + the signal's number, as shells report it.
      at_once: it stopped without saving.
    """

    def __init__(self, number: int, at_once: bool = False):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.status, self.at_once = 128 + number, at_once


def remedy(error: Exception, otherwise: str) -> str:
    """What to do about an error: what is `otherwise` right, unless a network file system has lost a
    file, which libraries may pass on in words alone."""
    if os.strerror(errno.ESTALE) not in str(error):
        return otherwise
    return "Run the same again: the file was replaced from another host, or its server restarted."


def reason(error: Exception) -> str:
    """Returns the system's message where a library passes it on, else the error's first line.

    The line is cut to 200 characters, which fit into a sentence.
    """
    for number in KNOWN:
        if os.strerror(number) in str(error):
            return os.strerror(number)
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
