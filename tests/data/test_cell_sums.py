"""Sums of cells beside prepared images: exact, in order, and as safe as the images."""

import json
import logging
import os
import pickle
import shutil

import chex
import numpy as np
import pytest
from PIL import Image

from rdm_jax.data import cell_sums, write_shards
from rdm_jax.data import prepare as prepare_lib
from rdm_jax.data.cell_sums import dtype_of, folder_of, sums_of
from rdm_jax.data.image_sets import open_direct, open_prepared
from rdm_jax.data.images import ImageSpec
from rdm_jax.data.pipeline import as_trained, train_iterator
from rdm_jax.data.prepare import prepare
from rdm_jax.data.records import Encoding, ImageShard, RecordReader
from rdm_jax.data.write_sums import SumShard
from rdm_jax.diffusion.pixels import Pixels
from rdm_jax.runtime.errors import InputError
from tests.support.configs import write_images
from tests.support.small_folder import flip_bit

FORM = ImageSpec(8, 8)
COUNT = 13


@pytest.fixture
def folder(tmp_path):
    write_images(tmp_path / "images", count=COUNT)
    return tmp_path / "images"


@pytest.fixture
def shards_of_five(monkeypatch):
    monkeypatch.setattr(prepare_lib, "SHARD_IMAGES", 5)


@pytest.fixture
def logged(caplog, monkeypatch):
    monkeypatch.setattr("rdm_jax.runtime.console.log.propagate", True)
    caplog.set_level(logging.INFO)
    return caplog


def prepared(folder, directory, cells=(2,), **options):
    return prepare(f"folder:{folder}", directory, FORM, cells=cells, **options)


def files(directory):
    """Contents by name, of folders within it too."""
    return {
        str(file.relative_to(directory)): file.read_bytes()
        for file in directory.rglob("*")
        if file.is_file()
    }


def plain_sums(images, cell):
    n, h, w, c = images.shape
    cells = images.reshape(n, h // cell, cell, w // cell, cell, c)
    return cells.astype(np.int64).sum((2, 4))


@pytest.mark.parametrize("cell", [1, 2, 3, 4, 8, 16, 24])
@pytest.mark.parametrize("value", [0, 255, None])
def test_sums_are_exact(monkeypatch, cell, value):
    monkeypatch.setattr(cell_sums, "CHUNK", 3)
    images = np.random.default_rng(0).integers(0, 256, (7, 48, 48, 3), np.uint8)
    images = images if value is None else np.full_like(images, value)
    found = sums_of(images, cell)
    assert found.dtype == dtype_of(cell) == Pixels(cell).dtype
    np.testing.assert_array_equal(found, plain_sums(images, cell))


@pytest.mark.parametrize(
    "cell, dtype", [(1, np.uint8), (2, np.uint16), (16, np.uint16), (17, np.uint32)]
)
def test_dtype_is_the_smallest_that_holds_the_sum(cell, dtype):
    assert dtype_of(cell) == dtype


@pytest.mark.parametrize("encoding", ["png", "jpeg", "raw"])
def test_sums_are_of_the_records_in_their_order(folder, tmp_path, shards_of_five, encoding):
    path = prepared(folder, tmp_path / "set", cells=(2, 4), encoding=Encoding(encoding))
    images = open_prepared(path, cells=(2, 4))
    whole = images.batch(np.arange(COUNT))
    for cell in (2, 4):
        sums = images.of_cells(cell)
        assert (sums.cell, sums.image_shape) == (cell, (8 // cell, 8 // cell, 3))
        assert (len(sums), sums.class_names) == (COUNT, images.class_names)
        found = sums.batch(np.arange(COUNT))
        np.testing.assert_array_equal(found["image"], plain_sums(whole["image"], cell))
        np.testing.assert_array_equal(found["label"], whole["label"])
        assert found["image"].dtype == np.uint16 and sums.identity == images.identity
        shards = json.loads((folder_of(path, cell) / "manifest.json").read_text())["shards"]
        lengths = [shard["records"] for shard in shards]
        assert lengths == RecordReader(path).shard_lengths == [5, 4, 4]


def test_sums_of_images_without_classes(folder, tmp_path):
    path = prepare(f"folder:{folder}/a", tmp_path / "set", ImageSpec(8, 8, channels=1), cells=(2,))
    sums = open_prepared(path, cells=(2,)).of_cells(2)
    assert sums.image_shape == (4, 4, 1) and sums[0]["label"] == -1


@pytest.mark.parametrize("cache_bytes", [0, COUNT * 16 * 3 * 2, 2**20])
def test_iterators_give_the_same_images(folder, tmp_path, cache_bytes):
    """From records, with the sums alone in memory, and with all in memory."""
    path = prepared(folder, tmp_path / "set")
    full = open_prepared(path)
    images = open_prepared(path, cells=(2,), cache_bytes=cache_bytes)
    assert images.is_cached == (cache_bytes == 2**20)
    assert images.of_cells(2).is_cached == (cache_bytes > 0)
    for whole, part in zip(full.split(4), images.split(4), strict=True):
        (sums,) = as_trained(2, part)
        assert sums.identity == whole.identity and len(sums) == len(whole)
        iterators = [train_iterator(x, batch_size=8, seed=3) for x in (whole, sums)]
        for _ in range(4):
            pixels, found = map(next, iterators)
            np.testing.assert_array_equal(found["image"], plain_sums(pixels["image"], 2))
            np.testing.assert_array_equal(found["label"], pixels["label"])


def test_direct_sources_are_summed_in_memory(folder, tmp_path):
    direct = open_direct(f"folder:{folder}", FORM, cache_bytes=2**20, cells=(2,))
    sums = open_prepared(prepared(folder, tmp_path / "set"), cells=(2,)).of_cells(2)
    chex.assert_trees_all_equal(
        direct.of_cells(2).batch(np.arange(COUNT)), sums.batch(np.arange(COUNT))
    )
    assert direct.of_cells(2).identity == sums.identity
    assert direct.of_cells(4) is direct


def test_sums_can_be_pickled(folder, tmp_path):
    sums = open_prepared(prepared(folder, tmp_path / "set"), cells=(2,)).of_cells(2)
    chex.assert_trees_all_equal(pickle.loads(pickle.dumps(sums)).batch([3, 1]), sums.batch([3, 1]))


def test_sums_in_memory_are_not_sent_to_workers(folder, tmp_path):
    path = prepared(folder, tmp_path / "set")
    images = open_prepared(path, cells=(2,), cache_bytes=COUNT * 16 * 3 * 2)
    assert images.of_cells(2).is_cached and not images.is_cached
    for part in (images, *images.split(4)):
        sent = pickle.dumps(part)
        assert images.of_cells(2)[0]["image"].tobytes() not in sent
        chex.assert_trees_all_equal(pickle.loads(sent).batch([3, 1]), part.batch([3, 1]))


def test_sets_are_used_together_as_sums_or_not_at_all(folder, tmp_path):
    path = prepared(folder, tmp_path / "set")
    full, both = open_prepared(path), open_prepared(path, cells=(2,))
    assert as_trained(2, both, full) == [both, full]
    assert as_trained(2, both, both) == [both.of_cells(2)] * 2


class Stop(BaseException):
    pass


def stop_after(shards):
    """A check that ends the work after so many shards."""
    left = [shards]

    def check():
        left[0] -= 1
        if not left[0]:
            raise Stop

    return check


@pytest.mark.parametrize("shards", [1, 3, 4, 5, 6, 8])
def test_preparation_resumes_bit_for_bit(folder, tmp_path, monkeypatch, shards_of_five, shards):
    """Three shards of images, then three of each size of cells."""
    undisturbed = files(prepared(folder, tmp_path / "undisturbed", cells=(2, 4)))
    with pytest.raises(Stop):
        prepared(folder, tmp_path / "set", cells=(2, 4), check_stop=stop_after(shards))
    assert not (tmp_path / "set").exists()
    written = []
    for kind in (ImageShard, SumShard):
        examples = kind.examples
        monkeypatch.setattr(
            kind,
            "examples",
            lambda self, seen, examples=examples: written.append(self) or examples(self, seen),
        )
    assert files(prepared(folder, tmp_path / "set", cells=(2, 4))) == undisturbed
    assert len(written) == 9 - shards and not (tmp_path / ".set.incomplete").exists()


def test_older_set_is_read_and_gets_sums_on_request(folder, tmp_path, shards_of_five):
    path = prepared(folder, tmp_path / "set", cells=())
    before = files(path)
    prepared(folder, tmp_path / "set")
    assert files(path) == before
    images = open_prepared(path, cells=(2,))
    assert images.of_cells(2) is images
    with pytest.raises(Stop):
        prepared(folder, tmp_path / "set", verify=True, check_stop=stop_after(2))
    assert files(path) == before
    prepared(folder, tmp_path / "set")  # keeps the finished shards
    assert len(list((tmp_path / ".set.incomplete").rglob("*.array_record"))) == 2
    prepared(folder, tmp_path / "set", verify=True)
    assert files(path) == files(prepared(folder, tmp_path / "new"))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["images", "new", "set"]
    stamps = {file: file.stat().st_mtime_ns for file in path.rglob("*")}
    prepared(folder, tmp_path / "set", verify=True)
    assert {file: file.stat().st_mtime_ns for file in path.rglob("*")} == stamps


def test_other_cells_are_added_beside(folder, tmp_path):
    path = prepared(folder, tmp_path / "set")
    prepared(folder, tmp_path / "set", cells=(4,), verify=True)
    assert cell_sums.cells_in(path) == [2, 4]


def test_update_writes_the_sums_again(folder, tmp_path):
    path = prepared(folder, tmp_path / "set", cells=(2, 4))
    Image.new("RGB", (8, 8), (1, 2, 3)).save(folder / "a" / "000.png")
    prepared(folder, tmp_path / "set", cells=(2,), update=True)
    images = open_prepared(path, cells=(2, 4))
    assert images.of_cells(2)[0]["image"][0, 0].tolist() == [4, 8, 12]
    assert images.of_cells(4)[0]["image"][0, 0].tolist() == [16, 32, 48]


def shard_of_sums(path):
    (shard,) = folder_of(path, 2).glob("*.array_record")
    return shard


def test_verify_finds_a_flipped_bit_in_sums(folder, tmp_path):
    path = prepared(folder, tmp_path / "set")
    flip_bit(shard_of_sums(path), 65_600)
    with pytest.raises(InputError, match="sums_2x2/.* differs .*Delete .*sums_2x2 and run"):
        prepared(folder, tmp_path / "set", verify=True)
    shutil.rmtree(folder_of(path, 2))
    prepared(folder, tmp_path / "set", verify=True)
    assert open_prepared(path, cells=(2,)).of_cells(2).cell == 2


def test_flipped_bits_in_sums_are_refused_or_harmless(folder, tmp_path):
    path = prepared(folder, tmp_path / "set")
    wanted = open_prepared(path, cells=(2,)).of_cells(2).batch(range(COUNT))
    whole, refused = shard_of_sums(path).read_bytes(), 0
    written = np.flatnonzero(np.frombuffer(whole, np.uint8))  # all else is padding
    for place in np.random.default_rng(0).choice(written, 60, replace=False).tolist():
        shard_of_sums(path).write_bytes(
            whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :]
        )
        try:
            found = open_prepared(path, cells=(2,)).of_cells(2).batch(range(COUNT))
        except InputError as error:
            assert "sums_2x2" in str(error)
            refused += 1
            continue
        chex.assert_trees_all_equal(found, wanted)
    assert refused > 50


def edit_manifest(path, **changes):
    file = folder_of(path, 2) / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


DAMAGES = {
    "no shard": lambda path: shard_of_sums(path).unlink(),
    "half a shard": lambda path: os.truncate(shard_of_sums(path), 40),
    "no JSON": lambda path: (folder_of(path, 2) / "manifest.json").write_text("{"),
    "a list": lambda path: (folder_of(path, 2) / "manifest.json").write_text("[]"),
    "newer": lambda path: edit_manifest(path, version=2),
    "other cells": lambda path: edit_manifest(path, cell=4),
    "other shape": lambda path: edit_manifest(path, shape=[8, 8, 3]),
    "no shards": lambda path: edit_manifest(path, shards=[]),
    "a file elsewhere": lambda path: edit_manifest(path, shards=[{"file": "../x"}]),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_sums_are_refused(folder, tmp_path, damage):
    path = prepared(folder, tmp_path / "set")
    damage(path)
    with pytest.raises(InputError, match="sums_2x2.*Delete .*sums_2x2 and run --mode=prepare"):
        open_prepared(path, cells=(2,))
    assert len(open_prepared(path)) == COUNT  # the images themselves are usable


def test_sums_of_other_images_are_ignored(folder, tmp_path, logged):
    path = prepared(folder, tmp_path / "set")
    Image.new("RGB", (8, 8), (1, 2, 3)).save(folder / "a" / "000.png")
    other = prepared(folder, tmp_path / "other", cells=())
    shutil.copytree(folder_of(path, 2), folder_of(other, 2))
    images = open_prepared(other, cells=(2,))
    assert images.of_cells(2) is images and "the sums of other images" in logged.text
    prepared(folder, tmp_path / "other", verify=True)
    assert open_prepared(other, cells=(2,)).of_cells(2)[0]["image"][0, 0].tolist() == [4, 8, 12]


def test_sums_of_a_shard_without_records(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_lib, "SHARD_IMAGES", 2)
    for name in ("a/000", "a/002"):
        (folder / f"{name}.png").write_bytes(b"no image")
    path = prepared(folder, tmp_path / "set", skip_bad=True, max_left_out=0.5)
    images = open_prepared(path, cells=(2,))
    found = images.of_cells(2).batch(np.arange(COUNT - 2))
    whole = images.batch(np.arange(COUNT - 2))
    assert RecordReader(path).shard_lengths[0] == 0
    np.testing.assert_array_equal(found["image"], plain_sums(whole["image"], 2))
    np.testing.assert_array_equal(found["label"], whole["label"])


@pytest.mark.second
def test_processes_write_equal_sums(folder, tmp_path, monkeypatch, shards_of_five):
    wanted = files(prepared(folder, tmp_path / "one"))
    monkeypatch.setattr(write_shards, "ALONE_SECONDS", 0.0)
    monkeypatch.setattr(write_shards, "cores", lambda: 2)
    path = prepared(folder, tmp_path / "two", cells=())
    prepared(folder, tmp_path / "two", verify=True)
    assert files(path) == wanted
