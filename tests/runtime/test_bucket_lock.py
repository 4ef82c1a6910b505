"""The lock of a folder of a bucket."""

import getpass
import json
import os
import subprocess
import sys
import threading
from unittest import mock

import pytest

from rdm_jax.runtime import bucket_lock, locks, mounts
from rdm_jax.runtime.errors import InputError
from rdm_jax.workdir import Workdir


@pytest.fixture
def folder(store):
    """The folder of a lock."""
    return mounts.any_path(store.url("run/.lock"))


@pytest.fixture
def quick(monkeypatch):
    """Heartbeats every 0.1 s, stale after 0.5 s."""
    monkeypatch.setattr(locks, "HEARTBEAT_SECONDS", 0.1)
    monkeypatch.setattr(locks, "STALE_SECONDS", 0.5)


def left_by(folder, number: int = 1, **owner) -> None:
    """Writes the lock of another run."""
    (folder / str(number)).write_text(json.dumps({"host": "other", "process": 1, **owner}))


def ended_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_locked_excludes_names_its_owner_and_is_released(store, monkeypatch):
    monkeypatch.setattr(locks, "HEARTBEAT_SECONDS", 0.1)
    workdir = Workdir(store.url("run"))
    with workdir.locked(), pytest.raises(InputError) as refusal, workdir.locked():
        pass
    said = str(refusal.value)
    assert f"--workdir='{store.url('run')}' is in use by another run (process " in said
    assert f"the lock is {store.url('run/.lock/1')}" in said
    with workdir.locked():
        assert store.names("run/.lock/") == ["run/.lock/1", "run/.lock/token"]
    assert store.names("run/.lock/") == ["run/.lock/token"]


def test_locked_is_taken_over_from_an_ended_process(folder, store):
    left_by(folder, host=locks.host(), process=ended_process())
    with bucket_lock.locked(folder) as owned:
        assert owned == folder / "2" and store.names("run/.lock/") == ["run/.lock/2"]


def test_locked_is_taken_over_though_another_process_has_the_number(folder, quick):
    """As of a container that was killed and started again: its processes are the same numbers."""
    left_by(folder, host=locks.host(), process=os.getpid())
    with bucket_lock.locked(folder) as owned:
        assert owned == folder / "2"


@pytest.mark.parametrize("error", [KeyError, OSError])
def test_locked_by_a_user_without_a_name(folder, monkeypatch, error):
    monkeypatch.setattr(getpass, "getuser", mock.Mock(side_effect=error))
    with bucket_lock.locked(folder) as owned:
        assert json.loads(owned.read_text())["user"] == str(os.getuid())


def test_locked_waits_for_the_heartbeat_of_another_host(folder, quick):
    left_by(folder)
    with bucket_lock.locked(folder) as owned:  # which had none
        assert owned.name == "2"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(locks, "host", lambda: "another")
            with pytest.raises(locks.InUse, match="lock/2"), bucket_lock.locked(folder):
                pass


def test_of_many_that_take_over_one_holds_the_lock(folder, quick):
    left_by(folder)
    refused, held = [], []
    everyone = threading.Barrier(6, timeout=60)

    def take() -> None:
        try:
            with bucket_lock.locked(folder):
                held.append(1)
                everyone.wait()
        except locks.InUse:
            refused.append(1)
            everyone.wait()

    threads = [threading.Thread(target=take) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(held), len(refused)) == (1, 5)


def test_a_lock_that_another_run_has_taken_is_not_rewritten(folder, quick, caplog):
    with bucket_lock.locked(folder):
        left_by(folder, 2)
        while "another run has taken the lock" not in caplog.text:
            threading.Event().wait(0.05)
    assert json.loads((folder / "2").read_text())["host"] == "other"


@pytest.mark.parametrize("number", [None, 2])
def test_a_run_that_has_lost_its_lock_writes_nothing_more(store, quick, caplog, number):
    """Another one has taken it, or somebody has deleted it."""
    workdir = Workdir(store.url("run"))
    folder = mounts.any_path(store.url("run/.lock"))
    with pytest.raises(InputError) as refusal, workdir.locked():
        if number:
            left_by(folder, number)
        while "another run has taken the lock" not in caplog.text:
            if not number:  # a heartbeat at this moment would write it again
                (folder / "1").unlink(missing_ok=True)
            threading.Event().wait(0.05)
        (workdir.path / "config.json").write_text("{}")
        with pytest.raises(InputError):
            mounts.check_owned(workdir.checkpoints(1))
    assert f"{store.url('run')} is not written any more" in str(refusal.value)
    assert ("process 1 on other" if number else "whoever removed it") in str(refusal.value)
    assert "run/config.json" not in store.names("run/")
    if number:
        (folder / str(number)).unlink()
    with workdir.locked():
        pass
    assert "run/config.json" in store.names("run/")


def test_an_unwritable_bucket_is_refused(store):
    workdir = Workdir(store.url("run"))
    store.server.answer = lambda method, path: 403 if method == "POST" else 0
    refused = pytest.raises(InputError, match="cannot be written .*roles/storage.objectAdmin")
    with refused, workdir.locked():
        pass
