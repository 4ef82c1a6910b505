"""Untrusted data sets: nothing that they name is imported or read elsewhere."""

import json
import sys

import pytest
import tensorflow_datasets as tfds

from rdm_jax.data.image_sets import open_prepared
from rdm_jax.data.images import ImageSpec
from rdm_jax.data.manifest import MANIFEST
from rdm_jax.data.prepare import prepare
from rdm_jax.runtime.errors import InputError
from tests.support.configs import write_images


@pytest.fixture
def prepared(tmp_path):
    write_images(tmp_path / "images", count=4)
    prepare(f"folder:{tmp_path / 'images'}", tmp_path / "set", ImageSpec(8, 8))
    return tmp_path / "set"


def change(path, function):
    path.write_text(json.dumps(function(json.loads(path.read_text()))))


@pytest.fixture
def canary(tmp_path, monkeypatch):
    """A module that an import would find; it prints when it is run."""
    (tmp_path / "canary_module.py").write_text(
        f"open({str(tmp_path / 'executed')!r}, 'w')\nraise ImportError"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "executed"
    sys.modules.pop("canary_module", None)


NAME, OWN = "canary_module.Image", "tensorflow_datasets.core.features.features_dict.FeaturesDict"
HOSTILE = {
    "today's": {"pythonClassName": NAME},
    "older": {"type": NAME, "content": {}},
    "within a string": {
        "pythonClassName": OWN,
        "jsonFeature": {"json": json.dumps({"image": {"type": NAME, "content": {}}})},
    },
    "within the text of a message": {
        "type": OWN,
        "proto_cls": "tensorflow_datasets.FeaturesDict",
        "content": json.dumps({"features": {"image": {"pythonClassName": NAME}}}),
    },
}


@pytest.mark.parametrize("form", HOSTILE)
def test_foreign_features_are_not_imported(prepared, canary, form):
    change(
        prepared / "features.json",
        lambda features: HOSTILE[form] if "within" in form else features | HOSTILE[form],
    )
    with pytest.raises(InputError, match="features.json asks to import 'canary_module.Image'"):
        open_prepared(prepared)
    assert not canary.exists()
    with pytest.raises(ValueError):
        tfds.builder_from_directory(prepared)  # the library itself does
    assert canary.exists()


def test_files_elsewhere_are_refused(prepared):
    def elsewhere(info):
        info["splits"][0]["filepathTemplate"] = (
            "../images/{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
        )
        return info

    change(prepared / "dataset_info.json", elsewhere)
    with pytest.raises(
        InputError, match="dataset_info.json names .*images.*files are in its own directory"
    ):
        open_prepared(prepared)


def test_missing_files_are_named(prepared):
    def renamed(manifest):
        manifest["shards"][0]["file"] = "another"
        return manifest

    change(prepared / MANIFEST, renamed)
    with pytest.raises(
        InputError,
        match="another is missing. Delete the directory and prepare it again",
    ):
        open_prepared(prepared)


NO_NAMES = ("../images/a/000.png", "/etc/hostname", "..", "a\0b", "\ud800", None)
WRONG = [*(("file", name) for name in NO_NAMES), ("bytes", "7"), ("sha256", 7)]


@pytest.mark.parametrize(("field", "value"), WRONG)
def test_manifest_entries_are_checked(prepared, field, value):
    def hostile(manifest):
        manifest["shards"][0][field] = value
        return manifest

    change(prepared / MANIFEST, hostile)
    with pytest.raises(InputError, match="not a prepared data set"):
        open_prepared(prepared)
