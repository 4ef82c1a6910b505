"""Preparation: results, refusals, and reading by tensorflow-datasets."""

import hashlib
import json
import os
import shutil
import sys
import tempfile

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from rdm_jax.data import prepare as prepare_lib
from rdm_jax.data.image_sets import open_prepared
from rdm_jax.data.images import ImageSpec
from rdm_jax.data.prepare import prepare
from rdm_jax.data.records import Encoding
from rdm_jax.runtime.errors import InputError
from tests.support.small_folder import FORM, files, flip_bit


def test_prepared_set_is_read_by_tensorflow_datasets(folder, tmp_path):
    path = prepare(f"folder:{folder}", tmp_path / "set", FORM)
    builder = tfds.builder_from_directory(path)
    records = builder.as_data_source("train")
    assert builder.info.features["label"].names == ["cat", "dog"]
    assert [record["label"] for record in records] == [0, 0, 0, 1, 1, 1, 1]
    for record in records:
        expected = np.asarray(Image.open(folder / record["name"].decode()))
        np.testing.assert_array_equal(record["image"], expected)


def test_prepare_leaves_no_temporary_folder(folder, tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    prepare(f"folder:{folder}", tmp_path / "set", FORM)
    assert not list((tmp_path / "temporary").iterdir())


def test_flat_folder_is_prepared_without_labels(folder, tmp_path):
    path = prepare(f"folder:{folder}/cat", tmp_path / "set", FORM)
    assert set(tfds.builder_from_directory(path).info.features) == {"image", "name"}


def test_shards_keep_the_order(folder, tmp_path, monkeypatch):
    one = open_prepared(prepare(f"folder:{folder}", tmp_path / "one", FORM))
    monkeypatch.setattr(prepare_lib, "SHARD_IMAGES", 2)
    path = prepare(f"folder:{folder}", tmp_path / "many", FORM)
    assert len(list(path.glob("*.array_record*"))) == 4
    many, indices = open_prepared(path), np.arange(7)
    np.testing.assert_array_equal(many.batch(indices)["image"], one.batch(indices)["image"])
    np.testing.assert_array_equal(many.batch(indices)["label"], one.batch(indices)["label"])


def test_prepare_again_does_nothing(folder, tmp_path, capfd):
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
        ("height", {"form": ImageSpec(9, 6)}),
        ("width", {"form": ImageSpec(8, 5)}),
        ("channels", {"form": ImageSpec(8, 6, channels=1)}),
        ("background", {"form": ImageSpec(8, 6, background=(0, 0, 0))}),
        ("crop", {"form": ImageSpec(8, 6, crop="adm")}),
        ("encoding", {"encoding": Encoding("raw")}),
        ("quality", {"encoding": Encoding("jpeg", 90)}),
        ("classes", {"classes": "leaf"}),
    ],
)
def test_prepare_refuses_other_settings(folder, tmp_path, field, change):
    settings = {"spec": f"folder:{folder}", "directory": tmp_path / "set", "form": FORM}
    before = files(prepare(**settings))
    with pytest.raises(InputError, match=f"{field}=.*, not "):
        prepare(**(settings | change))
    assert files(tmp_path / "set") == before


def test_prepare_refuses_and_keeps_other_files(folder, tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="set exists but is not a prepared data set"):
        prepare(f"folder:{folder}", tmp_path / "set", FORM)
    assert (tmp_path / "set" / "thesis.tex").read_text() == "years of work"


def test_prepare_fills_an_empty_directory(folder, tmp_path):
    (tmp_path / "set").mkdir()
    assert len(open_prepared(prepare(f"folder:{folder}", tmp_path / "set", FORM))) == 7


@pytest.mark.parametrize(
    "field, form, encoding",
    [
        ("height", ImageSpec(0, 6), Encoding()),
        ("width", ImageSpec(8, -1), Encoding()),
        ("channels", ImageSpec(8, 6, channels=2), Encoding()),
        ("background", ImageSpec(8, 6, background=(0, 0, 256)), Encoding()),
        ("background", ImageSpec(8, 6, background=(0,)), Encoding()),
        ("crop", ImageSpec(8, 6, crop="stretch"), Encoding()),
        ("encoding", FORM, Encoding("gif")),
        ("quality", FORM, Encoding("jpeg", 0)),
    ],
)
def test_prepare_refuses_bad_settings(folder, tmp_path, field, form, encoding):
    with pytest.raises(InputError, match=field):
        prepare(f"folder:{folder}", tmp_path / "set", form, encoding=encoding)
    assert not (tmp_path / "set").exists()


def test_prepare_refuses_impossible_directories(folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file/set cannot be written"):
        prepare(f"folder:{folder}", tmp_path / "file" / "set", FORM)


def test_prepare_refuses_too_little_space(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_lib.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10}))
    with pytest.raises(InputError, match="set cannot be written .* MB free"):
        prepare(f"folder:{folder}", tmp_path / "set", FORM)


def test_prepare_prints_progress_lines_only(folder, tmp_path, capfd):
    prepare(f"folder:{folder}", tmp_path / "set", FORM)
    out, err = capfd.readouterr()
    assert out == ""
    lines = err.replace("\r", "").split("\n")
    assert "7/7 images" in err and all(
        line.startswith("preparing folder:") for line in lines if line.strip()
    )


def test_manifest_describes_the_set(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_lib, "SHARD_IMAGES", 3)
    path = prepare(f"folder:{folder}", tmp_path / "set", FORM)
    manifest = json.loads((path / "manifest.json").read_text())
    assert (manifest["count"], manifest["classes"], manifest["skipped"]) == (
        7,
        {"cat": 3, "dog": 4},
        {},
    )
    assert (
        manifest["settings"]["source"] == f"folder:{folder}"
        and manifest["settings"]["crop"] == "lanczos"
    )
    assert [shard["records"] for shard in manifest["shards"]] == [3, 2, 2]
    for shard in manifest["shards"]:
        content = (path / shard["file"]).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (
            shard["bytes"],
            shard["sha256"],
        )
    assert manifest["made_by"].keys() == {
        "rdm_jax",
        "array_record",
        "pillow",
        "tensorflow-datasets",
    }


@pytest.mark.parametrize("kind, furthest", [("png", 0), ("raw", 0), ("jpeg", 40)])
def test_encodings_round_trip(folder, tmp_path, kind, furthest):
    wanted = [np.asarray(Image.open(file)).astype(int) for file in sorted(folder.rglob("*.png"))]
    path = prepare(f"folder:{folder}", tmp_path / "set", FORM, encoding=Encoding(kind, 100))
    ours, theirs = open_prepared(path), tfds.builder_from_directory(path).as_data_source("train")
    for i, pixels in enumerate(wanted):
        for found in (ours[i]["image"], theirs[i]["image"]):
            assert found.shape == (8, 6, 3) and np.abs(found - pixels).max() <= furthest


def test_skip_bad_lists_what_is_left_out(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_lib, "SHARD_IMAGES", 3)  # The first shard is left without a record.
    for name in ("cat/0", "cat/1", "cat/2", "dog/1"):
        (folder / f"{name}.png").write_bytes(b"not a picture")
    (folder / "dog" / "notes.exe").write_text("not even meant as one")
    with pytest.raises(
        InputError,
        match="5 of 8 entries .* \\(4 cannot be decoded, 1 is not an image\\), "
        "and .* whole class 'cat'",
    ):
        prepare(f"folder:{folder}", tmp_path / "set", FORM, skip_bad=True, max_left_out=0.2)
    assert not (tmp_path / "set").exists()
    path = prepare(f"folder:{folder}", tmp_path / "set", FORM, skip_bad=True, max_left_out=1.0)
    manifest = json.loads((path / "manifest.json").read_text())
    skipped = manifest["skipped"]
    assert manifest["skipped_by_reason"] == {"cannot be decoded": 4, "is not an image": 1}
    assert manifest["class_numbers"] == {"cat": 0, "dog": 1}
    assert skipped.keys() == {"cat/0.png", "cat/1.png", "cat/2.png", "dog/1.png", "dog/notes.exe"}
    assert (
        "not an image" in skipped["dog/notes.exe"] and "cannot be decoded" in skipped["dog/1.png"]
    )
    images = open_prepared(path)
    assert images.batch(range(len(images)))["label"].tolist() == [1, 1, 1]
    wanted = [np.asarray(Image.open(folder / "dog" / f"{i}.png")) for i in (0, 2, 3)]
    np.testing.assert_array_equal(images.batch(range(3))["image"], wanted)
    assert [
        record["label"] for record in tfds.builder_from_directory(path).as_data_source("train")
    ] == [1, 1, 1]


def test_prepare_refuses_a_set_without_usable_images(folder, tmp_path):
    for file in folder.rglob("*.png"):
        file.write_bytes(b"not a picture")
    with pytest.raises(InputError, match="no image of folder:.* can be used"):
        prepare(f"folder:{folder}", tmp_path / "set", FORM, skip_bad=True, max_left_out=1.0)
    assert not (tmp_path / "set").exists()


def test_prepare_refuses_to_lose_a_class(folder, tmp_path):
    for number in range(4, 60):
        shutil.copy(folder / "dog/0.png", folder / f"dog/{number}.png")
    (folder / "bird").mkdir()
    (folder / "bird/sparrow.heic").write_bytes(b"unreadable")
    with pytest.raises(
        InputError, match="1 of 64 entries .* whole class 'bird'.*data.max_left_out=1"
    ):
        prepare(f"folder:{folder}", tmp_path / "set", FORM, skip_bad=True)
    for name in ("cat/0", "cat/1", "cat/2"):
        (folder / f"{name}.png").write_bytes(b"not a picture")
    (folder / "bird/sparrow.heic").unlink()
    (folder / "bird").rmdir()
    with pytest.raises(
        InputError, match="3 of 63 entries .* whole class 'cat'.*data.max_left_out=1"
    ):
        prepare(f"folder:{folder}", tmp_path / "set", FORM, skip_bad=True)


def test_prepare_raises_for_unreadable_files(folder, tmp_path, monkeypatch):
    """A disk that fails must not leave a set of the images read before."""

    def gone(*args, **kwargs):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Image, "open", gone)
    with pytest.raises(InputError, match="Input/output error"):
        prepare(f"folder:{folder}", tmp_path / "set", FORM, skip_bad=True)


def test_verify_finds_a_flipped_bit(folder, tmp_path):
    path = prepare(f"folder:{folder}", tmp_path / "set", FORM)
    prepare(f"folder:{folder}", tmp_path / "set", FORM, verify=True)
    (shard,) = path.glob("*.array_record*")
    flip_bit(shard, 70_000)
    with pytest.raises(InputError, match=f"{shard.name} differs from its hash in the manifest"):
        prepare(f"folder:{folder}", tmp_path / "set", FORM, verify=True)


def test_prepare_copies_without_hard_links(folder, tmp_path, monkeypatch):
    wanted = files(prepare(f"folder:{folder}", tmp_path / "one", FORM))

    def fail(*args):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", fail)
    assert files(prepare(f"folder:{folder}", tmp_path / "other", FORM)) == wanted


def test_prepare_refuses_mount_points(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "ismount", lambda path: True)
    with pytest.raises(InputError, match="mount point"):
        prepare(f"folder:{folder}", tmp_path / "set", FORM)


def test_manifest_counts_enlarged_images(folder, tmp_path):
    manifest = json.loads(
        (
            prepare(f"folder:{folder}", tmp_path / "set", ImageSpec(8, 7)) / "manifest.json"
        ).read_text()
    )
    assert manifest["enlarged"] == 7
    manifest = json.loads(
        (
            prepare(f"folder:{folder}", tmp_path / "smaller", ImageSpec(4, 3)) / "manifest.json"
        ).read_text()
    )
    assert manifest["enlarged"] == 0


def test_manifest_versions(folder, tmp_path):
    path = prepare(f"folder:{folder}", tmp_path / "set", FORM)
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest.pop("version") == 2
    del manifest["content"], manifest["settings"]["classes"]
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert (
        prepare(f"folder:{folder}", tmp_path / "set", FORM) == path
        and len(open_prepared(path)) == 7
    )
    for version, message in (
        (3, "version 3.*up to 2.*newer rdm_jax"),
        ("x", "not a prepared data set .*version"),
    ):
        (path / "manifest.json").write_text(json.dumps({**manifest, "version": version}))
        with pytest.raises(InputError, match=message):
            prepare(f"folder:{folder}", tmp_path / "set", FORM)


@pytest.mark.parametrize("library", ["array_record", "tensorflow_datasets"])
def test_prepare_names_the_extra_that_it_needs(folder, tmp_path, monkeypatch, library):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(InputError, match=f"the package {library} is not installed") as refusal:
        prepare(f"folder:{folder}", tmp_path / "set", FORM)
    assert refusal.value.fix == "Run pip install 'rdm_jax[data]'."
    assert [path.name for path in tmp_path.iterdir()] == ["images"]
