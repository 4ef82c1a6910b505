"""Image sets: sources in memory, and identities."""

import json
import pickle
import shutil

import chex
import numpy as np
import pytest
from PIL import Image

from rdm_jax.data.image_sets import open_direct, open_prepared
from rdm_jax.data.images import ImageSpec
from rdm_jax.data.prepare import prepare
from rdm_jax.data.records import Encoding
from rdm_jax.runtime.errors import InputError
from tests.support.configs import write_images

FORM = ImageSpec(8, 6)


@pytest.fixture
def folder(tmp_path):
    write_images(tmp_path / "images", count=10)
    return tmp_path / "images"


def test_open_direct_equals_open_prepared(folder, tmp_path):
    direct = open_direct(f"folder:{folder}", FORM, cache_bytes=2**20)
    prepared = open_prepared(prepare(f"folder:{folder}", tmp_path / "set", FORM))
    assert direct.is_cached and not prepared.is_cached
    assert (
        (direct.image_shape, direct.class_names)
        == (prepared.image_shape, prepared.class_names)
        == ((8, 6, 3), ("a", "b"))
    )
    chex.assert_trees_all_equal(direct.batch(range(10)), prepared.batch(range(10)))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["images", "set"]


def test_fingerprint_depends_on_images(folder, tmp_path):
    path = prepare(f"folder:{folder}", tmp_path / "set", FORM)
    direct, one, same = (
        open_direct(f"folder:{folder}", FORM, cache_bytes=2**20),
        open_prepared(path),
        open_prepared(path),
    )
    sets = [
        direct,
        one,
        *one.split(4),
        open_prepared(prepare(f"folder:{folder}", tmp_path / "other", ImageSpec(8, 8))),
    ]
    assert one.fingerprint == same.fingerprint and len(
        {images.fingerprint for images in sets}
    ) == len(sets)


def test_open_direct_refuses_large_sources_undecoded(folder):
    for file in folder.rglob("*.png"):
        file.write_bytes(b"")
    with pytest.raises(InputError, match="data.directory .*data.cache_gib"):
        open_direct(f"folder:{folder}", FORM, cache_bytes=10 * 8 * 6 * 3 - 1)


def test_open_direct_refuses_or_skips_damaged_images(folder, caplog, monkeypatch):
    monkeypatch.setattr("rdm_jax.runtime.console.log.propagate", True)
    (folder / "a" / "002.png").write_bytes(b"no image")
    (folder / "b" / "notes.exe").write_bytes(b"")
    with pytest.raises(InputError, match="notes.exe"):
        open_direct(f"folder:{folder}", FORM, cache_bytes=2**20)
    (folder / "b" / "notes.exe").unlink()
    with pytest.raises(InputError, match="a/002.png"):
        open_direct(f"folder:{folder}", FORM, cache_bytes=2**20)
    with caplog.at_level("INFO"):
        images = open_direct(f"folder:{folder}", FORM, cache_bytes=2**20, skip_bad=True)
    assert [record.message for record in caplog.records if "a/002.png" in record.message]
    assert len(images) == 9
    prepared = prepare(f"folder:{folder}", folder.parent / "set", FORM, skip_bad=True)
    assert open_prepared(prepared).identity == images.identity
    wanted = [file for file in sorted(folder.rglob("*.png")) if file.name != "002.png"]
    assert images.batch(range(9))["label"].tolist() == [file.parent.name == "b" for file in wanted]
    first = np.asarray(Image.open(wanted[0]))[:, 1:7]
    np.testing.assert_array_equal(images[0]["image"], first)


def test_prepared_set_can_be_pickled(folder, tmp_path):
    images = open_prepared(prepare(f"folder:{folder}", tmp_path / "set", FORM))
    chex.assert_trees_all_equal(
        pickle.loads(pickle.dumps(images)).batch([3, 1]), images.batch([3, 1])
    )


def test_identity_is_independent_of_storage(folder, tmp_path, monkeypatch):
    spec = f"folder:{folder}"
    raw = prepare(spec, tmp_path / "raw", FORM, encoding=Encoding("raw"))
    png = prepare(spec, tmp_path / "png", FORM)
    one, cached = open_prepared(png), open_prepared(png, cache_bytes=2**20)
    assert cached.is_cached and one.identity == cached.identity == open_prepared(raw).identity
    assert one.identity == open_prepared(shutil.copytree(png, tmp_path / "copy")).identity
    monkeypatch.setattr("rdm_jax.data.prepare.SHARD_IMAGES", 3)
    direct, shards = (
        open_direct(spec, FORM, cache_bytes=2**20),
        open_prepared(prepare(spec, tmp_path / "shards", FORM)),
    )
    assert one.identity == direct.identity == shards.identity
    parts = [part.identity for images in (one, cached) for part in images.split(4)]
    assert (
        parts[:2] == parts[2:]
        and len({one.identity, *parts}) == 3
        and parts[0].startswith(one.identity)
    )


def _other_pixel(folder):
    Image.new("RGB", (8, 8), (1, 2, 3)).save(folder / "a" / "000.png")


def _other_class(folder):
    (folder / "b").rename(folder / "c")


def _other_label(folder):
    (folder / "b" / "001.png").rename(folder / "a" / "001.png")


@pytest.mark.parametrize("change", [_other_pixel, _other_class, _other_label])
def test_identity_depends_on_pixels_labels_classes(folder, tmp_path, change):
    before = open_prepared(prepare(f"folder:{folder}", tmp_path / "before", FORM))
    direct = open_direct(f"folder:{folder}", FORM, cache_bytes=2**20)
    change(folder)
    assert (
        open_prepared(prepare(f"folder:{folder}", tmp_path / "after", FORM)).identity
        != before.identity
    )
    assert open_direct(f"folder:{folder}", FORM, cache_bytes=2**20).identity != direct.identity


def test_identity_of_older_and_foreign_sets(folder, tmp_path):
    path = prepare(f"folder:{folder}", tmp_path / "set", FORM)
    manifest = json.loads((path / "manifest.json").read_text())
    for key in ("version", "content"):
        del manifest[key]
    (path / "manifest.json").write_text(json.dumps(manifest))
    old = open_prepared(path).identity
    manifest["shards"][0]["sha256"] = "0" * 64
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert open_prepared(path).identity != old
    (path / "manifest.json").unlink()
    others = open_prepared(path).identity
    assert (
        others != old and open_prepared(shutil.copytree(path, tmp_path / "copy")).identity == others
    )


def test_open_direct_bounds_what_is_left_out(folder):
    for name in ("a/000.png", "a/002.png"):
        (folder / name).write_bytes(b"no image")
    with pytest.raises(
        InputError,
        match="2 of 10 entries .* are unusable \\(2 cannot be decoded\\).*data.max_left_out",
    ):
        open_direct(f"folder:{folder}", FORM, cache_bytes=2**20, skip_bad=True)
    assert (
        len(
            open_direct(
                f"folder:{folder}", FORM, cache_bytes=2**20, skip_bad=True, max_left_out=0.2
            )
        )
        == 8
    )
