"""Locks of folders: by flock, and where a file system has none, by a file that names its owner."""

import errno
import json
import os
import socket
import subprocess
import sys
import time
from unittest import mock

import pytest

from rdm_jax import locks
from rdm_jax.run import run
from tests.tiny import tiny_config

NO_LOCKS = [errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP]


@pytest.fixture(params=NO_LOCKS, ids=errno.errorcode.get)
def no_flock(request, monkeypatch):
    """A file system without flock, as it answers."""
    monkeypatch.setattr(locks.fcntl, "flock", mock.Mock(side_effect=OSError(request.param, os.strerror(request.param))))


def check_excludes(path):
    with locks.locked(path), pytest.raises(locks.InUse), locks.locked(path):
        pass
    with locks.locked(path):
        pass


def test_flock_excludes(tmp_path):
    check_excludes(tmp_path / "lock")
    assert [each.name for each in tmp_path.iterdir()] == ["lock"]


def test_owner_file_excludes(tmp_path, no_flock):
    check_excludes(tmp_path / "lock")
    assert [each.name for each in tmp_path.iterdir()] == ["lock"]


def owner(path, **fields):
    path.write_text(json.dumps({"host": socket.gethostname(), "process": os.getpid(), "id": "theirs", **fields}))


def test_owner_file_of_a_process_that_is_gone_is_taken_over(tmp_path, no_flock):
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    owner(tmp_path / "lock.owner", process=ended.pid)
    check_excludes(tmp_path / "lock")


def test_owner_file_of_another_host_is_taken_over_once_it_is_old(tmp_path, no_flock):
    owner(tmp_path / "lock.owner", host="another")
    with pytest.raises(locks.InUse), locks.locked(tmp_path / "lock"):
        pass
    old = (tmp_path / "lock").stat().st_mtime - locks.STALE_SECONDS - 10
    os.utime(tmp_path / "lock.owner", (old, old))
    check_excludes(tmp_path / "lock")


def test_owner_file_is_kept_young(tmp_path, no_flock, monkeypatch):
    monkeypatch.setattr(locks, "HEARTBEAT_SECONDS", 0.01)
    with locks.locked(tmp_path / "lock"):
        os.utime(tmp_path / "lock.owner", (0, 0))
        for _ in range(500):
            time.sleep(0.01)
            if (tmp_path / "lock.owner").stat().st_mtime:
                break
        assert (tmp_path / "lock.owner").stat().st_mtime > 0


def test_run_goes_on_without_flock_and_refuses_a_second_one(images, tmp_path, no_flock, caplog):
    config = tiny_config(images).to_config_dict()
    run(config, str(tmp_path / "run"), mode="prepare")
    assert "no locks (flock)" in caplog.text and not (tmp_path / "run/.lock.owner").exists()
    owner(tmp_path / "run/.lock.owner", process=os.getppid())
    with pytest.raises(ValueError, match="in use by another run"):
        run(config, str(tmp_path / "run"), mode="prepare")
