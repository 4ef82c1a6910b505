"""The errors that a user is meant to read."""

import errno
import os


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message is one sentence that names the field or file, its value, and what would do;
    `rdm_jax.main` prints it without a traceback and exits with status 2.
    """


class BadImage(InputError):
    """One image of a set cannot be used; `--skip_bad` leaves it out and goes on."""


def reason(error: Exception) -> str:
    """What the system said, where a library passes that on; else its own first line, cut to a length that fits a sentence."""
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ENOTDIR):
        if os.strerror(number) in str(error):
            return os.strerror(number)
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
