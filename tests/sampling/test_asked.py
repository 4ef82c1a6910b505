"""What a caller asks a pipeline for: classes, small images, progress; and what is compiled."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from rdm_jax.data.classes import Classes
from rdm_jax.diffusion.pixels import Pixels
from rdm_jax.diffusion.samplers import Heun, RelayHeun
from rdm_jax.runtime.errors import InputError
from rdm_jax.sampling.labels import labels_asked
from rdm_jax.sampling.pipeline import RelayPipeline
from tests.support.captioned_runs import write_run
from tests.support.configs import tiny_config

SEEDS, BATCH = np.arange(4), 8
OWN = ["a", "b"]  # the classes of the seeds
COMPILING = "/jax/core/compile/"


def config_of():
    """Two stages of few evaluations, as they are to be compiled."""
    config = tiny_config("images").with_stage(1, sampler=Heun(steps=2, order=1))
    return config.with_stage(2, sampler=RelayHeun(steps=5, order=1))


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("asked") / "run", config_of(), text=None)


@pytest.fixture(scope="module")
def pipe(workdir):
    return RelayPipeline(config_of(), workdir)


@pytest.fixture(scope="module")
def own(pipe):
    """The images of the seeds, of the classes a, b, a, b."""
    return pipe.sample(SEEDS)


def small_images(count: int = 3, **dtype) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 4, 4, 3), np.uint8, **dtype)


@pytest.mark.parametrize("labels", ["b", 1, np.int32(1), ["b"], [1], np.ones(2, np.int64)])
def test_labels_are_those_asked_for(pipe, own, labels):
    for images, balanced in zip(pipe.sample(SEEDS, labels=labels), own, strict=True):
        same = [np.array_equal(*pair) for pair in zip(images, balanced, strict=True)]
        assert same == [False, True, False, True]


def test_labels_are_taken_in_turn(pipe):
    assert labels_asked(["b", 0, "a"], 5, pipe.classes).tolist() == [1, 0, 0, 1, 0]
    for several in (jnp.array([1, 0]), np.array(["b", "a"]), [np.int8(1), "a"], range(1, -1, -1)):
        assert labels_asked(several, 3, pipe.classes).tolist() == [1, 0, 1]
    for one in (jnp.int32(1), np.array(1), np.int64(1), np.array("b")):
        assert labels_asked(one, 2, pipe.classes).tolist() == [1, 1]
    seeds = [7, 7, 2**32 - 1]
    images = pipe.sample(seeds, labels=["b", "b", 0])[-1]
    np.testing.assert_array_equal(images[0], images[1])
    np.testing.assert_array_equal(images[2], pipe.sample(seeds[2:], labels=0)[-1][0])


def test_small_images_replace_those_of_the_first_stage(pipe, own, workdir, tmp_path):
    """As those of `sampling.low` do, in either scale."""
    small = small_images()
    given, images = pipe.sample(SEEDS, small=small, labels=OWN)
    np.testing.assert_array_equal(given, small[[0, 1, 2, 0]])
    assert (images != own[1]).any((1, 2, 3)).all()
    scaled = np.asarray(Pixels().encode(jnp.asarray(small)), np.float64)
    for i, image in enumerate(small):
        (tmp_path / "low").mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / f"low/{i}.png")
    sampling = dataclasses.replace(config_of().sampling, low=f"folder:{tmp_path / 'low'}")
    low = RelayPipeline(dataclasses.replace(config_of(), sampling=sampling), workdir)
    for again in (pipe.sample(SEEDS, small=scaled, labels=OWN), low.sample(SEEDS)):
        np.testing.assert_array_equal(again[0], given)
        np.testing.assert_array_equal(again[1], images)
    one = pipe.sample(SEEDS[:1], small=small[0], labels="a")
    np.testing.assert_array_equal(one[1], images[:1])
    with pytest.raises(InputError, match=r"small does not go with sampling.low='folder:"):
        low.sample(SEEDS, small=small)


def test_progress_counts_the_images(pipe):
    counted = []
    pipe.sample(range(2 * BATCH + 3), progress=counted.append)
    assert counted == [BATCH, BATCH, 3]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"labels": "c"}, r"labels='\[\"c\"\]': there is no class 'c'"),
        ({"labels": 2}, r"labels=2 is not a class. Use an index from 0 to 1, or one of .* a, b"),
        ({"labels": -1}, "labels=-1 is not a class"),
        ({"labels": np.array(1.0)}, "labels=1.0 is not a class. Use an index from 0 to 1"),
        ({"labels": np.array([0, 1.7])}, "labels=0.0 is not a class"),
        ({"labels": np.ones((1, 2), int)}, r"labels=\[1, 1\] is not a class"),
        ({"labels": np.array([True])}, "labels=True is not a class"),
        ({"labels": "0-1"}, "labels='0-1' is not a class"),
        ({"labels": []}, r"labels=\[\] has no classes"),
        ({"prompts": "a cat"}, "prompts='a cat' is of no use"),
        ({"small": np.zeros((1, 8, 8, 3), np.uint8)}, r"\(1, 8, 8, 3\).* = \(4, 4, 3\)"),
        ({"small": np.zeros((4, 4, 1), np.uint8)}, r"small has the shape \(4, 4, 1\)"),
        ({"small": np.zeros((0, 4, 4, 3), np.uint8)}, r"small has the shape \(0, 4, 4, 3\)"),
        ({"small": np.zeros((4, 4, 3), int)}, "dtype int64. Give uint8, or float"),
        ({"small": np.full((4, 4, 3), 255.0)}, r"outside of \[-1, 1\] or not finite. Scale"),
        ({"small": np.full((4, 4, 3), np.nan)}, r"outside of \[-1, 1\] or not finite"),
        ({"small": np.zeros((4, 4, 3), np.uint8)}, "small has no classes.* Give labels"),
        ({"seeds": [-1]}, r"seeds=\[-1\] cannot be used"),
        ({"seeds": [2**32]}, "0 to 4294967295"),
        ({"seeds": np.array([0.5])}, "seeds="),
    ],
)
def test_what_cannot_be_used_is_refused(pipe, asked, message):
    with pytest.raises(InputError, match=message):
        pipe.sample(**{"seeds": SEEDS} | asked)


def test_labels_of_networks_without_classes_are_refused():
    with pytest.raises(InputError, match="labels=1 is of no use: no image depends on classes"):
        labels_asked(1, 4, Classes())


def test_nothing_is_compiled_twice(pipe, own):
    """Whatever the seeds, their number, the classes and the small images are."""
    compiled = []

    def note(event, *_, **__):
        compiled.append(event)

    pipe.sample(SEEDS, small=small_images(), labels=OWN)
    pipe.sample(SEEDS, small=Pixels().encode(jnp.asarray(small_images())), labels=OWN)
    jax.monitoring.register_event_duration_secs_listener(note)
    pipe.sample(range(100, 100 + BATCH + 1), labels=["b", "a"])
    pipe.sample([5], labels="a", small=small_images(1))
    pipe.sample(SEEDS, small=np.float32(np.zeros((2, 4, 4, 3))), labels=OWN)
    assert not [event for event in compiled if event.startswith(COMPILING)]
    jax.jit(lambda x: x + 1)(np.zeros(3))
    assert [event for event in compiled if event.startswith(COMPILING)]
