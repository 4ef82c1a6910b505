"""Preparing: written once, whole or not at all, and readable by tensorflow-datasets."""

import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from rdm_jax.data import prepare as prepare_lib
from rdm_jax.data import readers
from rdm_jax.data.image_sets import open_prepared
from rdm_jax.data.images import Form
from rdm_jax.data.prepare import prepare
from rdm_jax.data.records import Encoding
from rdm_jax.errors import InputError

FORM = Form(8, 6)


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
    path = prepare(f"folder:{folder}", tmp_path / "set", FORM)
    builder = tfds.builder_from_directory(path)
    records = builder.as_data_source("train")
    assert builder.info.features["label"].names == ["cat", "dog"]
    assert [record["label"] for record in records] == [0, 0, 0, 1, 1, 1, 1]
    for record in records:
        expected = np.asarray(Image.open(folder / record["name"].decode()))
        np.testing.assert_array_equal(record["image"], expected)


def test_a_flat_folder_is_prepared_without_labels(folder, tmp_path):
    path = prepare(f"folder:{folder}/cat", tmp_path / "set", FORM)
    assert set(tfds.builder_from_directory(path).info.features) == {"image", "name"}


def test_many_shards_keep_the_order(folder, tmp_path, monkeypatch):
    one = open_prepared(prepare(f"folder:{folder}", tmp_path / "one", FORM))
    monkeypatch.setattr(prepare_lib, "SHARD_IMAGES", 2)
    path = prepare(f"folder:{folder}", tmp_path / "many", FORM)
    assert len(list(path.glob("*.array_record*"))) == 4
    many, indices = open_prepared(path), np.arange(7)
    np.testing.assert_array_equal(many.batch(indices)["image"], one.batch(indices)["image"])
    np.testing.assert_array_equal(many.batch(indices)["label"], one.batch(indices)["label"])


def test_preparing_again_does_nothing(folder, tmp_path, capfd):
    path = prepare(f"folder:{folder}", tmp_path / "set", FORM)
    before = {file.name: file.stat().st_mtime_ns for file in path.iterdir()}
    for file in folder.rglob("*.png"):
        file.unlink()  # Not even the source is looked at.
    capfd.readouterr()
    assert prepare(f"folder:{folder}", tmp_path / "set", FORM) == path
    assert {file.name: file.stat().st_mtime_ns for file in path.iterdir()} == before
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "field, change",
    [
        ("source", {"spec": "digits"}),
        ("height", {"form": Form(9, 6)}),
        ("width", {"form": Form(8, 5)}),
        ("channels", {"form": Form(8, 6, channels=1)}),
        ("background", {"form": Form(8, 6, background=(0, 0, 0))}),
        ("crop", {"form": Form(8, 6, crop="adm")}),
        ("encoding", {"encoding": Encoding("raw")}),
        ("quality", {"encoding": Encoding("jpeg", 90)}),
    ],
)
def test_other_settings_are_refused_by_name_and_change_nothing(folder, tmp_path, field, change):
    settings = {"spec": f"folder:{folder}", "directory": tmp_path / "set", "form": FORM}
    before = files(prepare(**settings))
    with pytest.raises(InputError, match=f"{field}=.*, not "):
        prepare(**(settings | change))
    assert files(tmp_path / "set") == before


def test_what_else_is_in_the_directory_is_refused_and_kept(folder, tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="set is there and is no prepared data"):
        prepare(f"folder:{folder}", tmp_path / "set", FORM)
    assert (tmp_path / "set" / "thesis.tex").read_text() == "years of work"


def test_an_empty_directory_is_filled(folder, tmp_path):
    (tmp_path / "set").mkdir()
    assert len(open_prepared(prepare(f"folder:{folder}", tmp_path / "set", FORM))) == 7


@pytest.mark.parametrize(
    "field, form, encoding",
    [
        ("height", Form(0, 6), Encoding()),
        ("width", Form(8, -1), Encoding()),
        ("channels", Form(8, 6, channels=2), Encoding()),
        ("background", Form(8, 6, background=(0, 0, 256)), Encoding()),
        ("background", Form(8, 6, background=(0,)), Encoding()),
        ("crop", Form(8, 6, crop="stretch"), Encoding()),
        ("encoding", FORM, Encoding("gif")),
        ("quality", FORM, Encoding("jpeg", 0)),
    ],
)
def test_impossible_settings_are_refused_by_name(folder, tmp_path, field, form, encoding):
    with pytest.raises(InputError, match=field):
        prepare(f"folder:{folder}", tmp_path / "set", form, encoding=encoding)
    assert not (tmp_path / "set").exists()


def test_a_damaged_image_is_refused_by_name_and_nothing_passes_for_a_set(folder, tmp_path):
    whole = (folder / "dog" / "1.png").read_bytes()
    (folder / "dog" / "1.png").write_bytes(b"not a picture")
    with pytest.raises(InputError, match="dog/1.png"):
        prepare(f"folder:{folder}", tmp_path / "set", FORM)
    assert not (tmp_path / "set").exists()
    (folder / "dog" / "1.png").write_bytes(whole)
    assert len(open_prepared(prepare(f"folder:{folder}", tmp_path / "set", FORM))) == 7
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["images", "set"]


def test_a_directory_that_cannot_be_made_is_refused(folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file/set cannot be written"):
        prepare(f"folder:{folder}", tmp_path / "file" / "set", FORM)


def test_too_little_space_is_refused_before_writing(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_lib.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10}))
    with pytest.raises(InputError, match="set cannot be written .* MB free"):
        prepare(f"folder:{folder}", tmp_path / "set", FORM)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("No space left on device")])
def test_a_disk_that_fills_up_is_reported_and_leaves_nothing(folder, tmp_path, monkeypatch, error):
    def fail(*args):
        raise error

    monkeypatch.setattr(tfds.core.file_adapters.ArrayRecordFileAdapter, "write_examples", fail)
    with pytest.raises(InputError, match="set cannot be written .*No space left"):
        prepare(f"folder:{folder}", tmp_path / "set", FORM)
    assert not (tmp_path / "set").exists()
    monkeypatch.undo()
    assert len(open_prepared(prepare(f"folder:{folder}", tmp_path / "set", FORM))) == 7
    assert not (tmp_path / ".set.incomplete").exists()


def test_a_second_process_is_told_to_wait(folder, tmp_path):
    (tmp_path / ".set.incomplete").mkdir()
    descriptor = os.open(tmp_path / ".set.incomplete", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(InputError, match="set is being prepared by another process"):
        prepare(f"folder:{folder}", tmp_path / "set", FORM)
    os.close(descriptor)
    prepare(f"folder:{folder}", tmp_path / "set", FORM)


def test_progress_is_the_only_output_and_in_lines(folder, tmp_path, capfd):
    prepare(f"folder:{folder}", tmp_path / "set", FORM)
    out, err = capfd.readouterr()
    assert out == ""
    lines = err.replace("\r", "").split("\n")
    assert "7/7 images" in err and all(line.startswith("preparing folder:") for line in lines if line.strip())


def test_the_manifest_tells_what_the_set_is_and_how_it_was_made(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_lib, "SHARD_IMAGES", 3)
    path = prepare(f"folder:{folder}", tmp_path / "set", FORM)
    manifest = json.loads((path / "manifest.json").read_text())
    assert (manifest["count"], manifest["classes"], manifest["skipped"]) == (7, {"cat": 3, "dog": 4}, {})
    assert manifest["settings"]["source"] == f"folder:{folder}" and manifest["settings"]["crop"] == "lanczos"
    assert [shard["records"] for shard in manifest["shards"]] == [3, 2, 2]
    for shard in manifest["shards"]:
        content = (path / shard["file"]).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (shard["bytes"], shard["sha256"])
    assert manifest["made_by"].keys() == {"rdm_jax", "array_record", "pillow", "tensorflow-datasets"}


@pytest.mark.parametrize("kind, furthest", [("png", 0), ("raw", 0), ("jpeg", 40)])
def test_every_encoding_is_read_back_here_and_by_tensorflow_datasets(folder, tmp_path, kind, furthest):
    wanted = [np.asarray(Image.open(file)).astype(int) for file in sorted(folder.rglob("*.png"))]
    path = prepare(f"folder:{folder}", tmp_path / "set", FORM, encoding=Encoding(kind, 100))
    ours, theirs = open_prepared(path), tfds.builder_from_directory(path).as_data_source("train")
    for i, pixels in enumerate(wanted):
        for found in (ours[i]["image"], theirs[i]["image"]):
            assert found.shape == (8, 6, 3) and np.abs(found - pixels).max() <= furthest


def test_processes_write_the_same_files(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_lib, "SHARD_IMAGES", 1)
    one = files(prepare(f"folder:{folder}", tmp_path / "one", FORM))
    monkeypatch.setattr(prepare_lib, "ALONE_SECONDS", 0.0)
    monkeypatch.setattr(prepare_lib, "cores", lambda: 2)
    assert files(prepare(f"folder:{folder}", tmp_path / "several", FORM)) == one


def test_a_damaged_image_in_another_process_is_refused_by_name(folder, tmp_path, monkeypatch):
    (folder / "dog" / "1.png").write_bytes(b"not a picture")
    monkeypatch.setattr(prepare_lib, "SHARD_IMAGES", 4)
    monkeypatch.setattr(prepare_lib, "ALONE_SECONDS", 0.0)
    monkeypatch.setattr(prepare_lib, "cores", lambda: 2)
    with pytest.raises(InputError, match="dog/1.png"):
        prepare(f"folder:{folder}", tmp_path / "set", FORM)


def test_what_cannot_be_used_is_left_out_and_listed_where_that_is_asked_for(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_lib, "SHARD_IMAGES", 3)  # The first shard is left without a record.
    for name in ("cat/0", "cat/1", "cat/2", "dog/1"):
        (folder / f"{name}.png").write_bytes(b"not a picture")
    (folder / "dog" / "notes.txt").write_text("not even meant as one")
    path = prepare(f"folder:{folder}", tmp_path / "set", FORM, skip_bad=True)
    skipped = json.loads((path / "manifest.json").read_text())["skipped"]
    assert skipped.keys() == {"cat/0.png", "cat/1.png", "cat/2.png", "dog/1.png", "dog/notes.txt"}
    assert "not an image" in skipped["dog/notes.txt"] and "cannot be decoded" in skipped["dog/1.png"]
    images = open_prepared(path)
    assert images.batch(range(len(images)))["label"].tolist() == [1, 1, 1]
    wanted = [np.asarray(Image.open(folder / "dog" / f"{i}.png")) for i in (0, 2, 3)]
    np.testing.assert_array_equal(images.batch(range(3))["image"], wanted)
    assert [record["label"] for record in tfds.builder_from_directory(path).as_data_source("train")] == [1, 1, 1]


def test_a_set_of_nothing_that_can_be_used_is_refused(folder, tmp_path):
    for file in folder.rglob("*.png"):
        file.write_bytes(b"not a picture")
    with pytest.raises(InputError, match="no image of folder:.* can be used"):
        prepare(f"folder:{folder}", tmp_path / "set", FORM, skip_bad=True)
    assert not (tmp_path / "set").exists()


def test_a_file_that_cannot_be_read_is_no_bad_image(folder, tmp_path, monkeypatch):
    """A disk that goes away must not leave a set of what it had given before."""

    def gone(*args, **kwargs):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Image, "open", gone)
    with pytest.raises(InputError, match="Input/output error"):
        prepare(f"folder:{folder}", tmp_path / "set", FORM, skip_bad=True)


def flip_bit(file, place):
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def test_a_flipped_bit_in_a_finished_shard_is_found_when_asked_for(folder, tmp_path):
    path = prepare(f"folder:{folder}", tmp_path / "set", FORM)
    prepare(f"folder:{folder}", tmp_path / "set", FORM, verify=True)
    (shard,) = path.glob("*.array_record*")
    flip_bit(shard, 70_000)
    with pytest.raises(InputError, match=f"{shard.name} is not as it was written"):
        prepare(f"folder:{folder}", tmp_path / "set", FORM, verify=True)


def test_a_shard_that_was_damaged_in_the_meantime_is_written_again(folder, tmp_path, monkeypatch):
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
    monkeypatch.setattr(readers.Folder, "load", lambda self, name: reads.append(name) or load(self, name))
    assert files(prepare(f"folder:{folder}", tmp_path / "set", FORM)) == wanted
    assert reads == ["cat/0.png", "cat/1.png", "cat/2.png", "dog/0.png", "dog/3.png"]


def test_images_of_a_refused_run_are_not_read_again_when_bad_ones_may_be_left_out(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_lib, "SHARD_IMAGES", 2)
    (folder / "dog" / "3.png").write_bytes(b"not a picture")
    with pytest.raises(InputError, match="dog/3.png"):
        prepare(f"folder:{folder}", tmp_path / "set", FORM)
    reads, load = [], readers.Folder.load
    monkeypatch.setattr(readers.Folder, "load", lambda self, name: reads.append(name) or load(self, name))
    assert len(open_prepared(prepare(f"folder:{folder}", tmp_path / "set", FORM, skip_bad=True))) == 6
    assert reads == ["dog/3.png"]


@pytest.mark.parametrize("change", ["labels", "form", "encoding", "place", "versions"])
def test_shards_made_otherwise_are_not_used_again(folder, tmp_path, monkeypatch, change):
    """The same files in the staging folder, of the same stamps, but for one thing."""
    for i, file in enumerate(sorted(folder.rglob("*.png"))):
        os.utime(file, ns=(i, i))

    def labelled(shift, form=FORM, encoding=Encoding(), root=folder):  # noqa: B008
        names = [file.relative_to(root).as_posix() for file in sorted(root.rglob("*.png"))]
        labels = [[name, (i + shift) % 2] for i, name in enumerate(names)]
        (root / "dataset.json").write_text(json.dumps({"labels": labels}))
        return lambda **kwargs: prepare(f"folder:{root}", tmp_path / "set", form, encoding=encoding, **kwargs)

    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        labelled(0)(check_stop=stop)
    other = shutil.copytree(folder, tmp_path / "other")
    reads, load = [], readers.Folder.load
    monkeypatch.setattr(readers.Folder, "load", lambda self, name: reads.append(name) or load(self, name))
    if change == "versions":
        monkeypatch.setattr("rdm_jax.__version__", "9")
    again = {
        "labels": lambda: labelled(1),
        "form": lambda: labelled(0, form=Form(8, 6, channels=1)),
        "encoding": lambda: labelled(0, encoding=Encoding("raw")),
        "place": lambda: labelled(0, root=other),
        "versions": lambda: labelled(0),
    }[change]()
    images = open_prepared(again())
    assert len(reads) == 7
    assert images.batch(range(7))["label"].tolist() == [(i + (change == "labels")) % 2 for i in range(7)]


def test_where_there_are_no_hard_links_files_are_copied(folder, tmp_path, monkeypatch):
    wanted = files(prepare(f"folder:{folder}", tmp_path / "one", FORM))

    def fail(*args):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", fail)
    assert files(prepare(f"folder:{folder}", tmp_path / "other", FORM)) == wanted


def test_a_set_that_appears_while_one_waits_is_used(folder, tmp_path, monkeypatch):
    """Another process finishes between the first look and the lock."""
    lock, calls = prepare_lib._lock, []

    def slow(staging):
        if not calls:
            calls.append(1)
            prepare(f"folder:{folder}", tmp_path / "set", FORM)
        return lock(staging)

    monkeypatch.setattr(prepare_lib, "_lock", slow)
    monkeypatch.setattr(prepare_lib, "_log_made", lambda *args: None)
    assert len(open_prepared(prepare(f"folder:{folder}", tmp_path / "set", FORM))) == 7
    assert not (tmp_path / ".set.incomplete").exists()


def test_what_was_left_beside_a_finished_set_is_removed(folder, tmp_path):
    prepare(f"folder:{folder}", tmp_path / "set", FORM)
    (tmp_path / ".set.incomplete" / "parts").mkdir(parents=True)
    prepare(f"folder:{folder}", tmp_path / "set", FORM)
    assert not (tmp_path / ".set.incomplete").exists()


def test_a_mount_point_is_refused_at_once(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "ismount", lambda path: True)
    with pytest.raises(InputError, match="mounted"):
        prepare(f"folder:{folder}", tmp_path / "set", FORM)


def test_enlarged_images_are_counted(folder, tmp_path):
    manifest = json.loads((prepare(f"folder:{folder}", tmp_path / "set", Form(8, 7)) / "manifest.json").read_text())
    assert manifest["enlarged"] == 7
    manifest = json.loads((prepare(f"folder:{folder}", tmp_path / "smaller", Form(4, 3)) / "manifest.json").read_text())
    assert manifest["enlarged"] == 0


# Stops at one image, so that a kill surely falls between shards that are on the disk and others that are not. Processes
# that it starts read this file, too.
SLOW = """
import sys, time
from rdm_jax.data import images, prepare, readers
load = readers.Folder.load
def slow(self, name):
    if name == "dog/2.png":
        print("half way", flush=True, file=sys.stderr)
        time.sleep(60)
    return load(self, name)
readers.Folder.load = slow
if __name__ == "__main__":
    processes = int(sys.argv[3])
    prepare.SHARD_IMAGES, prepare.ALONE_SECONDS, prepare.cores = 2, 60.0 * (processes == 1), lambda: processes
    prepare.prepare(sys.argv[1], sys.argv[2], images.Form(8, 6))
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_killed_half_way_is_completed_bit_for_bit(folder, tmp_path, monkeypatch, processes):
    monkeypatch.setattr(prepare_lib, "SHARD_IMAGES", 2)
    undisturbed = files(prepare(f"folder:{folder}", tmp_path / "undisturbed", FORM))
    (tmp_path / "slow.py").write_text(SLOW)
    command = [sys.executable, tmp_path / "slow.py", f"folder:{folder}", tmp_path / "set", f"{processes}"]
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
