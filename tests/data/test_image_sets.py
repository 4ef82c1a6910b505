"""Sets of images: a small source decoded into memory, nothing written."""

import pickle

import chex
import numpy as np
import pytest
from PIL import Image

from rdm_jax.data.image_sets import open_direct, open_prepared
from rdm_jax.data.images import Form
from rdm_jax.data.prepare import prepare
from rdm_jax.errors import InputError
from tests.tiny import write_images

FORM = Form(8, 6)


@pytest.fixture
def folder(tmp_path):
    write_images(tmp_path / "images", count=10)
    return tmp_path / "images"


def test_a_source_in_memory_and_its_records_are_the_same(folder, tmp_path):
    direct = open_direct(f"folder:{folder}", FORM, cache_bytes=2**20)
    prepared = open_prepared(prepare(f"folder:{folder}", tmp_path / "set", FORM))
    assert direct.is_cached and not prepared.is_cached
    assert (direct.image_shape, direct.class_names) == (prepared.image_shape, prepared.class_names) == ((8, 6, 3), ("a", "b"))
    chex.assert_trees_all_equal(direct.batch(range(10)), prepared.batch(range(10)))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["images", "set"]


def test_a_fingerprint_tells_images_apart(folder, tmp_path):
    path = prepare(f"folder:{folder}", tmp_path / "set", FORM)
    direct, one, same = open_direct(f"folder:{folder}", FORM, cache_bytes=2**20), open_prepared(path), open_prepared(path)
    sets = [direct, one, *one.split(4), open_prepared(prepare(f"folder:{folder}", tmp_path / "other", Form(8, 8)))]
    assert one.fingerprint == same.fingerprint and len({images.fingerprint for images in sets}) == len(sets)


def test_a_source_that_does_not_fit_is_refused_before_it_is_decoded(folder):
    for file in folder.rglob("*.png"):
        file.write_bytes(b"")
    with pytest.raises(InputError, match="data.directory .*data.cache_gib"):
        open_direct(f"folder:{folder}", FORM, cache_bytes=10 * 8 * 6 * 3 - 1)


def test_damaged_images_are_refused_or_left_out_with_a_line_each(folder, caplog, monkeypatch):
    monkeypatch.setattr("rdm_jax.terminal.log.propagate", True)
    (folder / "a" / "002.png").write_bytes(b"no image")
    (folder / "b" / "notes.txt").write_bytes(b"")
    with pytest.raises(InputError, match="notes.txt"):
        open_direct(f"folder:{folder}", FORM, cache_bytes=2**20)
    (folder / "b" / "notes.txt").unlink()
    with pytest.raises(InputError, match="a/002.png"):
        open_direct(f"folder:{folder}", FORM, cache_bytes=2**20)
    with caplog.at_level("INFO"):
        images = open_direct(f"folder:{folder}", FORM, cache_bytes=2**20, skip_bad=True)
    assert [record.message for record in caplog.records if "a/002.png" in record.message]
    assert len(images) == 9
    wanted = [file for file in sorted(folder.rglob("*.png")) if file.name != "002.png"]
    assert images.batch(range(9))["label"].tolist() == [file.parent.name == "b" for file in wanted]
    first = np.asarray(Image.open(wanted[0]))[:, 1:7]
    np.testing.assert_array_equal(images[0]["image"], first)


def test_a_prepared_set_can_be_sent_to_another_process(folder, tmp_path):
    images = open_prepared(prepare(f"folder:{folder}", tmp_path / "set", FORM))
    chex.assert_trees_all_equal(pickle.loads(pickle.dumps(images)).batch([3, 1]), images.batch([3, 1]))
