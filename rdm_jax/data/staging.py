"""The hidden folder in which a data set is prepared, and the renames that publish it.

Beside a data set NAME may be .NAME.incomplete (the work of an unfinished run), .NAME.lock (held
while a process prepares) and .NAME.former (the previous set, during an update).
"""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from rdm_jax.runtime import locks
from rdm_jax.runtime.console import log
from rdm_jax.runtime.errors import InputError

PARTS = "parts"  # the folder of finished shards; with a suffix, of finished sums


def check_place(directory: Path) -> None:
    """Raises InputError for a directory that cannot be created by a rename."""
    if os.path.ismount(directory):
        raise InputError(
            f"the data directory {directory} is a mount point of a file system",
            "Use a folder in it.",
        )


def _hidden(directory: Path) -> Path:
    return directory.with_name(f".{directory.name}.incomplete")


def _former(directory: Path) -> Path:
    return directory.with_name(f".{directory.name}.former")


@contextlib.contextmanager
def staging_folder(directory: Path) -> Iterator[Path]:
    """A hidden sibling of the directory, exclusive while a lock beside it is held.

    The lock is released when its process ends.

    Raises:
      InputError: another process holds the lock.
    """
    staging = _hidden(directory)
    lock = staging.with_suffix(".lock")  # a lock of the folder itself is local to a host on NFS
    with contextlib.ExitStack() as held:
        try:
            while not _is_locked(lock, held):
                pass
        except locks.InUse as error:
            raise InputError(
                f"{directory} is being prepared by another process", "Wait for it to finish."
            ) from error
        staging.mkdir(exist_ok=True)
        try:
            yield staging
        finally:
            with contextlib.suppress(OSError):
                staging.rmdir()  # fails unless it is empty
            lock.unlink(missing_ok=True)  # while held; whoever has it open checks for that


def _is_locked(lock: Path, held: contextlib.ExitStack) -> bool:
    """Creates and locks a file; False if the lock's previous owner has removed it meanwhile."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as ours:
        descriptor = locks.take(lock, lock.with_suffix(".owner"), ours)
        try:
            is_locked = os.path.samestat(os.fstat(descriptor), lock.stat())
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ESTALE):
                raise
            is_locked = False
        if is_locked:
            held.enter_context(ours.pop_all())
        return is_locked


def publish(made: Path, directory: Path) -> None:
    """Renames a finished set to its place; a previous one is removed once the new one is there."""
    if directory.exists():
        os.rename(directory, _former(directory))
    os.rename(made, directory)
    shutil.rmtree(_former(directory), ignore_errors=True)


def restore_former(directory: Path) -> None:
    """Repairs the state that a kill between or after the two renames of `publish` leaves."""
    if _former(directory).exists() and not directory.exists():
        os.rename(_former(directory), directory)
    shutil.rmtree(_former(directory), ignore_errors=True)


def remove_leftovers(directory: Path) -> None:
    """Removes what a killed run left beside a finished set; keeps what can be resumed."""
    if _hidden(directory).exists() or _former(directory).exists():
        with staging_folder(directory) as staging:
            restore_former(directory)
            if finished := len(list(staging.glob(f"{PARTS}*/*.array_record"))):
                what, flag = "the addition of sums to", "--mode=prepare"
                if (staging / PARTS).exists():
                    what, flag = "an update of", "--update"
                log.info(
                    "data: %s %s was interrupted; %s resumes with the %s files finished in %s",
                    what,
                    directory,
                    flag,
                    f"{finished:,}",
                    staging,
                )
            # Captions and latents are continued when they are needed.
            elif not any((*staging.glob("text_*"), *staging.glob("latents_*"))):
                shutil.rmtree(staging)
