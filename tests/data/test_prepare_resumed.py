"""Preparation, interrupted and in parallel: atomic, and the same to the last bit."""

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from unittest import mock

import pytest
import tensorflow_datasets as tfds

from rdm_jax.data import prepare as prepare_lib
from rdm_jax.data import readers, write_shards
from rdm_jax.data.image_sets import open_prepared
from rdm_jax.data.images import ImageSpec
from rdm_jax.data.prepare import prepare
from rdm_jax.data.records import Encoding
from rdm_jax.runtime import locks
from rdm_jax.runtime.errors import InputError
from tests.support.small_folder import FORM, files, flip_bit


def test_damaged_image_leaves_no_set(folder, tmp_path):
    whole = (folder / "dog" / "1.png").read_bytes()
    (folder / "dog" / "1.png").write_bytes(b"not a picture")
    with pytest.raises(InputError, match="dog/1.png"):
        prepare(f"folder:{folder}", tmp_path / "set", FORM)
    assert not (tmp_path / "set").exists()
    (folder / "dog" / "1.png").write_bytes(whole)
    assert len(open_prepared(prepare(f"folder:{folder}", tmp_path / "set", FORM))) == 7
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["images", "set"]


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("No space left on device")]
)
def test_full_disk_leaves_no_set(folder, tmp_path, monkeypatch, error):
    def fail(*args):
        raise error

    monkeypatch.setattr(tfds.core.file_adapters.ArrayRecordFileAdapter, "write_examples", fail)
    with pytest.raises(InputError, match="set cannot be written .*No space left"):
        prepare(f"folder:{folder}", tmp_path / "set", FORM)
    assert not (tmp_path / "set").exists()
    monkeypatch.undo()
    assert len(open_prepared(prepare(f"folder:{folder}", tmp_path / "set", FORM))) == 7
    assert not (tmp_path / ".set.incomplete").exists()


def test_second_process_is_refused(folder, tmp_path):
    with (tmp_path / ".set.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="set is being prepared by another process"):
            prepare(f"folder:{folder}", tmp_path / "set", FORM)
    prepare(f"folder:{folder}", tmp_path / "set", FORM)
    assert sorted(path.name for path in tmp_path.iterdir()) == [folder.name, "set"]


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP])
def test_prepare_without_flock(folder, tmp_path, monkeypatch, number):
    monkeypatch.setattr(
        locks.fcntl, "flock", mock.Mock(side_effect=OSError(number, os.strerror(number)))
    )
    monkeypatch.setattr(locks, "HEARTBEAT_SECONDS", 0.01)
    monkeypatch.setattr(locks, "POLL_SECONDS", 0.2)
    with (
        locks.owner_file(tmp_path / ".set.owner"),
        pytest.raises(InputError, match="set is being prepared by another process"),
    ):
        prepare(f"folder:{folder}", tmp_path / "set", FORM)
    prepare(f"folder:{folder}", tmp_path / "set", FORM)
    assert sorted(path.name for path in tmp_path.iterdir()) == [folder.name, "set"]


def test_processes_write_equal_files(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_lib, "SHARD_IMAGES", 1)
    one = files(prepare(f"folder:{folder}", tmp_path / "one", FORM))
    monkeypatch.setattr(write_shards, "ALONE_SECONDS", 0.0)
    monkeypatch.setattr(write_shards, "cores", lambda: 2)
    assert files(prepare(f"folder:{folder}", tmp_path / "several", FORM)) == one


def test_processes_name_damaged_images(folder, tmp_path, monkeypatch):
    (folder / "dog" / "1.png").write_bytes(b"not a picture")
    monkeypatch.setattr(prepare_lib, "SHARD_IMAGES", 4)
    monkeypatch.setattr(write_shards, "ALONE_SECONDS", 0.0)
    monkeypatch.setattr(write_shards, "cores", lambda: 2)
    with pytest.raises(InputError, match="dog/1.png"):
        prepare(f"folder:{folder}", tmp_path / "set", FORM)


def test_damaged_shard_is_written_again(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_lib, "SHARD_IMAGES", 2)
    wanted = files(prepare(f"folder:{folder}", tmp_path / "undisturbed", FORM))

    def stop_after(count):
        calls = iter([None] * (count - 1))

        def check():
            if next(calls, "stop"):
                raise KeyboardInterrupt

        return check

    with pytest.raises(KeyboardInterrupt):
        prepare(f"folder:{folder}", tmp_path / "set", FORM, check_stop=stop_after(3))
    finished = sorted((tmp_path / ".set.incomplete" / "parts").glob("*.array_record"))
    assert len(finished) == 3
    flip_bit(finished[0], 70_000)
    (folder / "dog" / "0.png").touch()  # of the second shard, which counts no more
    reads, load = [], readers.Folder.load
    monkeypatch.setattr(
        readers.Folder, "load", lambda self, name: reads.append(name) or load(self, name)
    )
    made = files(prepare(f"folder:{folder}", tmp_path / "set", FORM))
    assert (
        made.pop("source.npz") != wanted.pop("source.npz") and made == wanted
    )  # a file was touched in between
    assert reads == ["cat/0.png", "cat/1.png", "cat/2.png", "dog/0.png", "dog/3.png"]


def test_skip_bad_reuses_shards_of_a_refused_run(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_lib, "SHARD_IMAGES", 2)
    (folder / "dog" / "3.png").write_bytes(b"not a picture")
    with pytest.raises(InputError, match="dog/3.png"):
        prepare(f"folder:{folder}", tmp_path / "set", FORM)
    reads, load = [], readers.Folder.load
    monkeypatch.setattr(
        readers.Folder, "load", lambda self, name: reads.append(name) or load(self, name)
    )
    assert (
        len(
            open_prepared(
                prepare(f"folder:{folder}", tmp_path / "set", FORM, skip_bad=True, max_left_out=0.5)
            )
        )
        == 6
    )
    assert reads == ["dog/3.png"]


@pytest.mark.parametrize("change", ["labels", "form", "encoding", "place", "versions"])
def test_shards_of_other_settings_are_not_reused(folder, tmp_path, monkeypatch, change):
    """The same files with equal stamps in the staging folder, except for one setting."""
    for i, file in enumerate(sorted(folder.rglob("*.png"))):
        os.utime(file, ns=(i, i))

    def labelled(shift, form=FORM, encoding=prepare_lib.DEFAULT_ENCODING, root=folder):
        names = [file.relative_to(root).as_posix() for file in sorted(root.rglob("*.png"))]
        labels = [[name, (i + shift) % 2] for i, name in enumerate(names)]
        (root / "dataset.json").write_text(json.dumps({"labels": labels}))
        return lambda **kwargs: prepare(
            f"folder:{root}", tmp_path / "set", form, encoding=encoding, **kwargs
        )

    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        labelled(0)(check_stop=stop)
    other = shutil.copytree(folder, tmp_path / "other")
    reads, load = [], readers.Folder.load
    monkeypatch.setattr(
        readers.Folder, "load", lambda self, name: reads.append(name) or load(self, name)
    )
    if change == "versions":
        monkeypatch.setattr("rdm_jax.__version__", "9")
    again = {
        "labels": lambda: labelled(1),
        "form": lambda: labelled(0, form=ImageSpec(8, 6, channels=1)),
        "encoding": lambda: labelled(0, encoding=Encoding("raw")),
        "place": lambda: labelled(0, root=other),
        "versions": lambda: labelled(0),
    }[change]()
    images = open_prepared(again())
    assert len(reads) == 7
    assert images.batch(range(7))["label"].tolist() == [
        (i + (change == "labels")) % 2 for i in range(7)
    ]


def test_set_prepared_meanwhile_is_used(folder, tmp_path, monkeypatch):
    """Another process finishes between the first check and the lock."""
    lock, calls = locks.try_flock, []

    def slow(descriptor):
        if not calls:
            calls.append(1)
            prepare(f"folder:{folder}", tmp_path / "set", FORM)
        return lock(descriptor)

    monkeypatch.setattr(locks, "try_flock", slow)
    monkeypatch.setattr(prepare_lib, "_log_made", lambda *args: None)
    assert len(open_prepared(prepare(f"folder:{folder}", tmp_path / "set", FORM))) == 7
    assert not (tmp_path / ".set.incomplete").exists()


def test_leftovers_are_removed(folder, tmp_path):
    prepare(f"folder:{folder}", tmp_path / "set", FORM)
    (tmp_path / ".set.incomplete" / "parts").mkdir(parents=True)
    prepare(f"folder:{folder}", tmp_path / "set", FORM)
    assert not (tmp_path / ".set.incomplete").exists()


# Stops at one image, so that a kill falls between shards that are written and others that are not.
# Processes that it starts read this file as well.
SLOW = """
import sys, time
from rdm_jax.data import images, prepare, readers, write_shards
load = readers.Folder.load
def slow(self, name):
    if name == "dog/2.png":
        print("half way", flush=True, file=sys.stderr)
        time.sleep(60)
    return load(self, name)
readers.Folder.load = slow
if __name__ == "__main__":
    processes = int(sys.argv[3])
    prepare.SHARD_IMAGES = 2
    write_shards.ALONE_SECONDS = 60.0 * (processes == 1)
    write_shards.cores = lambda: processes
    prepare.prepare(sys.argv[1], sys.argv[2], images.ImageSpec(8, 6))
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_run_resumes_bit_for_bit(folder, tmp_path, monkeypatch, processes):
    monkeypatch.setattr(prepare_lib, "SHARD_IMAGES", 2)
    undisturbed = files(prepare(f"folder:{folder}", tmp_path / "undisturbed", FORM))
    (tmp_path / "slow.py").write_text(SLOW)
    command = [
        sys.executable,
        tmp_path / "slow.py",
        f"folder:{folder}",
        tmp_path / "set",
        f"{processes}",
    ]
    environment, began = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, time.monotonic()
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert any("half way" in line for line in process.stderr)
        process.send_signal(signal.SIGKILL)
        process.stderr.read()  # to the end, which comes when all that could write to it are gone
    assert process.returncode == -signal.SIGKILL and time.monotonic() - began < 50
    assert list((tmp_path / ".set.incomplete").rglob("*.array_record"))  # It was writing,
    assert not (tmp_path / "set").exists()  # and what it wrote passes for nothing.
    with pytest.raises(InputError, match="no prepared data"):
        open_prepared(tmp_path / "set")
    assert files(prepare(f"folder:{folder}", tmp_path / "set", FORM)) == undisturbed
    assert not (tmp_path / ".set.incomplete").exists()
