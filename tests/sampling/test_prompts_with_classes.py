"""Prompts of networks that know classes as well: each has the class that it was trained with."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from rdm_jax import modes
from rdm_jax.data.classes import Classes
from rdm_jax.diffusion.guidance import Autoguidance
from rdm_jax.modes import run
from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.signals import StopOnSignal
from rdm_jax.sampling.made_with import describe
from rdm_jax.sampling.pipeline import RelayPipeline
from rdm_jax.workdir import Workdir
from tests.support import captioned_runs
from tests.support.captioned_runs import captioned, config_of, write_run
from tests.support.configs import tiny_config

APPLE, CAT = "a red apple", "a sleeping cat"
GIVEN = f"{APPLE}; {CAT}"
SEEDS = np.arange(6)
KEPT = {"training": (APPLE, "a dog", APPLE), "held_out": (CAT,)}
CLASSES = {"training_classes": ("b", "a", "a"), "held_out_classes": ("b",)}
NO_CLASSES = "has no classes, on which the images depend, too. Set --config.sampling.labels"


def both(**sampling):
    """Two stages that are conditioned on text and classes."""
    return config_of(classes=True, **sampling)


@pytest.fixture(scope="module")
def encoder():
    with pytest.MonkeyPatch.context() as patch:
        yield captioned_runs.open_fake(patch)


@pytest.fixture(scope="module")
def workdir(encoder, tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run"), both(), **KEPT, **CLASSES)


def test_captions_of_the_run_keep_their_classes(workdir):
    made = RelayPipeline(both(), workdir)
    assert made.classes == Classes(("a", "b")) and made.labels(SEEDS).tolist() == [1, 0, 0] * 2
    assert made.prompts(SEEDS[:4]) == [APPLE, "a dog", APPLE, APPLE]
    assert made.captions_below(SEEDS[:2]) == [f"{APPLE} (b)", "a dog (a)"]
    held_out = RelayPipeline(both(prompts="held_out"), workdir)
    assert held_out.captions_below(SEEDS[:1]) == [f"{CAT} [held out] (b)"]
    # Asked for, classes are those of the seeds; and a caption counts once.
    asked = RelayPipeline(both(labels="a, b"), workdir)
    assert asked.labels(SEEDS).tolist() == [0, 1] * 3 and asked.listed.texts == (APPLE, "a dog")
    text_only = RelayPipeline(
        config_of(), write_run(workdir.with_name("text"), config_of(), **KEPT)
    )
    assert not len(text_only.classes) and text_only.listed.texts == (APPLE, "a dog")


def test_samples_of_other_classes_are_others(workdir, tmp_path):
    """Those of an earlier version had the seeds' classes."""
    config = both()
    of_the_run, others = (
        describe(config, RelayPipeline(config, folder))["prompts"]
        for folder in (
            workdir,
            write_run(tmp_path, config, **KEPT, **CLASSES | {"training_classes": ("a", "b", "b")}),
        )
    )
    assert of_the_run["count"] == others["count"] == 3 and of_the_run != others


def test_prompts_need_classes(workdir):
    with pytest.raises(InputError, match=f"prompts='{GIVEN}' {NO_CLASSES}"):
        RelayPipeline(both(prompts=GIVEN), workdir)
    with pytest.raises(InputError, match=rf"prompts=\['{APPLE}'\] {NO_CLASSES}"):
        RelayPipeline(both(), workdir).sample(SEEDS, prompts=[APPLE])
    with_classes = RelayPipeline(both(), workdir)._asked(SEEDS, labels="b", prompts=APPLE)
    assert with_classes.labels.tolist() == [1] * len(SEEDS)
    for labels, wanted in (("b", [1, 1]), ("a, b", [0, 1]), ("random", None)):
        made = RelayPipeline(both(prompts=GIVEN, labels=labels), workdir)
        assert wanted in (None, made.labels(SEEDS[:2]).tolist())
        assert made.labels(SEEDS).min() >= 0


def test_prompts_need_classes_before_training(encoder, tmp_path):
    """At once by the config alone, or once the classes are known."""
    with pytest.raises(InputError, match=NO_CLASSES):
        run(both(prompts=APPLE), tmp_path / "run")
    config = config_of(prompts=APPLE)
    config = config.with_stage(2, condition=tiny_config("images").stage(2).condition)
    job = modes.Job(config, Workdir(tmp_path), "all", None, StopOnSignal(), False, False, ())
    images = captioned("abc")
    with pytest.raises(InputError, match=NO_CLASSES):
        job.train({number: modes.Split(images, images, None) for number in (1, 2)}, None)
    assert not [*tmp_path.glob("**/checkpoints")]


def test_classes_of_captions_that_are_not_known(encoder, tmp_path):
    """An earlier version did not keep them; those of another run may be others."""
    folder = write_run(tmp_path, both(), **KEPT)
    old = json.loads((folder / "captions.json").read_text())
    for name in CLASSES:
        del old[name]
    (folder / "captions.json").write_text(json.dumps(old))
    with pytest.raises(InputError, match="captions.json does not have the classes of its captions"):
        RelayPipeline(both(), folder).labels(SEEDS)
    asked = RelayPipeline(both(labels="a"), folder)
    assert asked.prompts(SEEDS[:2]) == [APPLE, "a dog"] and not asked.labels(SEEDS).any()
    (folder / "captions.json").write_text(json.dumps(old | {"training_classes": ["b", "x", "a"]}))
    with pytest.raises(InputError, match="has captions of the class 'x', and the networks know a"):
        RelayPipeline(both(), folder).labels(SEEDS)


def test_classes_of_small_images_come_first(workdir, tmp_path):
    for number, name in enumerate("ab"):
        (tmp_path / name).mkdir()
        pixels = np.full((4, 4, 3), 100 * number, np.uint8)
        Image.fromarray(pixels).save(tmp_path / name / f"{number}.png")
    made = RelayPipeline(both(prompts=APPLE, low=f"folder:{tmp_path}"), workdir)
    assert made.labels(SEEDS).tolist() == [0, 1] * 3
    assert made.sample(SEEDS[:2], prompts=CAT)[-1].shape == (2, 8, 8, 3)


@pytest.mark.second
def test_images_depend_on_the_class_beside_the_prompt(workdir):
    (_, one), (_, other) = (
        RelayPipeline(both(prompts=APPLE, labels=label), workdir).sample(SEEDS[:2])
        for label in "ab"
    )
    assert np.abs(one.astype(int) - other).max() > 0
    *_, own = RelayPipeline(both(), workdir).sample(SEEDS[:1])
    np.testing.assert_array_equal(own[0], other[0])  # the first caption of the run, of class b


@pytest.mark.second
def test_guide_that_knows_classes_gets_those_of_the_captions(workdir, tmp_path):
    """Also where the stage itself knows text alone."""
    text_only = write_run(tmp_path / "text", config_of(), **KEPT, **CLASSES)
    write_run(tmp_path / "classes", tiny_config("images"), text=None)
    guidance = (Autoguidance(1.5, f"{tmp_path}/classes/stage1"),)
    config = config_of().with_stage(1, guidance=guidance)
    made = RelayPipeline(config, text_only)
    assert made.labels(SEEDS).tolist() == [1, 0, 0] * 2
    sampling = dataclasses.replace(config.sampling, prompts=APPLE)
    asked = dataclasses.replace(config, sampling=sampling)
    with pytest.raises(InputError, match=NO_CLASSES):
        RelayPipeline(asked, text_only)
    found = {}
    for label in "ab":
        labelled = dataclasses.replace(sampling, labels=label)
        labelled = dataclasses.replace(config, sampling=labelled)
        found[label] = RelayPipeline(labelled, text_only).sample(SEEDS[:1])[-1]
    assert np.abs(found["a"].astype(int) - found["b"]).max() > 0
    np.testing.assert_array_equal(made.sample(SEEDS[:1])[-1], found["b"])
