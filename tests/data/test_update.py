"""Updates: a source that has changed since its preparation."""

import json
import os
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from rdm_jax.data import prepare as prepare_lib
from rdm_jax.data import readers
from rdm_jax.data.image_sets import open_prepared
from rdm_jax.data.prepare import prepare
from rdm_jax.runtime.errors import InputError
from tests.support.small_folder import FORM, files


@pytest.fixture
def again(folder, tmp_path, caplog, monkeypatch):
    """Returns a function that updates the set of the fixture's folder, and returns the log."""
    monkeypatch.setattr("rdm_jax.runtime.console.log.propagate", True)
    caplog.set_level("INFO")
    prepare(f"folder:{folder}", tmp_path / "set", FORM)

    def compare(**options):
        caplog.clear()
        prepare(f"folder:{folder}", tmp_path / "set", FORM, **{"update": True, **options})
        return "\n".join(record.getMessage() for record in caplog.records)

    return compare


def test_update_keeps_an_unchanged_set(tmp_path, again):
    before = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "set").iterdir()}
    assert "nothing has changed" in again()
    assert {file.name: file.stat().st_mtime_ns for file in (tmp_path / "set").iterdir()} == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["images", "set"]


def test_source_is_compared_on_request_only(folder, tmp_path, again):
    (folder / "cat/0.png").unlink()
    assert (
        "--mode=prepare --update" in again(update=False)
        and len(open_prepared(tmp_path / "set")) == 7
    )


def test_update_logs_and_prepares_changes(folder, tmp_path, again):
    identity = open_prepared(tmp_path / "set").identity
    Image.new("RGB", (6, 8), (1, 2, 3)).save(folder / "dog" / "9.png")
    Image.new("RGB", (6, 8), (4, 5, 6)).save(folder / "cat" / "1.png")
    (folder / "cat" / "0.png").unlink()
    said = again()
    assert "1 added (dog/9.png), 1 removed (cat/0.png), 1 changed (cat/1.png)" in said
    images = open_prepared(tmp_path / "set")
    assert images.identity != identity and images.batch(range(7))["label"].tolist() == [
        0,
        0,
        1,
        1,
        1,
        1,
        1,
    ]
    np.testing.assert_array_equal(images[0]["image"][0, 0], (4, 5, 6))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["images", "set"]
    assert "nothing has changed" in again()


def test_update_notices_changes_during_preparation(folder, tmp_path, again):
    """The image is read first, and changes afterwards."""
    (folder / "dog" / "9.png").write_bytes((folder / "dog" / "0.png").read_bytes())

    def change():
        Image.new("RGB", (6, 8), (4, 5, 6)).save(folder / "cat" / "0.png")

    again(check_stop=change)
    assert open_prepared(tmp_path / "set")[0]["image"][0, 0].tolist() != [4, 5, 6]
    assert "1 changed (cat/0.png)" in again()
    assert open_prepared(tmp_path / "set")[0]["image"][0, 0].tolist() == [4, 5, 6]


def test_update_notices_labels(folder, tmp_path, again):
    names = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*.png"))
    labels = [[name, "dog" if name == "cat/0.png" else name[:3]] for name in names]
    (folder / "dataset.json").write_text(json.dumps({"labels": labels}))
    assert "1 of another class (cat/0.png)" in again()
    assert open_prepared(tmp_path / "set").batch(range(7))["label"].tolist() == [
        1,
        0,
        0,
        1,
        1,
        1,
        1,
    ]


def test_update_keeps_the_former_set_until_complete(folder, tmp_path, again):
    before = files(tmp_path / "set")
    (folder / "cat" / "1.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match="cat/1.png"):
        again()
    assert files(tmp_path / "set") == before


def test_update_resumes(folder, tmp_path, again, monkeypatch):
    monkeypatch.setattr(prepare_lib, "SHARD_IMAGES", 2)
    Image.new("RGB", (6, 8), (1, 2, 3)).save(folder / "dog" / "9.png")
    with pytest.raises(KeyboardInterrupt):
        again(check_stop=mock.Mock(side_effect=[None, KeyboardInterrupt]))
    said = again(update=False)
    assert (
        f"an update of {tmp_path}/set was interrupted; "
        "--update resumes with the 2 files finished in" in said
    )
    assert len(open_prepared(tmp_path / "set")) == 7
    reads, load = [], readers.Folder.load
    monkeypatch.setattr(
        readers.Folder, "load", lambda self, name: reads.append(name) or load(self, name)
    )
    again()
    assert (
        reads == ["dog/1.png", "dog/2.png", "dog/3.png", "dog/9.png"]
        and len(open_prepared(tmp_path / "set")) == 8
    )
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["images", "set"]


def test_update_repairs_a_kill_between_renames(folder, tmp_path, again, monkeypatch):
    before = files(tmp_path / "set")
    (folder / "cat" / "0.png").unlink()
    rename = os.rename

    def killed(old, new):
        rename(old, new)
        if str(new).endswith(".former"):
            raise KeyboardInterrupt

    monkeypatch.setattr(prepare_lib.os, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        again()
    monkeypatch.undo()
    assert not (tmp_path / "set").exists()
    prepare(f"folder:{folder}", tmp_path / "set", FORM)
    assert files(tmp_path / "set") == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["images", "set"]


@pytest.mark.parametrize("damage", ["missing", "damaged"])
def test_update_compares_older_versions_by_names(folder, tmp_path, again, damage):
    if damage == "missing":
        (tmp_path / "set" / "source.npz").unlink()
    else:
        (tmp_path / "set" / "source.npz").write_bytes(b"PK\3\4")
    assert "names of images only" in again() and "nothing has changed" in again()
    (folder / "cat" / "0.png").rename(folder / "cat" / "00.png")
    assert "1 added (cat/00.png), 1 removed (cat/0.png)" in again()
    assert "names of images only" not in again()
