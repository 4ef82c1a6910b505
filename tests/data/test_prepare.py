"""Preparing: written once, whole or not at all, and readable by tensorflow-datasets."""

import fcntl
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from rdm_jax.data import prepare as prepare_lib
from rdm_jax.data.pipeline import open_prepared
from rdm_jax.data.prepare import prepare
from rdm_jax.errors import InputError

SETTINGS = {"height": 8, "width": 6, "channels": 3}


@pytest.fixture
def folder(tmp_path):
    """Seven images of the size itself, in two classes."""
    rng = np.random.default_rng(0)
    for name in ("cat/0", "cat/1", "cat/2", "dog/0", "dog/1", "dog/2", "dog/3"):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 6, 3), np.uint8)).save(tmp_path / "images" / f"{name}.png")
    return tmp_path / "images"


def files(directory):
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def test_tensorflow_datasets_reads_what_was_prepared(folder, tmp_path):
    path = prepare(f"folder:{folder}", tmp_path / "set", **SETTINGS)
    builder = tfds.builder_from_directory(path)
    records = builder.as_data_source("train")
    assert builder.info.features["label"].names == ["cat", "dog"]
    assert dict(builder.info.metadata)["spec"] == f"folder:{folder}"
    assert [record["label"] for record in records] == [0, 0, 0, 1, 1, 1, 1]
    for record in records:
        expected = np.asarray(Image.open(folder / record["name"].decode()))
        np.testing.assert_array_equal(record["image"], expected)


def test_a_flat_folder_is_prepared_without_labels(folder, tmp_path):
    path = prepare(f"folder:{folder}/cat", tmp_path / "set", **SETTINGS)
    assert set(tfds.builder_from_directory(path).info.features) == {"image", "name"}


def test_many_shards_keep_the_order(folder, tmp_path, monkeypatch):
    one = open_prepared(prepare(f"folder:{folder}", tmp_path / "one", **SETTINGS))
    monkeypatch.setattr(prepare_lib, "SHARD_BYTES", 300)
    path = prepare(f"folder:{folder}", tmp_path / "many", **SETTINGS)
    assert len(list(path.glob("*.array_record*"))) == 4
    many, indices = open_prepared(path), np.arange(7)
    np.testing.assert_array_equal(many.batch(indices)["image"], one.batch(indices)["image"])
    np.testing.assert_array_equal(many.batch(indices)["label"], one.batch(indices)["label"])


def test_preparing_again_does_nothing(folder, tmp_path, capfd):
    path = prepare(f"folder:{folder}", tmp_path / "set", **SETTINGS)
    before = {file.name: file.stat().st_mtime_ns for file in path.iterdir()}
    for file in folder.rglob("*.png"):
        file.unlink()  # Not even the source is looked at.
    capfd.readouterr()
    assert prepare(f"folder:{folder}", tmp_path / "set", **SETTINGS) == path
    assert {file.name: file.stat().st_mtime_ns for file in path.iterdir()} == before
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "change",
    [{"spec": "digits"}, {"height": 9}, {"width": 5}, {"channels": 1}, {"background": (0, 0, 0)}],
)
def test_other_settings_are_refused_by_name_and_change_nothing(folder, tmp_path, change):
    settings = {"spec": f"folder:{folder}", "directory": tmp_path / "set", **SETTINGS}
    before = files(prepare(**settings))
    with pytest.raises(InputError, match=f"{next(iter(change))}=.*, not "):
        prepare(**(settings | change))
    assert files(tmp_path / "set") == before


def test_what_else_is_in_the_directory_is_refused_and_kept(folder, tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="set is there and is no prepared data"):
        prepare(f"folder:{folder}", tmp_path / "set", **SETTINGS)
    assert (tmp_path / "set" / "thesis.tex").read_text() == "years of work"


def test_an_empty_directory_is_filled(folder, tmp_path):
    (tmp_path / "set").mkdir()
    assert len(open_prepared(prepare(f"folder:{folder}", tmp_path / "set", **SETTINGS))) == 7


@pytest.mark.parametrize(
    "change", [{"height": 0}, {"width": -1}, {"channels": 2}, {"background": (0, 0, 256)}, {"background": (0,)}]
)
def test_impossible_settings_are_refused_by_name(folder, tmp_path, change):
    with pytest.raises(InputError, match=next(iter(change))):
        prepare(f"folder:{folder}", tmp_path / "set", **(SETTINGS | change))
    assert not (tmp_path / "set").exists()


def test_a_damaged_image_leaves_nothing_behind(folder, tmp_path):
    (folder / "dog" / "1.png").write_bytes(b"not a picture")
    with pytest.raises(InputError, match="dog/1.png"):
        prepare(f"folder:{folder}", tmp_path / "set", **SETTINGS)
    assert [entry.name for entry in tmp_path.iterdir()] == ["images"]


def test_a_directory_that_cannot_be_made_is_refused(folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file/set cannot be written"):
        prepare(f"folder:{folder}", tmp_path / "file" / "set", **SETTINGS)


def test_too_little_space_is_refused_before_writing(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_lib.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10}))
    with pytest.raises(InputError, match="set cannot be written .* MB free"):
        prepare(f"folder:{folder}", tmp_path / "set", **SETTINGS)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("No space left on device")])
def test_a_disk_that_fills_up_is_reported_and_leaves_nothing(folder, tmp_path, monkeypatch, error):
    def fail(*args):
        raise error

    monkeypatch.setattr(tfds.core.file_adapters.ArrayRecordFileAdapter, "write_examples", fail)
    with pytest.raises(InputError, match="set cannot be written .*No space left"):
        prepare(f"folder:{folder}", tmp_path / "set", **SETTINGS)
    assert [entry.name for entry in tmp_path.iterdir()] == ["images"]


def test_a_second_process_is_told_to_wait(folder, tmp_path):
    (tmp_path / ".set.incomplete").mkdir()
    descriptor = os.open(tmp_path / ".set.incomplete", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(InputError, match="set is being prepared by another process"):
        prepare(f"folder:{folder}", tmp_path / "set", **SETTINGS)
    os.close(descriptor)
    prepare(f"folder:{folder}", tmp_path / "set", **SETTINGS)


def test_progress_is_the_only_output_and_in_lines(folder, tmp_path, capfd):
    prepare(f"folder:{folder}", tmp_path / "set", **SETTINGS)
    out, err = capfd.readouterr()
    assert out == ""
    lines = err.replace("\r", "").split("\n")
    assert "7/7 images" in err and all(line.startswith("preparing folder:") for line in lines if line.strip())


# Slows each image down, so that a kill surely falls between two shards that are on the disk and two that are not.
SLOW = """
import sys, time
from rdm_jax.data import prepare, sources
prepare.SHARD_BYTES = 300
read = sources.Source.read
def slow(self, index, **size):
    if index == 5:
        print('half way', flush=True, file=sys.stderr)
        time.sleep(60)
    return read(self, index, **size)
sources.Source.read = slow
prepare.prepare(sys.argv[1], sys.argv[2], height=8, width=6, channels=3)
"""


def test_a_run_killed_half_way_is_completed_bit_for_bit(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_lib, "SHARD_BYTES", 300)
    undisturbed = files(prepare(f"folder:{folder}", tmp_path / "undisturbed", **SETTINGS))
    command = [sys.executable, "-c", SLOW, f"folder:{folder}", str(tmp_path / "set")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert any("half way" in line for line in process.stderr)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert list((tmp_path / ".set.incomplete").rglob("*.array_record*"))  # It was writing,
    assert not (tmp_path / "set").exists()  # and what it wrote passes for nothing.
    with pytest.raises(InputError, match="no prepared data"):
        open_prepared(tmp_path / "set")
    assert files(prepare(f"folder:{folder}", tmp_path / "set", **SETTINGS)) == undisturbed
    assert not (tmp_path / ".set.incomplete").exists()
