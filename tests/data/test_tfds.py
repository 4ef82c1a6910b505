"""Data sets of tensorflow-datasets as a source, without TensorFlow."""

import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from rdm_jax.data.image_sets import open_prepared
from rdm_jax.data.images import ImageSpec
from rdm_jax.data.prepare import prepare
from rdm_jax.data.records import RecordReader
from rdm_jax.data.sources import open_source
from rdm_jax.data.tfds_download import prepared_by_tfds
from rdm_jax.runtime.errors import BadImage, InputError

PIXELS = np.random.default_rng(0).integers(0, 256, (7, 5, 4, 3), np.uint8)
FORM = ImageSpec(5, 4)


class RelayTestShapes(tfds.core.GeneratorBasedBuilder):
    """Seven images; one of the split 'test' has no label."""

    VERSION = tfds.core.Version("1.0.0")
    folder = None

    def _info(self):
        label = tfds.features.ClassLabel(names=["ant", "bee", "cow"])
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {"image": tfds.features.Image(shape=(None, None, 3)), "label": label}
            ),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        return {
            "train": self._generate_examples(range(5)),
            "test": self._generate_examples(range(5, 7)),
        }

    def _generate_examples(self, numbers):
        for i in numbers:
            Image.fromarray(PIXELS[i]).save(self.folder / f"{i}.png")
            yield i, {"image": self.folder / f"{i}.png", "label": -1 if i == 6 else i % 3}


class RelayTestCaptions(RelayTestShapes):
    """Three images of one size with captions."""

    CAPTIONS = ("a  red\napple", "a cat", "a dog")
    FEATURES = {"text": tfds.features.Text()}

    def _info(self):
        image = tfds.features.Image(shape=(5, 4, 3))
        features = tfds.features.FeaturesDict({"image": image, **self.FEATURES})
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(range(3))}

    def _generate_examples(self, numbers):
        for i in numbers:
            Image.fromarray(PIXELS[i]).save(self.folder / f"{i}.png")
            found = dict(zip(self.FEATURES, (self.CAPTIONS[i],), strict=True))
            yield i, {"image": self.folder / f"{i}.png", **found}


class RelayTestCaptionClasses(RelayTestCaptions):
    """Its captions are classes."""

    FEATURES = {"caption": tfds.features.ClassLabel(names=RelayTestCaptions.CAPTIONS[1:])}
    CAPTIONS = ("a cat", "a dog", "a cat")


class RelayTestWords(RelayTestShapes):
    """A data set without images."""

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict({"text": tfds.features.Text()})
        )

    def _generate_examples(self, numbers):
        for i in numbers:
            yield i, {"text": str(i)}


@pytest.fixture(autouse=True)
def data_dir(tmp_path, monkeypatch):
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path / "tfds"))
    monkeypatch.setattr(RelayTestShapes, "folder", tmp_path)


def test_data_set_is_prepared_by_name(tmp_path, capfd):
    source = open_source("tfds:relay_test_shapes")
    assert source.class_names == ("ant", "bee", "cow")
    assert capfd.readouterr().out == ""
    for i in range(len(source)):
        np.testing.assert_array_equal(source.read(i, FORM), PIXELS[i])
        assert source.label(i) == i % 3
    path = prepare("tfds:relay_test_shapes", tmp_path / "set", FORM)
    images = open_prepared(path)
    np.testing.assert_array_equal(images.batch(range(5))["image"], PIXELS[:5])
    assert images.batch(range(5))["label"].tolist() == [0, 1, 2, 0, 1] and images.class_names == (
        "ant",
        "bee",
        "cow",
    )
    assert "tensorflow" not in sys.modules


def test_splits_can_be_joined(tmp_path):
    source = open_source("tfds:relay_test_shapes:train+test")
    np.testing.assert_array_equal(source.read(6, FORM), PIXELS[6])
    with pytest.raises(InputError, match="'train' or 'test'"):
        open_source("tfds:relay_test_shapes:validation")


def test_images_without_label_are_refused_or_skipped(tmp_path):
    source = open_source("tfds:relay_test_shapes:test")
    with pytest.raises(BadImage, match="class index -1"):
        source.label(1)
    with pytest.raises(InputError, match="class index -1"):
        prepare("tfds:relay_test_shapes:test", tmp_path / "set", FORM)
    assert (
        len(
            open_prepared(
                prepare(
                    "tfds:relay_test_shapes:test",
                    tmp_path / "set",
                    FORM,
                    skip_bad=True,
                    max_left_out=1.0,
                )
            )
        )
        == 1
    )


def test_captions_of_a_prepared_data_set():
    directory = prepared_by_tfds("relay_test_captions")
    assert RecordReader(directory).captions() == ["a red apple", "a cat", "a dog"]
    assert RecordReader(directory).name(1) == "record 1"
    source = open_source("tfds:relay_test_captions", captions="auto")
    assert list(source.captions) == ["a red apple", "a cat", "a dog"]


@pytest.mark.parametrize(
    ("caption", "what"), [(" \n", "empty"), (b"caf\xe9", "UTF-8|valid Unicode")]
)
def test_bad_captions_of_a_prepared_data_set_are_refused(monkeypatch, caption, what):
    monkeypatch.setattr(RelayTestCaptions, "CAPTIONS", ("a", caption, "b"))
    directory = prepared_by_tfds("relay_test_captions")
    with pytest.raises(InputError, match=f"the caption of record 1 of .* is .*({what})"):
        RecordReader(directory).captions()
    with pytest.raises(BadImage, match=f"'00000001' of .* caption .*({what})|an empty caption"):
        open_source("tfds:relay_test_captions", captions="auto")
    kept = open_source("tfds:relay_test_captions", captions="auto", skip_bad=True)
    assert list(kept.captions) == ["a", "b"]


def test_classes_are_no_captions():
    directory = prepared_by_tfds("relay_test_caption_classes")
    with pytest.raises(InputError, match="has no captions"):
        RecordReader(directory).captions()
    with pytest.raises(InputError, match="has no text feature"):
        open_source("tfds:relay_test_caption_classes", captions="auto")


def test_unknown_data_set_is_refused():
    with pytest.raises(InputError, match="has no data set 'relay_test_nothing'"):
        open_source("tfds:relay_test_nothing")


def test_data_set_without_images_is_refused():
    with pytest.raises(InputError, match="no feature 'image' but text"):
        open_source("tfds:relay_test_words")


@pytest.mark.parametrize(
    "error",
    [
        ModuleNotFoundError("No module named 'tensorflow'"),
        AssertionError("Manual directory does not exist.\nCreate it and download the data set."),
        ConnectionError("no network"),
    ],
)
def test_library_errors_name_the_remedy(monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(RelayTestShapes, "_split_generators", fail)
    reason = str(error).split("\n")[0]
    with pytest.raises(
        InputError,
        match=f"{reason}.*with TensorFlow.*tfds.builder\\('relay_test_shapes', .*folder:",
    ):
        open_source("tfds:relay_test_shapes")
