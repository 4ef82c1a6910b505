"""Features of a classifier: when it is trained, and when not."""

import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

from rdm_jax.data.image_sets import ImageSet, open_direct
from rdm_jax.data.images import ImageSpec
from rdm_jax.evaluation import classifier
from rdm_jax.runtime.errors import InputError
from tests.support.configs import write_images


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(classifier, "IMAGES_SHOWN", 300)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> ImageSet:
    """60 of two classes."""
    folder = tmp_path_factory.mktemp("source")
    write_images(folder, count=60)
    return open_direct(f"folder:{folder}", ImageSpec(8, 8), cache_bytes=2**30)


@pytest.mark.second
def test_classifier_of_other_images_is_trained_again(images, tmp_path, caplog):
    caplog.set_level("INFO", logger="rdm_jax")
    digests = []
    for held_out in (20, 20, 30):
        parts = images.split(held_out)
        digests.append(
            classifier.classifier_space(
                *parts, tmp_path / "classifier.safetensors", train=True
            ).digest
        )
    assert digests[0] == digests[1] != digests[2]
    assert (
        caplog.text.count("classifier trained in") == 2
        and "it was trained on other images" in caplog.text
    )


@pytest.mark.parametrize("about", ["{", "[" * 5000, "[]", None])
def test_read_parameters_refuses_other_files(tmp_path, about):
    save_file({"w": np.ones(3, np.float32)}, tmp_path / "x", {"about": about} if about else None)
    with pytest.raises(InputError, match=r"x is not a classifier .*\. Use a classifier that"):
        classifier.read_parameters(tmp_path / "x", {"w": np.ones(3, np.float32)})


def test_classifier_names_the_extra_before_it_is_trained(images, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setattr(classifier, "_trained", None)
    with pytest.raises(InputError, match="safetensors is not installed") as refusal:
        classifier.classifier_space(images, None, tmp_path / "x.safetensors", train=True)
    assert refusal.value.fix == "Run pip install 'rdm_jax[weights]'."


def test_classifier_training_stops_between_steps(images, tmp_path):
    """It may take minutes, and a host may give a process half of one to end."""

    class Stopped(BaseException):
        pass

    calls = []

    def check_stop():
        calls.append(None)
        if len(calls) == 2:
            raise Stopped

    with pytest.raises(Stopped):
        classifier.classifier_space(
            images, None, tmp_path / "x.safetensors", train=True, check_stop=check_stop
        )
    assert len(calls) == 2 and not list(tmp_path.iterdir())
