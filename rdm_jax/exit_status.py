"""How a command ends: one sentence where something is in its way, and a status that says what it was."""

import os
import sys
from collections.abc import Callable

from rdm_jax.errors import InputError
from rdm_jax.interrupt import Interrupted
from rdm_jax.terminal import go_on_unread
from rdm_jax.training.loop import Diverged


def exit_status(work: Callable[[], None], workdir: Callable[[], str | None]) -> int:
    """Does the work; returns 0, 1 if it diverged, 2 for what cannot be used, 130 and 143 where Ctrl-C or SIGTERM stopped it.

    Args:
      work: what the command does.
      workdir: where it writes; asked when a system's error names no file.
    """
    with go_on_unread():
        return _exit_status(work, workdir)


def _exit_status(work: Callable[[], None], workdir: Callable[[], str | None]) -> int:
    try:
        work()
    except (InputError, Diverged) as error:
        print(f"error: {_in_one_line(str(error))}", file=sys.stderr)
        return 1 if isinstance(error, Diverged) else 2
    except OSError as error:
        where, why = error.filename or workdir(), error.strerror or error
        print(f"error: {where} cannot be used ({why}); free space, or another --workdir, would do.", file=sys.stderr)
        return 2
    except Interrupted as error:
        print(f"{error}; the same command goes on from here", file=sys.stderr)
        if error.at_once:  # Python would wait for the threads of a save
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(error.status)
        return error.status
    return 0


def _in_one_line(text: str) -> str:
    """Without line breaks and the like, which a name in a stranger's file may have."""
    return "".join(c if c.isprintable() else " " for c in text)
