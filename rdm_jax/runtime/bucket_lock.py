"""One run at a time in a folder of a bucket: an object names the owner, who rewrites it regularly.

The objects are called 1, 2, ... in a folder of their own, and the largest number owns the lock. A
new one is created only if there is none of that name, which the store decides. Whoever takes over
the lock of a run that has ended creates the next number, so that of two only one can.
"""

import contextlib
import datetime
import getpass
import json
import os
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

from etils import epath

from rdm_jax.runtime import locks, mounts
from rdm_jax.runtime.console import log
from rdm_jax.runtime.mounts import files, talking_to


@contextlib.contextmanager
def locked(folder: epath.Path) -> Iterator[epath.Path]:
    """A context that one process at a time can enter.

    The owner rewrites its object every few seconds. Another process takes the lock over if the
    owner is known to have ended (on the same host), or has not done so for two minutes. An owner
    that has lost its lock writes nothing more into the folder above (`mounts.check_owned`).

    Args:
      folder: of the objects.

    Yields:
      The object that holds the lock, JSON.

    Raises:
      locks.InUse: another process is in the context; the message says which, and where its lock is.
      OSError: the bucket cannot be written.
    """
    ours = {
        "host": locks.host(),
        "process": os.getpid(),
        "user": _user(),
        "since": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "id": uuid.uuid4().hex,
    }
    with talking_to(str(folder)):
        owned = _acquire(folder, ours)
    mounts.taken.pop(str(folder.parent), None)
    ended = threading.Event()
    heart = threading.Thread(target=_beat, args=(folder, owned, ours, ended), daemon=True)
    heart.start()
    try:
        yield folder / str(owned)
    finally:
        ended.set()
        heart.join()
        with contextlib.suppress(Exception):  # another process takes it over later
            if _read(folder, owned).get("id") == ours["id"]:
                (folder / str(owned)).unlink()


def _acquire(folder: epath.Path, ours: dict[str, Any]) -> int:
    """Creates the next number, once the owner of the largest one has ended."""
    numbers = _numbers(folder)
    while numbers and not _has_ended(folder, numbers[-1]):
        newer = _numbers(folder)
        if newer == numbers:
            raise locks.InUse(_owner(folder, numbers[-1]))
        numbers = newer
    number = numbers[-1] + 1 if numbers else 1
    try:
        files().pipe_file(_key(folder, number), json.dumps(ours).encode(), mode="create")
    except FileExistsError as error:  # a request that is sent again meets its own object
        if _read(folder, number).get("id") != ours["id"]:
            raise locks.InUse(_owner(folder, number)) from error
    if _numbers(folder)[-1] != number:  # others have taken over and ended since the first look
        (folder / str(number)).unlink()
        raise locks.InUse(_owner(folder, number + 1))
    for other in numbers:
        with contextlib.suppress(FileNotFoundError):
            (folder / str(other)).unlink()
    return number


def _has_ended(folder: epath.Path, number: int) -> bool:
    """Whether the owner of an object has ended; waits for a heartbeat if that is not known."""
    about, written = _read(folder, number), _generation(folder, number)
    if not written:  # just released
        return False
    # A process of that number that runs need not be the owner: containers begin again at 1.
    if about.get("host") == locks.host() and not locks.is_running(int(about.get("process", 0))):
        return True
    log.info(
        "%s: waiting up to %d s for a heartbeat of its owner",
        folder / str(number),
        locks.STALE_SECONDS,
    )
    waited = time.monotonic()
    while time.monotonic() - waited < locks.STALE_SECONDS:
        time.sleep(locks.HEARTBEAT_SECONDS / 2)
        if _generation(folder, number) != written:
            return False
    return True


def _beat(folder: epath.Path, number: int, ours: dict[str, Any], ended: threading.Event) -> None:
    """Rewrites the object until `ended`, unless another process has taken the lock over."""
    while not ended.wait(locks.HEARTBEAT_SECONDS):
        with contextlib.suppress(Exception):  # the store is away: the next heartbeat may succeed
            numbers = _numbers(folder)
            about = _read(folder, numbers[-1]) if numbers else {}
            if about.get("id") != ours["id"]:
                owner = _owner(folder, numbers[-1]) if about else "whoever removed it"
                mounts.taken[str(folder.parent)] = owner
                log.warning("%s: another run has taken the lock (%s)", folder, owner)
                return
            files().pipe_file(_key(folder, number), json.dumps(ours).encode())


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may run under a number that has no name
        return str(os.getuid())


def _owner(folder: epath.Path, number: int) -> str:
    about = _read(folder, number)
    names = {name: about.get(name, "unknown") for name in ("process", "host", "user", "since")}
    who = "process {process} on {host} of {user}, since {since}".format(**names)
    return f"{who}; the lock is {folder / str(number)}"


def _read(folder: epath.Path, number: int) -> dict[str, Any]:
    """What the object says; {} if there is none, or it is damaged."""
    try:
        about = json.loads((folder / str(number)).read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return about if isinstance(about, dict) else {}


def _generation(folder: epath.Path, number: int) -> str:
    """What changes with every heartbeat; '' if there is no object."""
    try:
        return str(files().info(_key(folder, number))["generation"])
    except FileNotFoundError:
        return ""


def _numbers(folder: epath.Path) -> list[int]:
    paths = files().find(_key(folder))
    return sorted(int(name) for path in paths if (name := path.rpartition("/")[2]).isdecimal())


def _key(folder: epath.Path, number: int | None = None) -> str:
    path = folder if number is None else folder / str(number)
    return str(path).removeprefix("gs://")
