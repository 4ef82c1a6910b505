import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats

from rdm_jax.diffusion import schedules
from tests.support.precision import enable_x64

# ImageNet; CelebA-HQ in training; CelebA-HQ in sampling, whose clock would end beyond every sigma:
# t L < 1 only up to 0.952.
CLOCKS = {
    "imagenet": (schedules.Clock(length=0.93, blur_sigma_max=3.0), 1.0),
    "celeba": (schedules.Clock(length=0.89, blur_sigma_max=2.0), 1.0),
    "celeba-sampling": (schedules.Clock(length=1.05, blur_sigma_max=2.0), 0.94),
}
clocks = pytest.mark.parametrize(("clock", "end"), CLOCKS.values(), ids=CLOCKS.keys())
sigma_of = jax.jit(lambda clock, t: clock.sigma(t), static_argnums=0)
time_of = jax.jit(lambda clock, sigma: clock.time(sigma), static_argnums=0)
# Phi and its inverse in float32: relative errors of 6e-8, times 20 where the clock's distribution
# is thinnest.
FLOAT32 = 1e-5


@clocks
def test_clock_time_inverts_sigma(clock, end):
    t = jnp.linspace(0.001, end, 200)
    chex.assert_trees_all_close(time_of(clock, sigma_of(clock, t)), t, rtol=FLOAT32)


@clocks
def test_clock_sigma_inverts_time(clock, end):
    sigma = jnp.geomspace(0.008, float(sigma_of(clock, jnp.asarray(end))), 200)
    chex.assert_trees_all_close(sigma_of(clock, time_of(clock, sigma)), sigma, rtol=FLOAT32)


@clocks
def test_clock_round_trip_in_float64(clock, end):
    with enable_x64(True):
        t = jnp.linspace(0.001, end, 200)
        chex.assert_trees_all_close(time_of(clock, sigma_of(clock, t)), t, rtol=1e-12)


@clocks
def test_clock_is_lognormal(clock, end):
    sigma = np.geomspace(0.008, float(sigma_of(clock, jnp.asarray(end))), 50)
    share = scipy.stats.lognorm(s=1.2, scale=np.exp(-1.2)).cdf(sigma) / clock.length
    chex.assert_trees_all_close(
        np.asarray(time_of(clock, jnp.asarray(sigma, jnp.float32))),
        share.astype(np.float32),
        rtol=FLOAT32,
    )


@clocks
def test_clock_noise_and_blur_rise_with_time(clock, end):
    t = jnp.linspace(0.001, end, 200)
    assert np.all(np.diff(sigma_of(clock, t)) > 0)
    assert np.all(np.diff(clock.blur_sigma(t)) > 0)


@pytest.mark.parametrize(("name", "sigma"), [("imagenet", 1.770), ("celeba", 1.312)])
def test_clock_published_ends(name, sigma):
    assert float(sigma_of(CLOCKS[name][0], jnp.asarray(1.0))) == pytest.approx(
        sigma, abs=5e-4
    )  # published to three places


@clocks
def test_clock_blur_ends(clock, end):
    blur = clock.blur_sigma(jnp.asarray([0.0, 0.5, 1.0]))
    chex.assert_trees_all_close(
        blur, clock.blur_sigma_max * jnp.asarray([0.0, 0.5, 1.0]), rtol=1e-6
    )


@pytest.mark.parametrize(
    ("length", "blur_sigma_max", "left"), [(0.93, 3.0, 0.06), (0.89, 2.0, 0.29)]
)
def test_clock_blur_of_lowest_frequency(length, blur_sigma_max, left):
    clock = schedules.Clock(length, blur_sigma_max)
    weight = np.exp(-((np.pi / 4) ** 2) * float(clock.blur_sigma(jnp.asarray(1.0))) ** 2 / 2)
    assert weight == pytest.approx(left, abs=5e-3)  # published to two places


# The published settings and others.
LINEAR = [schedules.Linear(), schedules.Linear(beta_d=5.0, beta_min=0.5)]
linear = pytest.mark.parametrize("schedule", LINEAR, ids=["published", "other"])


@linear
def test_linear_integrates_beta(schedule):
    t = np.geomspace(1e-5, 1.0, 12)

    def beta(t):
        return schedule.beta_min + schedule.beta_d * t

    log = np.asarray(
        [scipy.integrate.quad(beta, 0, end)[0] for end in t]
    )  # of 1 / alphabar = 1 + sigma^2
    with enable_x64(True):
        chex.assert_trees_all_close(
            np.asarray(sigma_of(schedule, jnp.asarray(t))), np.sqrt(np.expm1(log)), rtol=1e-10
        )
    # An exponent of up to 10 is known to 6e-7 in float32.
    chex.assert_trees_all_close(
        np.asarray(sigma_of(schedule, jnp.float32(t)), np.float64),
        np.sqrt(np.expm1(log)),
        rtol=2e-6,
    )


@linear
def test_linear_round_trip(schedule):
    times = np.geomspace(1e-5, 1.0, 200)
    for x64, tolerance in (
        (False, 1e-6),
        (True, 1e-12),
    ):  # a few roundings: the inverse cancels nothing at small times either
        with enable_x64(x64):
            t = jnp.asarray(times)
            sigma = sigma_of(schedule, t)
            assert t.dtype == sigma.dtype == (jnp.float64 if x64 else jnp.float32)
            assert np.all(np.diff(sigma) > 0)
            chex.assert_trees_all_close(time_of(schedule, sigma), t, rtol=tolerance)
            chex.assert_trees_all_close(
                sigma_of(schedule, time_of(schedule, sigma)), sigma, rtol=10 * tolerance
            )  # exp(10)


def test_linear_published_ends():
    low, high = (float(schedules.Linear().sigma(jnp.float32(t))) for t in (1e-5, 1.0))
    # To first order sigma^2 = beta_min t; at t = 1 it is e^(9.95 + 0.1) - 1.
    assert low == pytest.approx(1e-3, rel=2e-3)
    assert high == pytest.approx(np.sqrt(np.exp(10.05) - 1), rel=1e-6)


iddpm_settings = pytest.mark.parametrize(
    ("steps", "c1", "c2"), [(1000, 0.001, 0.008), (4000, 0.001, 0.008), (50, 0.2, 0.05)]
)


def cosine(steps, c2):
    """The cos^2 of iDDPM by its own step t = 0 .. steps (arXiv 2102.09672, equation 17), with t =
    steps - j."""
    return np.cos((np.arange(steps + 1) / steps + c2) / (1 + c2) * np.pi / 2) ** 2


@iddpm_settings
def test_iddpm_levels_match_betas(steps, c1, c2):
    f = cosine(steps, c2)
    beta = np.minimum(1 - f[1:] / f[:-1], 1 - c1)
    alphabar = np.concatenate([[1.0], np.cumprod(1 - beta)])
    levels = schedules.iddpm_levels(steps, c1=c1, c2=c2)
    assert levels.dtype == np.float64 and levels[-1] == 0 and np.all(np.diff(levels) < 0)
    # 1 / alphabar - 1 cancels all but 5e-10 / 5e-16 of what float64 knows at the first steps.
    np.testing.assert_allclose(levels[:-1], np.sqrt(1 / alphabar - 1)[:0:-1], rtol=1e-8)


@iddpm_settings
def test_iddpm_levels_closed_form(steps, c1, c2):
    f = cosine(steps, c2)[::-1]  # by j
    f[0] = 0  # cos(pi / 2)
    clipped = np.max(np.flatnonzero(f[:-1] < c1 * f[1:]))  # from this level on, upwards
    assert clipped < steps / 2
    levels, expected = (
        schedules.iddpm_levels(steps, c1=c1, c2=c2),
        np.sqrt(f[-1] / f[clipped + 1 :] - 1),
    )
    np.testing.assert_allclose(levels[clipped + 1 :], expected, rtol=1e-8)
    # A clipped step raises 1 + sigma^2 by 1 / c1.
    np.testing.assert_allclose(
        1 + levels[: clipped + 1] ** 2, (1 + levels[1 : clipped + 2] ** 2) / c1, rtol=1e-12
    )


@pytest.mark.parametrize("rho", [1.0, 7.0, 100.0])
@pytest.mark.parametrize(
    ("steps", "sigma_min", "sigma_max"), [(2, 0.002, 80.0), (18, 0.002, 80.0), (256, 0.008, 80.0)]
)
def test_edm_levels_match_formula(steps, sigma_min, sigma_max, rho):
    ramp = np.arange(steps) / (steps - 1)
    expected = (
        sigma_max ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))
    ) ** rho
    levels = schedules.edm_levels(steps, sigma_min=sigma_min, sigma_max=sigma_max, rho=rho)
    chex.assert_shape(levels, (steps,))
    assert levels.dtype == jnp.float32
    # A logarithm of up to 10.6 is known to 6e-7 in float32; for rho = 1 the levels are differences
    # of numbers near 80.
    tolerance = 2e-6 if rho > 1 else 80 * 1e-7 / sigma_min
    chex.assert_trees_all_close(np.asarray(levels, np.float64), expected, rtol=tolerance)
    assert levels[0] == jnp.float32(sigma_max)
    assert np.all(np.diff(levels) < 0)


@pytest.mark.parametrize("rho", [7.0, 100.0])
def test_edm_levels_end_at_sigma_min(rho):
    levels = schedules.edm_levels(200, sigma_min=0.008, sigma_max=80.0, rho=rho)
    chex.assert_trees_all_close(levels[-1], jnp.float32(0.008), rtol=2e-6)  # as above


@pytest.mark.parametrize(
    ("steps", "rho", "below", "kept", "first"),
    [(200, 100.0, 0.9, 100, 0.8691), (150, 7.0, 0.95, 54, 0.9219)],
    ids=["imagenet", "celeba"],
)
def test_truncate_published_settings(steps, rho, below, kept, first):
    levels = schedules.edm_levels(steps, sigma_min=0.008, sigma_max=80.0, rho=rho)
    kept_levels = schedules.truncate(levels, below)
    chex.assert_shape(kept_levels, (kept,))
    assert float(kept_levels[0]) == pytest.approx(first, abs=5e-5)  # published to four places
    chex.assert_trees_all_equal(kept_levels, levels[-kept:])


def test_truncate_excludes_bound():
    chex.assert_trees_all_equal(
        schedules.truncate(jnp.asarray([3.0, 2.0, 1.0]), 2.0), jnp.asarray([1.0])
    )


@pytest.mark.parametrize("steps", [1, 0, -3])
def test_edm_levels_refuse_fewer_than_two_steps(steps):
    with pytest.raises(ValueError, match=f"at least 2 steps, not {steps}"):
        schedules.edm_levels(steps, sigma_min=0.002, sigma_max=80.0, rho=7.0)


def test_clock_is_traced_once():
    clock = schedules.Clock()
    there_and_back = jax.jit(
        chex.assert_max_traces(n=1)(lambda t: (clock.time(clock.sigma(t)), clock.blur_sigma(t)))
    )
    for end in (0.2, 0.5, 1.0):
        chex.assert_tree_shape_prefix(there_and_back(jnp.linspace(0.1, end, 5)), (5,))
