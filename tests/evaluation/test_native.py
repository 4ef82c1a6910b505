"""Stages measured at their own size, against a reference of that size."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from rdm_jax.config.validate import check_config
from rdm_jax.data.image_sets import ImageSet
from rdm_jax.evaluation.evaluator import Evaluator, read_result
from rdm_jax.evaluation.metrics import frechet_distance
from rdm_jax.evaluation.references import means_of
from rdm_jax.render import pictures
from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.signals import StopOnSignal
from rdm_jax.sampling.stage_preview import StagePreview
from tests.support.small_evaluation import SIZE, SPACE, config_of, means, measured, parts_of


def frechet(reference, sample):
    """Of images, in the features of SPACE, by NumPy's statistics."""
    features = [
        np.asarray(means(SPACE.params, images)["features"], np.float64)
        for images in (reference, sample)
    ]
    return frechet_distance(
        *(f(x) for x in features for f in (lambda x: x.mean(0), lambda x: np.cov(x, rowvar=False)))
    )


def training_means(config):
    """What stage 1 learns from, as bytes."""
    images = parts_of(config)[0]
    images = images.batch(np.arange(len(images)))["image"].reshape(-1, 4, 2, 4, 2, 3)
    return np.rint(images.mean((2, 4), dtype=np.float64)).astype(np.uint8)


@pytest.mark.second
def test_native_stage_is_measured_at_its_own_size(source, relay, tmp_path):
    config = config_of(
        source,
        features="inception",
        images="stage1, stage1@native, samples",
        native_reference="training",
        kept=30,
    )
    check_config(config)
    result = measured(config, relay, tmp_path)
    rows, (stage1, _) = result["results"], relay.sample(np.arange(20))
    wanted = frechet(training_means(config), stage1)
    np.testing.assert_allclose(
        rows["stage1@native"]["metrics"]["frechet_distance"], wanted, rtol=1e-4
    )
    assert not np.isclose(rows["stage1"]["metrics"]["frechet_distance"], wanted, rtol=0.01)
    assert result["made_with"]["native_references"].keys() == {"stage1@native"}
    shown = np.asarray(Image.open(tmp_path / "evaluation/stage1_native.png"))[
        pictures.MARGIN :, pictures.MARGIN :
    ]
    np.testing.assert_array_equal(shown[:96:24, :96:24], stage1[0])  # 4 x 4 cells
    without = measured(
        config_of(source, images="stage1, samples", name="without", kept=30), relay, tmp_path
    )
    assert without["results"] == {name: rows[name] for name in ("stage1", "samples")}
    assert "native_references" not in without["made_with"]
    # The same again, from the statistics that were kept: published ones would be read in the same
    # way.
    path = tmp_path / "evaluation/reference_stage1.npz"
    given = config_of(
        source, images="stage1@native", native_reference=f"npz:{path}", name="again", kept=30
    )
    assert (
        measured(given, relay, tmp_path)["results"]["stage1@native"]["metrics"]
        == rows["stage1@native"]["metrics"]
    )
    own = tmp_path / "own.npz"
    pixels = (
        training_means(config)
        .astype(np.float64)
        .reshape(40, -1)[:, : 8 * SIZE]
        .reshape(40, SIZE, 8)
        .mean(-1)
        / 64
    )
    np.savez(own, mu=pixels.mean(0), sigma=np.cov(pixels, rowvar=False))
    given = config_of(source, images="stage1@native", native_reference=f"npz:{own}", name="edm")
    space = dataclasses.replace(SPACE, name="inception")
    metrics = measured(given, relay, tmp_path, space)["results"]["stage1@native"]["metrics"]
    assert metrics.keys() == {"fid"} and np.isclose(metrics["fid"], wanted, rtol=1e-4)


@pytest.mark.second
def test_native_stage_during_training(source, relay, tmp_path):
    config = config_of(
        source, features="inception", native_reference="training", seeds_in_training="0-18"
    )
    evaluator = Evaluator(config, *parts_of(config), tmp_path, StopOnSignal(), SPACE)
    for number, name in ((1, "stage1@native"), (2, "stage2")):
        sampler, params = relay._stages[number - 1]
        alone = StagePreview(config, number, parts_of(config)[1])
        alone._sampler = sampler  # compiled already
        metrics = evaluator.run_stage(number, alone, params, 64, tmp_path / name)
        result = read_result(tmp_path / name / "evaluation.json")
        assert result["results"].keys() == {name} and result["results"][name]["metrics"] == metrics
        images, _ = alone.sample(params, np.arange(19))
        training = (
            parts_of(config)[0].batch(np.arange(40))["image"]
            if number == 2
            else training_means(config)
        )
        np.testing.assert_allclose(
            metrics["frechet_distance"], frechet(training, images), rtol=1e-4
        )


@pytest.mark.parametrize(
    ("reference", "pattern"),
    [
        ("npz:/nowhere/x.npz", "nowhere"),
        ("npz:{}", r"images of shape \(20, 8, 8, 3\).*4, 4, 3"),
        ("prepared:/nowhere", "nowhere"),
    ],
)
def test_native_reference_is_refused_early(source, tmp_path, reference, pattern):
    values = {
        "mu": np.zeros(SIZE),
        "sigma": np.eye(SIZE),
        "arr_0": np.zeros((20, 8, 8, 3), np.uint8),
    }
    np.savez(tmp_path / "large.npz", **values)
    config = config_of(
        source, features="inception", native_reference=reference.format(tmp_path / "large.npz")
    )
    with pytest.raises(InputError, match=pattern):
        Evaluator(
            config,
            *parts_of(config),
            tmp_path,
            StopOnSignal(),
            dataclasses.replace(SPACE, name="inception"),
        )


def test_native_reference_of_a_stage_with_its_own_source(source):
    config = config_of(source, features="inception", native_reference="training")
    own = dataclasses.replace(config.stages[0], source="folder:other")
    with pytest.raises(
        InputError,
        match="native_reference='training' cannot be used.*'prepared:PATH' or.*config.stage1.source",
    ):
        check_config(dataclasses.replace(config, stages=(own, config.stages[1])))


def test_means_of():
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (5, 4, 6, 3), np.uint8)
    images = ImageSet([(image, n % 2) for n, image in enumerate(pixels)], (4, 6, 3), ("a", "b"))
    small = means_of(images, 2)
    assert small.image_shape == (2, 3, 3) and small.class_names == ("a", "b") and len(small) == 5
    batch = small.batch([3, 0])
    np.testing.assert_array_equal(
        batch["image"], np.rint(pixels[[3, 0]].reshape(2, 2, 2, 3, 2, 3).mean((2, 4)))
    )
    assert batch["label"].tolist() == [1, 0]
