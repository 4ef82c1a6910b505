"""The energy at high spatial frequencies, and its ratio between a set and the reference."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rdm_jax.evaluation.evaluator import RESULT
from rdm_jax.evaluation.high_frequency import high_frequency_energy
from rdm_jax.evaluation.statistics import ENERGY, Statistics, compare
from rdm_jax.evaluation.statistics_files import read_statistics, save_statistics
from rdm_jax.render.tables import result_table
from rdm_jax.runtime.errors import InputError
from tests.support.small_evaluation import SIZE, SPACE, config_of, measured, parts_of


def by_definition(image: np.ndarray) -> float:
    """From each coefficient: the products with cosines of 1/4 cycle per pixel or more."""
    x = image / 127.5 - 1
    height, width, _ = x.shape
    total = 0.0
    for u in range(height):
        for v in range(width):
            if max(u / (2 * height), v / (2 * width)) < 1 / 4:
                continue
            rows = np.cos(np.pi * u * (np.arange(height) + 0.5) / height)
            columns = np.cos(np.pi * v * (np.arange(width) + 0.5) / width)
            wave = np.outer(rows, columns)
            wave /= np.sqrt((wave**2).sum())
            total += (np.tensordot(wave, x, 2) ** 2).sum()
    return total / x.size


@pytest.mark.parametrize("shape", [(8, 8, 3), (9, 6, 1), (5, 12, 3), (1, 7, 1)])
def test_energy_is_that_of_high_frequencies(shape):
    images = np.random.default_rng(0).integers(0, 256, (3, *shape), dtype=np.uint8)
    found = jax.jit(high_frequency_energy)(images)
    assert found.shape == (3,) and found.dtype == np.float32
    np.testing.assert_allclose(found, [by_definition(image) for image in images], rtol=1e-5)


def test_energy_of_known_images():
    noise = np.random.default_rng(0).normal(127.5, 20, (4, 64, 64, 3)).round().astype(np.uint8)
    np.testing.assert_allclose(
        high_frequency_energy(jnp.asarray(noise)).mean(), 3 / 4 * (20 / 127.5) ** 2, rtol=0.02
    )
    flat = high_frequency_energy(jnp.full((2, 64, 64, 3), 200, jnp.uint8))
    assert flat.max() < 1e-12
    ramp = jnp.broadcast_to(jnp.arange(0, 256, 4, dtype=jnp.uint8)[:, None, None], (1, 64, 64, 3))
    assert high_frequency_energy(ramp).max() < 1e-6  # no jump between opposite edges
    stripes = jnp.tile(jnp.asarray([0, 255], jnp.uint8), 32)[:, None, None]
    stripes = jnp.broadcast_to(stripes, (1, 64, 64, 3))
    assert 0.98 < high_frequency_energy(stripes)[0] < 1  # the rest is the ends' in low frequencies


def test_ratio_sees_grain(source, relay, tmp_path):
    """The same images are at 1; smoothed they are below, and with grain above, as computed."""
    images, _ = parts_of(config_of(source))
    real = images.batch(np.arange(len(images)))["image"]
    noise = np.random.default_rng(0).normal(0, 40, real.shape)
    grainy = np.clip(np.rint(real + noise), 0, 255).astype(np.uint8)
    smooth = np.rint((real.astype(float) + np.roll(real, 1, 1)) / 2).astype(np.uint8)
    for name, x in (("real", real), ("grainy", grainy), ("smooth", smooth)):
        np.savez(tmp_path / f"{name}.npz", x)
    sets = ", ".join(f"npz:{tmp_path}/{name}.npz" for name in ("real", "grainy", "smooth"))
    results = measured(config_of(source, images=sets), relay, tmp_path)["results"]
    same, grain, smoothed = (row["metrics"]["high_frequency_ratio"] for row in results.values())
    np.testing.assert_allclose(same, 1, rtol=1e-6)
    assert smoothed < 0.9 and grain > 1.05
    energy, of_real = (high_frequency_energy(jnp.asarray(x)).mean() for x in (grainy, real))
    np.testing.assert_allclose(grain, energy / of_real, rtol=1e-5)
    written = json.loads((tmp_path / "evaluation" / RESULT).read_text())["results"]
    assert "| high frequency ratio |" in result_table(written)


def test_earlier_statistics_are_readable_and_leave_the_ratio_out(source, relay, tmp_path):
    """A reference.npz that an earlier version has written has no energy."""
    config = config_of(source, images="held_out")
    now = measured(config, relay, tmp_path)["results"]["held_out"]
    path = tmp_path / "evaluation/reference.npz"
    with np.load(path) as file:
        earlier = {name: file[name] for name in file.files if name != ENERGY}
        assert len(earlier) == len(file.files) - 1
    np.savez(tmp_path / "earlier.npz", **earlier)
    config = config_of(
        source, images="held_out", reference=f"npz:{tmp_path}/earlier.npz", name="earlier"
    )
    then = measured(config, relay, tmp_path)["results"]["held_out"]
    ratio = now["metrics"].pop("high_frequency_ratio")
    assert np.isfinite(ratio) and then["metrics"] == now["metrics"]
    assert [note for note in then["notes"] if note not in now["notes"]] == [
        "high_frequency_ratio: the reference's statistics do not have this energy"
    ]
    now["metrics"]["high_frequency_ratio"] = ratio
    *_, last = result_table({"now": now, "then": then}).splitlines()[3].split("|")[:-1]
    assert last.strip() == "-"


def statistics(energy: float | None) -> Statistics:
    features = np.random.default_rng(0).standard_normal((20, SIZE)).astype(np.float32)
    gaussian = features.mean(0).astype(np.float64), np.cov(features, rowvar=False)
    return Statistics({"set": "x"}, 20, {"features": gaussian}, features, energy=energy)


def test_statistics_files_hold_the_energy(tmp_path):
    for energy in (0.25, None):
        save_statistics(tmp_path / "x.npz", statistics(energy), SPACE)
        assert read_statistics(tmp_path / "x.npz", SPACE).energy == energy
    for wrong, words in (
        (np.float64(np.nan), "high_frequency_energy=nan"),
        (np.float64(-1), "high_frequency_energy=-1.0"),
        (np.zeros(2), r"of shape \(2,\)"),
        (np.int64(1), "int64"),
    ):
        save_statistics(tmp_path / "x.npz", statistics(None), SPACE)
        with np.load(tmp_path / "x.npz") as file:
            arrays = dict(file)
        np.savez(tmp_path / "x.npz", **arrays, **{ENERGY: wrong})
        with pytest.raises(InputError, match=words):
            read_statistics(tmp_path / "x.npz", SPACE)


def test_reference_without_high_frequencies():
    """The ratio to nothing is no number."""
    metrics, notes = compare(statistics(1e-15), statistics(0.1), SPACE)
    assert "high_frequency_ratio" not in metrics
    assert "high_frequency_ratio: the reference's statistics have none of this energy" in notes
    metrics, _ = compare(statistics(0.2), dataclasses.replace(statistics(0.1)), SPACE)
    assert metrics["high_frequency_ratio"] == 0.5
