"""One run at a time in a folder: by flock where the file system has it, else by a file that its
owner keeps young."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from rdm_jax.runtime.console import log

# What flock says where another process has the lock; everything else means that it does not work
# there.
HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
HEARTBEAT_SECONDS, POLL_SECONDS, STALE_SECONDS = 10.0, 15.0, 120.0  # a poll sees at least one beat


class InUse(Exception):
    """Another process has the lock."""


def try_flock(descriptor: int) -> bool:
    """Takes an exclusive lock on an open file, for as long as it is open.

    Returns:
      Whether this file system knows such locks: Lustre may be mounted without them, NFS have no
        lock daemon.

    Raises:
      InUse: another process has it.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in HELD:
            raise InUse from error
        return False
    return True


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """A part that one process at a time goes through; the lock ends with the process, however that
    ends.

    Without flock, `path` with '.owner' at its end names the host and process, and is touched every
    few seconds: another process takes it over when its owner is known to be gone (on the same
      host), or has not touched it for two minutes.

    Args:
      path: a file, made if need be, and never removed: others may have it open.

    Raises:
      InUse: another process is in it.
      OSError: the file cannot be written.
    """
    with path.open("a") as file:
        if try_flock(file.fileno()):
            yield
            return
        log.warning(
            "%s: the file system knows no locks (flock); a file beside it keeps other runs out",
            path,
        )
        with owner_file(path.with_name(f"{path.name}.owner")):
            yield


@contextlib.contextmanager
def owner_file(path: Path) -> Iterator[None]:
    """A lock without flock: `path` is there while one process is in this part. Raises InUse and
    OSError like `locked`.

    An owner that may be gone is waited for until its heart beats, or its file is too old.
    """
    ours, said = (
        json.dumps({"host": _here(), "process": os.getpid(), "id": uuid.uuid4().hex}),
        False,
    )
    while not _made(path, ours):
        with contextlib.suppress(FileNotFoundError):  # just given back
            theirs, beat = path.read_text(), path.stat().st_mtime
            if _is_stale(path, theirs):
                _take_away(path, theirs)
                continue
            if not said:
                log.info(
                    "%s: waiting up to %d s to see whether its owner is at work",
                    path,
                    STALE_SECONDS,
                )
                said = True
            time.sleep(POLL_SECONDS)
            if path.stat().st_mtime != beat or path.read_text() != theirs:
                raise InUse
    ended = threading.Event()
    beating = threading.Thread(target=_beat, args=(path, ours, ended), daemon=True)
    beating.start()
    try:
        yield
    finally:
        ended.set()
        beating.join()
        with contextlib.suppress(OSError):
            if path.read_text() == ours:
                path.unlink()


def _here() -> str:
    """This host and, as containers on it may share its name, the processes that are known here by
    their numbers."""
    with contextlib.suppress(OSError):
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


def _made(path: Path, text: str) -> bool:
    """Whether the file was not there, and is now; never there in part."""
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    partial.write_text(text)
    try:
        os.link(partial, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        try:
            with path.open("x") as file:
                file.write(text)
        except FileExistsError:
            return False
    finally:
        partial.unlink()
    return True


def _take_away(path: Path, text: str) -> None:
    """Removes the file with this text. Raises InUse where another process has taken it over
    meanwhile."""
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    with contextlib.suppress(FileNotFoundError):
        path.rename(aside)
        try:
            if aside.read_text() != text:  # what was moved is another one's: it gets it back
                with contextlib.suppress(OSError):
                    os.link(aside, path)
                raise InUse
        finally:
            aside.unlink()


def _is_stale(path: Path, text: str) -> bool:
    """Whether the owner of a file is gone. Ages are by the file system's own clock: hosts' clocks
    may differ."""
    now = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    now.touch()
    try:
        age = now.stat().st_mtime - path.stat().st_mtime
    finally:
        now.unlink()
    try:
        owner = json.loads(text)
        gone = owner["host"] == _here() and not _is_running(owner["process"])
    except (ValueError, KeyError, TypeError):
        gone = False  # damaged: its age says
    return gone or age > STALE_SECONDS


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's
    return True


def _beat(path: Path, ours: str, ended: threading.Event) -> None:
    """Touches the file until it ends, unless another process has taken it over."""
    while not ended.wait(HEARTBEAT_SECONDS):
        with contextlib.suppress(OSError):
            if path.read_text() != ours:
                log.warning(
                    "%s: another run has taken this one's place; both write to the folder", path
                )
                return
            os.utime(path)
