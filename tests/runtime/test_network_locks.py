"""Locks on a network file system: stale handles, lost answers, clocks that jump, mixed mounts."""

import contextlib
import errno
import json
import os
import time
from unittest import mock

import pytest

from rdm_jax.data.staging import staging_folder
from rdm_jax.runtime import locks
from rdm_jax.runtime.errors import InputError
from rdm_jax.workdir import Workdir

STALE = OSError(errno.ESTALE, os.strerror(errno.ESTALE))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Short heartbeats and polls."""
    monkeypatch.setattr(locks, "HEARTBEAT_SECONDS", 0.01)
    monkeypatch.setattr(locks, "POLL_SECONDS", 0.1)


@pytest.fixture
def no_flock(monkeypatch):
    failing = mock.Mock(side_effect=OSError(errno.ENOLCK, os.strerror(errno.ENOLCK)))
    monkeypatch.setattr(locks.fcntl, "flock", failing)


@pytest.fixture
def flock(monkeypatch):
    """`flock(*results)`: what the first calls return or raise; later ones are the system's."""
    real = locks.fcntl.flock

    def set_up(*results):
        results = list(results)

        def call(descriptor, operation):
            if results:
                raise results.pop(0)
            return real(descriptor, operation)

        monkeypatch.setattr(locks.fcntl, "flock", call)

    return set_up


def owner(path):
    """Another host's owner file."""
    path.write_text(json.dumps({"host": "another", "process": 1, "id": "theirs"}))


def heartbeats(monkeypatch, path):
    """At every poll there is another heartbeat."""
    times = iter(range(10**6))
    sleep = time.sleep

    def beat(seconds):
        sleep(seconds)
        os.utime(path, (0, next(times)))

    monkeypatch.setattr(locks.time, "sleep", beat)


@pytest.mark.parametrize("times", [1, 2])
def test_stale_lock_is_opened_again_and_excludes_by_flock(tmp_path, flock, times):
    """An owner file instead would exclude nobody who has taken the lock by flock."""
    flock(*[STALE] * times)
    with locks.locked(tmp_path / "lock"):
        assert not (tmp_path / "lock.owner").exists()
        with pytest.raises(locks.InUse), locks.locked(tmp_path / "lock"):
            pass


@pytest.mark.parametrize(
    ("number", "fix"), [(errno.ESTALE, "Run the same again: the file was"), (errno.EIO, "Use an")]
)
def test_workdir_whose_lock_fails_is_refused(tmp_path, flock, number, fix):
    flock(*[OSError(number, os.strerror(number))] * locks.TRIES)
    refused = rf"--workdir='.*run' cannot be written \({os.strerror(number)}\)"
    with pytest.raises(InputError, match=refused) as refusal, Workdir(tmp_path / "run").locked():
        pass
    assert refusal.value.fix.startswith(fix)


def test_owner_file_excludes_who_has_flock(tmp_path, monkeypatch):
    """Another host has mounted the folder without locks."""
    owner(tmp_path / "lock.owner")
    with monkeypatch.context() as patch:
        heartbeats(patch, tmp_path / "lock.owner")
        with pytest.raises(locks.InUse), locks.locked(tmp_path / "lock"):
            pass
    monkeypatch.setattr(locks, "STALE_SECONDS", 0.2)
    with locks.locked(tmp_path / "lock"):  # its process has ended
        pass
    assert not (tmp_path / "lock.owner").exists()


def test_owner_file_left_long_ago_costs_no_wait(tmp_path, monkeypatch):
    """On a file system that has flock meanwhile."""
    owner(tmp_path / "lock.owner")
    os.utime(tmp_path / "lock.owner", (0, 0))
    monkeypatch.setattr(locks, "_wait", mock.Mock(side_effect=AssertionError("waits")))
    with locks.locked(tmp_path / "lock"):
        assert not (tmp_path / "lock.owner").exists()
        with pytest.raises(locks.InUse), locks.locked(tmp_path / "lock"):
            pass


def test_staging_folder_is_locked_as_a_workdir(tmp_path, flock, monkeypatch):
    """Its stale lock is opened again, and the owner file of a host without flock excludes."""
    flock(STALE)
    with staging_folder(tmp_path / "set"):
        pass
    owner(tmp_path / ".set.owner")
    heartbeats(monkeypatch, tmp_path / ".set.owner")
    with pytest.raises(InputError, match="by another process"), staging_folder(tmp_path / "set"):
        pass


def test_staging_folder_whose_lock_is_stale_is_locked_again(tmp_path, monkeypatch):
    """It was removed from another host, after this process had locked it."""
    stat, stale = type(tmp_path).stat, [STALE]

    def failing(path, **keywords):
        if stale and path.name == ".set.lock":
            raise stale.pop()
        return stat(path, **keywords)

    monkeypatch.setattr(type(tmp_path), "stat", failing)
    with staging_folder(tmp_path / "set") as staging:
        assert staging.is_dir() and not stale


def test_owner_file_whose_answer_was_lost_is_ours(tmp_path, no_flock, monkeypatch):
    """The request to link it was sent twice, and the second one finds the first one's file."""
    link = os.link

    def twice(*names):
        link(*names)
        link(*names)

    monkeypatch.setattr(locks.os, "link", twice)
    monkeypatch.setattr(locks, "_wait", mock.Mock(side_effect=locks.InUse))
    with locks.locked(tmp_path / "lock"):
        pass


def test_owner_file_replaced_from_another_host_is_read_again(tmp_path, no_flock, monkeypatch):
    owner(tmp_path / "lock.owner")
    monkeypatch.setattr(locks, "STALE_SECONDS", 0.1)
    fstat, stale = os.fstat, [STALE] * (locks.TRIES - 1)

    def failing(descriptor):
        if stale:
            raise stale.pop()
        return fstat(descriptor)

    monkeypatch.setattr(locks.os, "fstat", failing)
    with locks.locked(tmp_path / "lock"):
        assert not stale


@pytest.mark.parametrize("jump", [-86_400, 86_400])
def test_clock_of_the_server_jumps(tmp_path, no_flock, monkeypatch, jump):
    """A living owner keeps the lock, an ended one loses it within the same time."""
    now = locks._now
    monkeypatch.setattr(locks, "_now", lambda path: now(path) + jump)
    monkeypatch.setattr(locks, "STALE_SECONDS", 0.4)
    owner(tmp_path / "lock.owner")
    with monkeypatch.context() as patch:
        polls, sleep = mock.Mock(side_effect=range(6)), time.sleep  # and no more
        patch.setattr(locks.time, "sleep", lambda seconds: sleep(seconds + 0 * polls()))
        with locks.locked(tmp_path / "lock"):
            assert polls.called
    with monkeypatch.context() as patch:
        owner(tmp_path / "lock.owner")
        heartbeats(patch, tmp_path / "lock.owner")
        with pytest.raises(locks.InUse), locks.locked(tmp_path / "lock"):
            pass


def test_staging_folder_whose_lock_was_removed_is_locked_again(tmp_path, no_flock, monkeypatch):
    """Its last owner removed the lock after this process had opened it."""
    owned = locks.owner_file
    lock = tmp_path / ".set.lock"

    @contextlib.contextmanager
    def removed(path):
        monkeypatch.setattr(locks, "owner_file", owned)
        with owned(path):
            lock.unlink()
            yield

    monkeypatch.setattr(locks, "owner_file", removed)
    with staging_folder(tmp_path / "set") as staging:
        assert staging.is_dir() and lock.exists()
        with (
            pytest.raises(InputError, match="by another process"),
            staging_folder(tmp_path / "set"),
        ):
            pass
    assert not list(tmp_path.iterdir())


def test_workdir_waits_for_what_is_shown_late(tmp_path, monkeypatch):
    """The token that another host has just written."""
    workdir = Workdir(tmp_path)
    late = [STALE, FileNotFoundError(errno.ENOENT, "late")]
    read = type(tmp_path).read_text

    def read_text(path, *arguments, **keywords):
        if late and path.name == ".lock":
            raise late.pop()
        return read(path, *arguments, **keywords)

    monkeypatch.setattr("rdm_jax.workdir.time.sleep", lambda seconds: None)
    monkeypatch.setattr(type(tmp_path), "read_text", read_text)
    with workdir.locked():
        assert not late


def test_workdir_whose_lock_cannot_be_read_says_why(tmp_path, monkeypatch):
    """It may well be the same folder for every process."""

    def failing(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(type(tmp_path), "read_text", failing)
    monkeypatch.setattr("rdm_jax.workdir.time.sleep", lambda seconds: None)
    with pytest.raises(PermissionError), Workdir(tmp_path).locked():
        pass
