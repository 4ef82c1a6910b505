"""The errors that a user is meant to read."""


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message is one sentence that names the field or file, its value, and what would do;
    `rdm_jax.main` prints it without a traceback and exits with status 2.
    """


class BadImage(InputError):
    """One image of a set cannot be used; `--skip_bad` leaves it out and goes on."""
