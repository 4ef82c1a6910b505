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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

from rdm_jax.runtime.console import log

# flock's errors if another process holds the lock, and if the file system fails; all others mean
# that it is not supported.
HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
FAILURES = (errno.ESTALE, errno.EIO)
TRIES = 3  # to open a lock that is stale: its file was replaced from another host
HEARTBEAT_SECONDS = 10.0
POLL_SECONDS = 15.0  # longer than a heartbeat, so that a poll sees at least one
STALE_SECONDS = 120.0
Returned = TypeVar("Returned")


class InUse(Exception):
    """Another process holds the lock."""


def try_flock(descriptor: int) -> bool:
    """Takes an exclusive lock on an open file, held until the file is closed.

    Returns:
      Whether this file system supports flock: Lustre may be mounted without it, NFS may lack a
      lock daemon.

    Raises:
      InUse: another process holds the lock.
      OSError: the file system fails.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in HELD:
            raise InUse from error
        if error.errno in FAILURES:
            raise
        return False
    return True


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """A context that one process at a time can enter; the lock ends with the process.

    Without flock, the file `path` + '.owner' names the host and process, and its owner touches it
    every few seconds. Another process takes the lock over if the owner is known to have ended (on
    the same host), or has not touched the file for two minutes. Where there is such a file, flock
    alone does not do: another host may have mounted the file system without it.

    Args:
      path: a file, created if missing, and never removed: others may have it open.

    Raises:
      InUse: another process is in the context.
      OSError: the file cannot be written.
    """
    with contextlib.ExitStack() as held:
        take(path, path.with_name(f"{path.name}.owner"), held)
        yield


def take(path: Path, owner: Path, held: contextlib.ExitStack) -> int:
    """Takes the lock of `locked` until `held` is closed.

    Args:
      path: a file, created if missing.
      owner: the file to use where there is no flock.
      held: what keeps the lock.

    Returns:
      The descriptor of the open file.

    Raises:
      InUse, OSError: as `locked`.
    """
    descriptor, flocked = _retried(lambda: _flocked(path, held))
    if not flocked:
        log.warning("%s: the file system has no flock; using an owner file instead", path)
    if not flocked or _is_owned(owner):
        held.enter_context(owner_file(owner))
    return descriptor


def _flocked(path: Path, held: contextlib.ExitStack) -> tuple[int, bool]:
    """The descriptor of an opened file, and whether it is locked by flock, as `try_flock` says."""
    descriptor = held.enter_context(path.open("a")).fileno()
    return descriptor, try_flock(descriptor)


def _retried(call: Callable[[], Returned]) -> Returned:
    """Calls what opens a file; again, if the file was replaced from another host meanwhile."""
    for _ in range(TRIES - 1):
        try:
            return call()
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
    return call()


def _is_owned(path: Path) -> bool:
    """Whether there is an owner file, for who has the flock; a stale one is removed.

    It needs no heartbeat's wait: it is left over, as a rule, from before the file system had flock.
    """
    with contextlib.suppress(FileNotFoundError):
        seen = _seen(path)
        if _now(path) - seen.heartbeat > STALE_SECONDS:
            _take_away(path, seen.text)
    return path.exists()


@contextlib.contextmanager
def owner_file(path: Path) -> Iterator[None]:
    """A lock without flock: `path` exists while one process is in this context.

    Waits for an owner that may have ended, until a heartbeat is seen or the file is stale: its age
    by the file system's clock shortens the wait, but one heartbeat's time is always waited for, as
    that clock may jump.

    Raises:
      InUse, OSError: as `locked`.
    """
    ours = json.dumps({"host": host(), "process": os.getpid(), "id": uuid.uuid4().hex})
    while not _create(path, ours):
        with contextlib.suppress(FileNotFoundError):  # just released
            seen = _seen(path)
            if not _has_ended(seen.text):
                _wait(path, seen)
            _take_away(path, seen.text)
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


class _Seen(NamedTuple):
    """An owner file's text and the time of its last heartbeat, by the file system's clock."""

    text: str
    heartbeat: float


def _seen(path: Path) -> _Seen:
    """What an owner file shows. It is opened, as NFS then asks the server for its attributes."""

    def read() -> _Seen:
        with path.open() as file:
            return _Seen(file.read(), os.fstat(file.fileno()).st_mtime)

    return _retried(read)


def _wait(path: Path, seen: _Seen) -> None:
    """Waits until an owner file is stale. Raises InUse if its owner shows itself."""
    began, age = time.monotonic(), _now(path) - seen.heartbeat
    seconds = min(max(STALE_SECONDS - age, POLL_SECONDS), STALE_SECONDS)
    log.info("%s: waiting up to %d s for its owner's heartbeat", path, seconds)
    while time.monotonic() - began < seconds:
        time.sleep(POLL_SECONDS)
        if _seen(path) != seen:
            raise InUse


def _create(path: Path, text: str) -> bool:
    """Creates the file atomically with this text; returns False if it exists already."""
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    partial.write_text(text)
    try:
        os.link(partial, path)
    except FileExistsError:
        with contextlib.suppress(FileNotFoundError):
            return _seen(path).text == text  # ours: the answer to a first request was lost
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


def _now(path: Path) -> float:
    """The time by the clock of a path's file system: those of hosts may differ."""
    probe = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    probe.touch()
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink()


def _has_ended(text: str) -> bool:
    """Whether the process that an owner file names is known to have ended."""
    try:
        owner = json.loads(text)
        return owner["host"] == host() and not is_running(owner["process"])
    except (ValueError, KeyError, TypeError):
        return False  # a damaged file is judged by its heartbeat


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
