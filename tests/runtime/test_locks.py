"""Locks of folders: by flock, or by an owner file where the file system has no flock."""

import contextlib
import errno
import json
import os
import socket
import subprocess
import sys
import threading
import time
from unittest import mock

import pytest

from rdm_jax.modes import run
from rdm_jax.runtime import locks
from tests.support.configs import tiny_config

NO_LOCKS = [errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP]


@pytest.fixture(params=NO_LOCKS, ids=errno.errorcode.get)
def no_flock(request, monkeypatch):
    """A file system without flock: the errors it gives."""
    monkeypatch.setattr(
        locks.fcntl,
        "flock",
        mock.Mock(side_effect=OSError(request.param, os.strerror(request.param))),
    )


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Short heartbeats and polls."""
    monkeypatch.setattr(locks, "HEARTBEAT_SECONDS", 0.01)
    monkeypatch.setattr(locks, "POLL_SECONDS", 0.2)


def check_excludes(path):
    with locks.locked(path), pytest.raises(locks.InUse), locks.locked(path):
        pass
    with locks.locked(path):
        pass


def test_locked_excludes_by_flock(tmp_path):
    check_excludes(tmp_path / "lock")
    assert [each.name for each in tmp_path.iterdir()] == ["lock"]


def test_locked_excludes_by_owner_file(tmp_path, no_flock):
    check_excludes(tmp_path / "lock")
    assert [each.name for each in tmp_path.iterdir()] == ["lock"]


def owner(path, **fields):
    path.write_text(
        json.dumps({"host": locks.host(), "process": os.getpid(), "id": "theirs", **fields})
    )


@contextlib.contextmanager
def beating(path, **fields):
    """Another process's owner file, with its heartbeat."""
    owner(path, **fields)
    ended = threading.Event()
    thread = threading.Thread(target=locks._beat, args=(path, path.read_text(), ended))
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def test_owner_file_of_ended_process_is_taken_over(tmp_path, no_flock):
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    owner(tmp_path / "lock.owner", process=ended.pid)
    check_excludes(tmp_path / "lock")


@pytest.mark.parametrize(
    "others", [{"host": "another"}, {"host": f"{socket.gethostname()} pid:[1]"}]
)
def test_owner_file_of_another_host_is_judged_by_its_heartbeat(
    tmp_path, no_flock, monkeypatch, others
):
    """It is taken over once it is stale, without another call."""
    with (
        beating(tmp_path / "lock.owner", **others),
        pytest.raises(locks.InUse),
        locks.locked(tmp_path / "lock"),
    ):
        pass
    monkeypatch.setattr(locks, "STALE_SECONDS", 0.5)
    began = time.monotonic()
    check_excludes(tmp_path / "lock")
    assert time.monotonic() - began > 0.3


def test_owner_file_stale_is_taken_over_by_one_process(tmp_path, no_flock, monkeypatch):
    """The second judges it before, and moves it after, the first has taken it over."""
    owner(tmp_path / "lock.owner", host="another")
    wait, inside = locks._wait, contextlib.ExitStack()

    def slow(path, seen):
        wait(path, seen)
        monkeypatch.setattr(locks, "_wait", wait)
        inside.enter_context(locks.locked(tmp_path / "lock"))

    monkeypatch.setattr(locks, "STALE_SECONDS", 0.1)
    monkeypatch.setattr(locks, "_wait", slow)
    with inside, pytest.raises(locks.InUse), locks.locked(tmp_path / "lock"):
        pass
    assert [each.name for each in tmp_path.iterdir()] == ["lock"]


def test_owner_file_is_touched_regularly(tmp_path, no_flock):
    with locks.locked(tmp_path / "lock"):
        os.utime(tmp_path / "lock.owner", (0, 0))
        for _ in range(500):
            time.sleep(0.01)
            if (tmp_path / "lock.owner").stat().st_mtime:
                break
        assert (tmp_path / "lock.owner").stat().st_mtime > 0


def test_run_locks_its_workdir_without_flock(image_folder, tmp_path, no_flock, caplog):
    config = tiny_config(image_folder).to_config_dict()
    run(config, str(tmp_path / "run"), mode="prepare")
    assert "has no flock" in caplog.text and not (tmp_path / "run/.lock.owner").exists()
    with (
        beating(tmp_path / "run/.lock.owner"),
        pytest.raises(ValueError, match="in use by another run"),
    ):
        run(config, str(tmp_path / "run"), mode="prepare")
