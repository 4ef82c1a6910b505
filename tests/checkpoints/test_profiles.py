"""Profiles of averages: their widths, their inner products, and fits of one by others."""

import numpy as np
import pytest

from rdm_jax.checkpoints import profiles

KEPT = (0.05, 0.1)


def profile(time: float, width: float, tau: np.ndarray) -> np.ndarray:
    gamma = profiles.exponent(width)
    return np.where(tau <= time, (gamma + 1) * (tau / time) ** gamma / time, 0)


def grid(end: float, count: int = 200_000) -> tuple[np.ndarray, float]:
    """Midpoints of equal cells, and the size of a cell."""
    return (np.arange(count) + 0.5) * end / count, end / count


def average(path: np.ndarray, time: int, width: float) -> np.ndarray:
    """The average of path[0], ..., path[time - 1] by the power function's integral per step."""
    ends = (np.arange(time + 1) / time) ** (profiles.exponent(width) + 1)
    return np.diff(ends) @ path[:time]


@pytest.mark.parametrize("width", [0.001, 0.02, 0.05, 0.1, 0.2, 0.28])
def test_exponent_gives_the_width(width):
    tau, cell = grid(1.0)
    weights = profile(1.0, width, tau) * cell
    mean = weights @ tau
    deviation = np.sqrt(weights @ (tau - mean) ** 2)
    np.testing.assert_allclose([weights.sum(), deviation], [1, width], rtol=1e-4)


def test_exponent_of_known_profiles():
    """Of the constant one, and of the widths that EDM2 keeps (section 3.2)."""
    assert profiles.exponent(12**-0.5) == pytest.approx(0, abs=1e-9)
    assert profiles.exponent(0.05) == pytest.approx(16.97, abs=0.005)
    assert profiles.exponent(0.10) == pytest.approx(6.94, abs=0.005)


def test_inner_products_are_integrals():
    times, widths = np.array([30.0, 100.0, 100.0, 70.0]), (0.05, 0.05, 0.2, 0.28)
    exponents = np.array([profiles.exponent(width) for width in widths])
    tau, cell = grid(100.0)
    curves = np.stack([profile(*each, tau) for each in zip(times, widths, strict=True)])
    found = profiles.inner_products(times, exponents, times[1:3], exponents[1:3])
    np.testing.assert_allclose(found, curves @ curves[1:3].T * cell, rtol=1e-4)


@pytest.mark.parametrize("width", [0.03, 0.05, 0.08, 0.15, 0.22])
def test_fit_equals_the_average_tracked_directly(width):
    """Of a trajectory that drifts, bends and is noisy, as an optimizer's is."""
    random, steps = np.random.default_rng(0), 4096
    slow = np.cumsum(random.normal(size=(steps, 50)), 0) / np.sqrt(np.arange(1, steps + 1))[:, None]
    path = 3 + slow + 0.02 * random.normal(size=(steps, 50))
    at = [steps * n // 64 for n in range(1, 65)]
    times, widths = [float(time) for time in at for _ in KEPT], [*KEPT] * len(at)
    kept = np.stack([average(path, int(t), w) for t, w in zip(times, widths, strict=True)])
    weights, missed = profiles.fit(times, widths, float(steps), width)
    wanted = average(path, steps, width)
    error = np.linalg.norm(weights @ kept - wanted) / np.linalg.norm(wanted)
    assert error < 1e-4 and missed < 0.01
    # The nearest average that is kept is no substitute.
    nearest = kept[-2 + int(abs(width - KEPT[1]) < abs(width - KEPT[0]))]
    other = np.linalg.norm(nearest - wanted) / np.linalg.norm(wanted)
    assert width in KEPT or other > 10 * error


def test_fit_of_a_kept_profile_is_itself():
    weights, missed = profiles.fit([10.0, 10.0, 20.0, 20.0], [*KEPT, *KEPT], 20.0, 0.1)
    np.testing.assert_allclose(weights, [0, 0, 0, 1], atol=1e-9)
    assert missed < 1e-6


def test_fit_keeps_constants_and_says_what_it_misses():
    tau, cell = grid(80.0)
    times, widths = [40.0, 40.0, 80.0, 80.0], [*KEPT, *KEPT]
    weights, missed = profiles.fit(times, widths, 80.0, 0.2)
    assert weights.sum() == pytest.approx(1, abs=1e-12)
    curves = np.stack([profile(*each, tau) for each in zip(times, widths, strict=True)])
    wanted = profile(80.0, 0.2, tau)
    rest = np.sqrt(((wanted - weights @ curves) ** 2).sum() / (wanted**2).sum())
    assert missed == pytest.approx(rest, rel=1e-3) and missed > profiles.MISSED
    # Any other weights whose sum is 1 miss more.
    for change in ([0.1, -0.1, 0, 0], [0, 0.05, -0.05, 0], [0, 0, 0.1, -0.1]):
        changed = wanted - (weights + change) @ curves
        assert np.sqrt((changed**2).sum() / (wanted**2).sum()) > rest
    assert cell > 0


def test_fit_is_stable_for_many_snapshots():
    """Rounding of float32 parameters is not blown up."""
    at = np.arange(1, 257) * 8.0
    weights, missed = profiles.fit(
        [float(time) for time in at for _ in KEPT], [*KEPT] * len(at), float(at[-1]), 0.15
    )
    assert missed < 1e-3 and np.abs(weights).sum() < 4
