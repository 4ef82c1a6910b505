"""How a command ends: one sentence where something is in its way, and a status that says what it
was."""

import os
import sys
from collections.abc import Callable

from rdm_jax.runtime import distributed
from rdm_jax.runtime.console import tolerate_closed_streams
from rdm_jax.runtime.environment import backend_error
from rdm_jax.runtime.errors import Diverged, InputError, Interrupted, reason


def exit_status(work: Callable[[], None], workdir: Callable[[], str | None]) -> int:
    """Does the work, and says in one sentence why it was not done.

    Args:
      work: what the command does.
      workdir: where it writes; asked when a system's error names no file.

    Returns:
      0; 1 if it diverged or another process is gone, 2 for what cannot be used, 130 and 143 if
      Ctrl-C or SIGTERM stopped it.
    """
    with tolerate_closed_streams():
        return _exit_status(work, workdir)


def _exit_status(work: Callable[[], None], workdir: Callable[[], str | None]) -> int:
    try:
        work()
    except (InputError, Diverged) as error:
        print(f"error: {_in_one_line(str(error))}", file=sys.stderr)
        return 1 if isinstance(error, Diverged) else 2
    except OSError as error:
        where, why = error.filename or workdir(), error.strerror or error
        print(
            f"error: {where} cannot be used ({why}); free space, or another --workdir, would do.",
            file=sys.stderr,
        )
        return 2
    except Exception as error:
        if refused := backend_error(error):
            print(f"error: {_in_one_line(str(refused))}", file=sys.stderr)
            return 2
        if not distributed.is_lost_peer(error):
            raise
        what = f"another process of this run is gone ({_in_one_line(reason(error))})"
        print(
            f"error: {what}; starting all of them again would do, from the last checkpoint.",
            file=sys.stderr,
        )
        return 1
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
