"""What is saved while images are measured: found again, or removed."""

import errno

import pytest

from rdm_jax.evaluation import gathering
from rdm_jax.evaluation.gathering import Gatherer
from rdm_jax.runtime import distributed
from rdm_jax.runtime.errors import Interrupted
from rdm_jax.runtime.signals import StopOnSignal
from tests.support.measured_images import COUNT, RandomStream, gathered, space


def stopped(folder):
    """Measures 32 of the images."""
    with pytest.raises(Interrupted):
        gathered(folder, stops=30)


def test_damaged_save_of_other_processes_is_tried_once(tmp_path):
    stopped(tmp_path)
    (saved,) = tmp_path.glob(".gathered-*.npz")
    prefix = saved.name.partition("-at-")[0]
    for part in range(2):
        (tmp_path / f"{prefix}-at-64-{part}-of-2.npz").write_bytes(b"PK")
    (tmp_path / f"{prefix}.npz").write_bytes(b"of an earlier version")
    stopped(tmp_path)  # begins again, and saves less than the damaged file has
    assert [*tmp_path.iterdir()] == [saved]
    assert gathered(tmp_path)[1] == list(range(32, COUNT))


def test_all_that_was_saved_is_removed_at_the_end(tmp_path):
    stream = RandomStream(StopOnSignal())
    stopped(tmp_path)
    (saved,) = tmp_path.iterdir()
    saved.with_name(saved.name.partition("-at-")[0] + ".npz").touch()
    Gatherer(space(), 20, StopOnSignal()).remove_saved(stream, tmp_path)
    assert not [*tmp_path.iterdir()]


def test_file_that_appears_late_is_waited_for(tmp_path, monkeypatch):
    """As of another host on a network file system, which shows it after a while."""
    stopped(tmp_path)
    (saved,) = tmp_path.iterdir()
    hidden = tmp_path / "hidden"
    saved.rename(hidden)
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        if len(slept) == 3:
            hidden.rename(saved)

    monkeypatch.setattr(gathering.time, "sleep", sleep)
    monkeypatch.setattr(gathering._Files, "newest", lambda _: (32, 1))
    assert gathered(tmp_path)[1] == list(range(32, COUNT))
    assert len(slept) == 3


def test_error_of_a_disk_fails_in_all_processes(tmp_path, monkeypatch):
    stopped(tmp_path)
    told = []

    def broken(*_):
        raise OSError(errno.EIO, "Input/output error")

    together = distributed.raise_together

    def entered(what="", **_):
        told.append(what)
        return together(what)

    monkeypatch.setattr(gathering, "_restore", broken)
    monkeypatch.setattr(distributed, "raise_together", entered)
    with pytest.raises(OSError, match="Input/output"):
        gathered(tmp_path)
    assert told[-1] == "the other processes, which read what was gathered"
