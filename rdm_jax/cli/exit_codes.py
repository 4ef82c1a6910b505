"""How a command ends: one line for an error, and an exit status that tells its kind."""

import os
import sys
from collections.abc import Callable

from rdm_jax.runtime import distributed, mounts
from rdm_jax.runtime.console import tolerate_closed_streams
from rdm_jax.runtime.environment import backend_error
from rdm_jax.runtime.errors import Diverged, InputError, Interrupted, reason, remedy

DONE = 0
FAILED = 1
BAD_INPUT = 2
BUCKET_AGAIN = "Run the same command again once the bucket can be used."


def exit_status(work: Callable[[], None], workdir: Callable[[], str | None]) -> int:
    """Does the work and prints one line if it fails.

    Args:
      work: what the command does.
      workdir: where it writes; asked if an error of the system names no file.

    Returns:
      0; 1 if training diverged or another process was lost, 2 for input that cannot be used, 130
      and 143 after Ctrl-C and SIGTERM.
    """
    with tolerate_closed_streams():
        return _exit_status(work, workdir)


def _exit_status(work: Callable[[], None], workdir: Callable[[], str | None]) -> int:
    try:
        work()
    except InputError as error:
        return _failed(str(error), BAD_INPUT)
    except Diverged as error:
        return _failed(str(error), FAILED)
    except OSError as error:
        where, why = error.filename or workdir() or "a file", error.strerror or error
        fix = remedy(error, "Free space, or use another --workdir.")
        if mounts.is_url(str(where)):
            fix = BUCKET_AGAIN
        return _failed(f"{where} cannot be used ({why}). {fix}", BAD_INPUT)
    except Exception as error:
        if refused := backend_error(error):
            return _failed(str(refused), BAD_INPUT)
        if mounts.is_store_error(error):
            where = workdir() or "a bucket"
            return _failed(f"{where} cannot be used ({reason(error)}). {BUCKET_AGAIN}", BAD_INPUT)
        if not distributed.is_lost_peer(error):
            raise
        fix = "Start all of them again; they resume from the last checkpoint."
        return _failed(f"another process of this run has ended ({reason(error)}). {fix}", FAILED)
    except Interrupted as error:
        print(f"{error}; run the same command to resume", file=sys.stderr)
        if error.at_once:  # Python would wait for the threads of a save
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(error.status)
        return error.status
    return DONE


def _failed(message: str, status: int) -> int:
    """Prints an error on one line: names in untrusted files may hold line breaks and the like."""
    line = "".join(c if c.isprintable() else " " for c in mounts.named(message))
    print(f"error: {line}", file=sys.stderr)
    return status
