"""One run at a time in a folder: by flock where the file system supports it, else by a file.

That file names its owner, who refreshes its modification time (the heartbeat).
"""

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

# flock's errors if another process holds the lock; all others mean that it is not supported.
HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
HEARTBEAT_SECONDS = 10.0
POLL_SECONDS = 15.0  # longer than a heartbeat, so that a poll sees at least one
STALE_SECONDS = 120.0


class InUse(Exception):
    """Another process holds the lock."""


def try_flock(descriptor: int) -> bool:
    """Takes an exclusive lock on an open file, held until the file is closed.

    Returns:
      Whether this file system supports flock: Lustre may be mounted without it, NFS may lack a
      lock daemon.

    Raises:
      InUse: another process holds the lock.
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
    """A context that one process at a time can enter; the lock ends with the process.

    Without flock, the file `path` + '.owner' names the host and process, and its owner touches it
    every few seconds. Another process takes the lock over if the owner is known to have ended (on
    the same host), or has not touched the file for two minutes.

    Args:
      path: a file, created if missing, and never removed: others may have it open.

    Raises:
      InUse: another process is in the context.
      OSError: the file cannot be written.
    """
    with path.open("a") as file:
        if try_flock(file.fileno()):
            yield
            return
        log.warning("%s: the file system does not support flock; using an owner file instead", path)
        with owner_file(path.with_name(f"{path.name}.owner")):
            yield


@contextlib.contextmanager
def owner_file(path: Path) -> Iterator[None]:
    """A lock without flock: `path` exists while one process is in this context.

    Waits for an owner that may have ended, until a heartbeat is seen or the file is stale.

    Raises:
      InUse, OSError: as `locked`.
    """
    ours = json.dumps({"host": host(), "process": os.getpid(), "id": uuid.uuid4().hex})
    announced = False
    while not _create(path, ours):
        with contextlib.suppress(FileNotFoundError):  # just released
            theirs, heartbeat = path.read_text(), path.stat().st_mtime
            if _is_stale(path, theirs):
                _take_away(path, theirs)
                continue
            if not announced:
                log.info("%s: waiting up to %d s for its owner's heartbeat", path, STALE_SECONDS)
                announced = True
            time.sleep(POLL_SECONDS)
            if path.stat().st_mtime != heartbeat or path.read_text() != theirs:
                raise InUse
    ended = threading.Event()
    heart = threading.Thread(target=_beat, args=(path, ours, ended), daemon=True)
    heart.start()
    try:
        yield
    finally:
        ended.set()
        heart.join()
        with contextlib.suppress(OSError):
            if path.read_text() == ours:
                path.unlink()


def host() -> str:
    """Returns this host's name, process namespace and boot, as far as it has them.

    Containers may share their host's name, and those of several machines all but the boot.
    """
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    return " ".join(parts)


def _create(path: Path, text: str) -> bool:
    """Creates the file atomically with this text; returns False if it exists already."""
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
    """Removes the file if it has this text. Raises InUse if another process has taken it over."""
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    with contextlib.suppress(FileNotFoundError):
        path.rename(aside)
        try:
            if aside.read_text() != text:  # the moved file is another owner's: give it back
                with contextlib.suppress(OSError):
                    os.link(aside, path)
                raise InUse
        finally:
            aside.unlink()


def _is_stale(path: Path, text: str) -> bool:
    """Whether the owner of a file has ended, or the file is too old.

    Ages are measured by the file system's clock, as those of hosts may differ.
    """
    probe = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    probe.touch()
    try:
        age = probe.stat().st_mtime - path.stat().st_mtime
    finally:
        probe.unlink()
    try:
        owner = json.loads(text)
        has_ended = owner["host"] == host() and not is_running(owner["process"])
    except (ValueError, KeyError, TypeError):
        has_ended = False  # a damaged file is judged by its age
    return has_ended or age > STALE_SECONDS


def is_running(process: int) -> bool:
    """Whether this host has such a process."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # a process of another user
    return True


def _beat(path: Path, ours: str, ended: threading.Event) -> None:
    """Touches the file until `ended`, unless another process has taken it over."""
    while not ended.wait(HEARTBEAT_SECONDS):
        with contextlib.suppress(OSError):
            if path.read_text() != ours:
                log.warning("%s: another run has taken the lock; both write to the folder", path)
                return
            os.utime(path)
