"""Statistics: gathered, saved, read from published files, compared; and what is refused of
strangers' files."""

import io
import json
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest

from rdm_jax.evaluation.features import FeatureSpace
from rdm_jax.evaluation.high_frequency import high_frequency_energy
from rdm_jax.evaluation.statistics import ENERGY, Statistics, StatisticsAccumulator, compare
from rdm_jax.evaluation.statistics_files import read_statistics, save_statistics
from rdm_jax.runtime import sharding
from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.npz import Npz
from tests.support.measured_images import CLASSES, SIZE, project


def space(name: str = "projection", digest: str = "0" * 64) -> FeatureSpace:
    params = np.random.default_rng(0).standard_normal((16, 12)).astype(np.float32)
    sizes = {"features": SIZE, "spatial": 4, "logits": CLASSES}
    return FeatureSpace(name, digest, sizes, params, project, ("a", "b", "c"))


def pictures(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    return random.integers(0, 256, (count, 4, 4, 1), np.uint8), random.integers(
        -1, CLASSES, count
    ).astype(np.int32)


def gather(images, labels, batch=8, stop_at=None, kept=100) -> Statistics:
    """Accumulated statistics; the state moves to another accumulator at image `stop_at`."""

    def make():
        return StatisticsAccumulator("test", space(), len(images), kept=kept, shown=np.arange(3))

    accumulator = make()
    for first in range(0, len(images), batch):
        here = images[first : first + batch]
        outputs = project(
            jnp.asarray(space().params), jnp.asarray(np.resize(here, (batch, 4, 4, 1)))
        )
        outputs[ENERGY] = high_frequency_energy(jnp.asarray(np.resize(here, (batch, 4, 4, 1))))
        outputs = {
            name: sharding.put_batch(np.asarray(x), sharding.local_mesh())
            for name, x in outputs.items()
        }
        accumulator.add(first, outputs, here, labels[first : first + batch])
        if stop_at == first:
            state, accumulator = {k: np.array(v) for k, v in accumulator.state().items()}, make()
            accumulator.set_state(state)
    return accumulator.statistics({"set": "test"})


def test_accumulator_matches_numpy():
    images, labels = pictures(60)
    found = gather(images, labels)
    outputs = {
        name: np.asarray(x, np.float64) for name, x in project(space().params, images).items()
    }
    for name in ("features", "spatial"):
        mean, covariance = found.gaussians[name]
        np.testing.assert_allclose(mean, outputs[name].mean(0), rtol=1e-5)
        np.testing.assert_allclose(covariance, np.cov(outputs[name], rowvar=False), atol=1e-6)
    p = np.exp(outputs["logits"]) / np.exp(outputs["logits"]).sum(1, keepdims=True)
    divergence = (p * np.log(p / p.mean(0))).sum(1).mean()
    np.testing.assert_allclose(found.scores["classifier_score"], np.exp(divergence), rtol=1e-6)
    labelled = labels >= 0  # others are not counted
    np.testing.assert_allclose(found.scores["accuracy"], (p.argmax(1) == labels)[labelled].mean())
    np.testing.assert_allclose(found.features, outputs["features"], atol=1e-5)
    energy = np.asarray(high_frequency_energy(jnp.asarray(images)), np.float64)
    np.testing.assert_allclose(found.energy, energy.mean(), rtol=1e-6)


@pytest.mark.parametrize("stop_at", [0, 24])
def test_accumulator_resumes_bit_equal(stop_at):
    images, labels = pictures(60)
    straight, stopped = gather(images, labels), gather(images, labels, stop_at=stop_at)
    for name, gaussian in straight.gaussians.items():
        for one, other in zip(gaussian, stopped.gaussians[name], strict=True):
            np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(straight.features, stopped.features)
    assert straight.scores == stopped.scores and straight.energy == stopped.energy


def test_accumulator_keeps_random_features():
    images, labels = pictures(60)
    one, other = gather(images, labels, kept=20), gather(images, labels, batch=16, kept=20)
    assert one.features.shape == (20, SIZE)
    np.testing.assert_allclose(one.features, other.features, atol=1e-6)
    everything = gather(images, labels).features
    places = [np.abs(everything - row).sum(1).argmin() for row in one.features]
    assert places == sorted(set(places)) and max(places) > 40 and places != list(range(20))


def test_accumulator_needs_all_images():
    accumulator = StatisticsAccumulator("test", space(), 10, kept=10, shown=np.arange(0))
    with pytest.raises(RuntimeError, match="0 of 10"):
        accumulator.statistics({})


def test_accumulator_refuses_features_that_are_not_finite():
    images, labels = pictures(8)
    outputs = project(jnp.asarray(space().params), jnp.asarray(images))
    outputs["features"] = outputs["features"].at[5, 2].set(jnp.nan)
    with pytest.raises(InputError, match="features of images 0 to 7 of test are not finite"):
        StatisticsAccumulator("test", space(), 8, kept=8, shown=np.arange(0)).add(
            0, outputs, images, labels
        )


def test_statistics_files_round_trip(tmp_path):
    written = gather(*pictures(60))
    save_statistics(tmp_path / "ours.npz", written, space())
    read = read_statistics(tmp_path / "ours.npz", space())
    assert read.count == 60 and read.about["images"] == {"set": "test"}
    np.testing.assert_array_equal(read.features, written.features)
    for name, gaussian in written.gaussians.items():
        for one, other in zip(gaussian, read.gaussians[name], strict=True):
            np.testing.assert_array_equal(one, other)
    metrics, notes = compare(read, written, space())
    assert (
        abs(metrics["frechet_distance"]) < 1e-9 and abs(metrics["spatial_frechet_distance"]) < 1e-9
    )
    assert metrics["precision"] == metrics["recall"] == 1.0 and notes == []
    names = {
        "frechet_distance",
        "spatial_frechet_distance",
        "classifier_score",
        "accuracy",
        "precision",
        "recall",
        "kid",
        "high_frequency_ratio",
    }
    assert metrics["high_frequency_ratio"] == 1.0
    assert metrics.keys() == names | {"kid_standard_error"}


def published(path, *, without: tuple[str, ...] = (), **changed) -> None:
    """Inception's statistics as ADM publishes them, in small."""
    random = np.random.default_rng(0)
    arrays = {}
    for mean, covariance, size in (("mu", "sigma", SIZE), ("mu_s", "sigma_s", 4)):
        values = random.standard_normal((50, size))
        arrays |= {mean: values.mean(0), covariance: np.cov(values, rowvar=False)}
    np.savez(
        path, **{name: array for name, array in (arrays | changed).items() if name not in without}
    )


def test_read_statistics_of_others(tmp_path):
    published(tmp_path / "adm.npz")
    published(tmp_path / "edm.npz", without=("mu_s", "sigma_s"))
    sample = gather(*pictures(60))
    metrics, notes = compare(
        read_statistics(tmp_path / "adm.npz", space("inception")), sample, space("inception")
    )
    assert (
        {"fid", "sfid"} <= metrics.keys()
        and "precision" not in metrics
        and "no images" in notes[-1]
    )
    metrics, notes = compare(
        read_statistics(tmp_path / "edm.npz", space("inception")), sample, space("inception")
    )
    assert "fid" in metrics and "sfid" not in metrics and "sfid: the reference" in notes[0]


def test_compare_flags_small_sets():
    few = gather(*pictures(SIZE))
    metrics, notes = compare(few, gather(*pictures(60)), space())
    assert "frechet_distance" in metrics and any(
        "6 images are no more than its 6 features" in note for note in notes
    )
    with pytest.raises(InputError, match="sets of 3 images, which are too few"):
        compare(gather(*pictures(3)), few, space())


class Bomb:
    def __reduce__(self):
        return (open, ("/tmp/canary-of-rdm-jax", "w"))


REFUSED = {
    "another size": (
        {"mu": np.zeros(7), "sigma": np.eye(7)},
        "inception",
        r"mu of shape \(7,\)\. Use shape \(6,\)",
    ),
    "size that does not fit": ({"sigma": np.eye(5)}, "inception", r"sigma of shape \(5, 5\)"),
    "not finite": ({"mu": np.full(SIZE, np.nan)}, "inception", "not finite"),
    "infinite covariance": ({"sigma": np.full((SIZE, SIZE), np.inf)}, "inception", "not finite"),
    "no covariance": ({"sigma": np.triu(np.ones((SIZE, SIZE)))}, "inception", "not symmetric"),
    "negative variances": (
        {"sigma": np.diag([1.0, 1, 1, 1, 1, -0.1])},
        "inception",
        "a variance is negative",
    ),
    "features of another dtype": (
        {"features": np.zeros((9, SIZE))},
        "inception",
        r"float64\. Use float32 of shape",
    ),
    "number of images": (
        {"about": np.array('{"space": {}, "count": "many"}')},
        "inception",
        "'about' is damaged",
    ),
    "objects": ({"more": np.array([Bomb()], object)}, "inception", "never loaded"),
    "whole numbers": ({"mu": np.zeros(SIZE, np.int64)}, "inception", "mu of shape"),
    "of inception, not of these": ({}, "projection", "statistics of other features"),
    "of other weights": (
        {"about": np.array('{"space": {"name": "inception", "digest": "ab"}, "count": 1}')},
        "inception",
        "other feat",
    ),
    "deep about": ({"about": np.array("[" * 5000)}, "inception", "'about' is damaged"),
    "damaged about": ({"about": np.array("{")}, "inception", "'about' is damaged"),
    "features of another size": (
        {"features": np.zeros((9, 2))},
        "inception",
        r"features of shape \(9, 2\)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_read_statistics_refuses_other_files(tmp_path, case):
    changed, name, pattern = REFUSED[case]
    published(tmp_path / "reference.npz", **changed)
    with pytest.raises(InputError, match=pattern) as caught:
        read_statistics(tmp_path / "reference.npz", space(name))
    message = str(caught.value)
    assert message.startswith(str(tmp_path)) and "\n" not in message
    assert message.endswith(".")  # the remedy; a problem alone has no final stop


def damaged(case: str) -> bytes:
    file = io.BytesIO()
    np.savez(file, x=np.arange(600, dtype=np.float32).reshape(100, 6))
    if case == "cut":
        return file.getvalue()[:700]
    if case == "no zip":
        return b"PK nothing"
    if case == "odd header":
        return file.getvalue().replace(b"{'descr'", b"(((((((((")
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<f4", "fortran_order": False, "shape": (10**9, 6)}
    )
    with zipfile.ZipFile(
        file, "w", zipfile.ZIP_DEFLATED
    ) as archive:  # says that it is large, and is not
        archive.writestr("x.npy", header.getvalue() + bytes(1000))
    return file.getvalue()


@pytest.mark.parametrize("case", ["cut", "no zip", "odd header", "huge"])
def test_npz_refuses_damaged_files(tmp_path, case):
    path = tmp_path / "x.npz"
    path.write_bytes(damaged(case))
    with pytest.raises(InputError, match="x.npz cannot be used"), Npz(path) as file:
        file.read("x")


def test_npz_notices_a_flipped_bit(tmp_path):
    np.savez(tmp_path / "x.npz", x=np.zeros((100, 6)))
    data = bytearray((tmp_path / "x.npz").read_bytes())
    data[2000] ^= 1
    (tmp_path / "x.npz").write_bytes(data)
    with pytest.raises(InputError, match="damaged"), Npz(tmp_path / "x.npz") as file:
        file.read("x")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_reads_rows_in_any_order(tmp_path, save):
    x = np.random.default_rng(0).integers(0, 256, (50, 4, 4, 3), np.uint8)
    save(tmp_path / "x.npz", images=x, labels=np.arange(50), meta=json.dumps({}))
    with Npz(tmp_path / "x.npz") as file:
        assert file.arrays["images"] == ((50, 4, 4, 3), np.uint8)
        for first, count in ((0, 8), (8, 8), (30, 5), (2, 3), (45, 5)):
            np.testing.assert_array_equal(
                file.rows("images", first, count), x[first : first + count]
            )
        np.testing.assert_array_equal(file.read("labels"), np.arange(50))
