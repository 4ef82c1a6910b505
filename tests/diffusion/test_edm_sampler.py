"""The EDM sampler on Gaussian targets."""

import dataclasses

import chex
import jax.numpy as jnp
import numpy as np
import pytest

from rdm_jax.diffusion import processes
from rdm_jax.diffusion.samplers import Heun, Levels, RelayHeun
from tests.support.gaussian_targets import (
    PIXELS,
    SHAPE,
    concrete_levels,
    draw,
    falls,
    flow,
    gaussian_target,
    integrate,
    linearized,
    marginal_error,
    shrink,
    split_levels,
)


@pytest.mark.parametrize(("order", "steps", "error"), [(2, 64, 1e-3), (1, 512, 5e-2)])
def test_heun_order(x64, order, steps, error):
    target, x = gaussian_target(), jnp.asarray(np.random.default_rng(1).normal(0, 10, SHAPE))
    samplers = [
        Heun(steps=n + 1, sigma_min=0.1, sigma_max=10.0, order=order) for n in (steps, 2 * steps)
    ]
    errors = [
        np.abs(out - flow(target, np.eye(PIXELS), x, sigma)).max()
        for out, sigma in integrate(samplers, target, x)
    ]
    # Halving the step divides the error by 2 or 4, but for the next term of its series.
    chex.assert_trees_all_close(falls(errors), np.full(1, 2.0**order), rtol=0.05)
    assert errors[-1] < error


@pytest.mark.parametrize("churn", [0.0, 20.0])
def test_heun_marginals_converge(x64, churn):
    """Churn adds exactly the noise between two levels, so it costs no order."""

    def sampler(steps):
        return Heun(steps=steps + 1, sigma_min=0.1, sigma_max=10.0, churn=churn)

    errors = [marginal_error(sampler(steps), gaussian_target()) for steps in (64, 128)]
    chex.assert_trees_all_close(
        falls(errors), np.full(1, 4.0), rtol=0.05
    )  # second order, but for the series' next term
    assert errors[-1] < 1e-2


def test_churn_noise_widens_marginals(x64):
    sampler = Heun(steps=65, sigma_min=0.1, sigma_max=10.0, churn=20.0)
    exact, wide = (
        marginal_error(dataclasses.replace(sampler, churn_noise=n), gaussian_target())
        for n in (1.0, 1.05)
    )
    assert wide > 5 * exact


def test_churn_stays_within_bounds(x64):
    sampler = Heun(steps=6, sigma_min=0.1, sigma_max=10.0, churn=2.0, churn_min=0.5, churn_max=5.0)
    matrices, levels = (
        linearized(sampler, gaussian_target()),
        split_levels(concrete_levels(sampler, processes.GaussianProcess())),
    )
    for level, to in zip(levels, levels[1:], strict=False):
        noisy = bool(np.any(matrices(level, to)[2]))
        assert noisy == (0.5 <= level.sigma <= 5.0), level.sigma


def test_heun_step_without_eta_and_churn():
    level, to, x = Levels(jnp.float32(1.7)), Levels(jnp.float32(0.9)), draw(1)

    def nothing(k):
        return jnp.full(SHAPE, jnp.nan)

    there = jnp.float32(0.9) - jnp.float32(1.7)
    slope = (x - shrink(x, level.sigma)) / level.sigma
    euler = x + there * slope
    slope_there = (euler - shrink(euler, to.sigma)) / to.sigma
    expected = x + there * (slope + slope_there) / 2
    out = Heun(eta=0.0).step(shrink, x, jnp.int32(3), level, to, nothing)
    chex.assert_trees_all_equal(out, expected)


@pytest.mark.parametrize("churn", [0.0, 4.0])
def test_eta_marginals_converge_with_step(x64, churn):
    """With eta^2, the variance of the fresh noise of a step, proportional to the step, the limit is
    an SDE with the exact marginals."""
    settings = {"sigma_min": 0.1, "sigma_max": 10.0, "churn": churn}

    def heun(steps):
        return Heun(steps=steps + 1, eta=0.6 * (64 / steps) ** 0.5, **settings)

    errors = [marginal_error(heun(steps), gaussian_target()) for steps in (128, 256)]
    chex.assert_trees_all_close(
        falls(errors), np.full(1, 2.0), rtol=0.05
    )  # first order, but for the series' next term
    assert errors[-1] < 0.05


@pytest.mark.parametrize("eta", [0.5, 0.8])
def test_eta_fixed_leaves_small_bias(x64, eta):
    """As in the relay: a step uses the posterior mean instead of a sample. The bias is at most (1 -
    sqrt(1 - eta^2)) / 2 of the variance."""

    def heun(steps):
        return Heun(steps=steps + 1, sigma_min=0.1, sigma_max=10.0, eta=eta)

    errors = [marginal_error(heun(steps), gaussian_target()) for steps in (128, 256)]
    assert errors[0] / 2 < errors[1] < (1 - (1 - eta**2) ** 0.5) / 2


@pytest.mark.parametrize("same_noise", [False, True], ids=["fresh", "same"])
@pytest.mark.parametrize("eta", [0.2, 0.8])
def test_eta_stationary_distribution_at_one_level(x64, eta, same_noise):
    """The distribution that many steps at one level converge to, in closed form, with c = 1 -
    sqrt(1 - eta^2) and b = sigma^2 / (S + sigma^2), where S is the variance of the data.

    The predictor multiplies the state by 1 - c b and adds n1. The corrector, with the mean slope b
    (x + predicted) / 2 sigma, multiplies it by 1 - c b + c^2 b^2 / 2, subtracts c b / 2 of n1 and
    adds n2. If n1 and n2 were the same noise, the marginal would be narrower by c b.
    """
    target, sigma = gaussian_target(), 0.7
    level = Levels(jnp.asarray(sigma))
    offset, of_state, of_churn, of_predictor, of_corrector = linearized(Heun(eta=eta), target)(
        level, level
    )
    c, b = 1 - (1 - eta**2) ** 0.5, sigma**2 / (np.diag(target.covariance) + sigma**2)
    np.testing.assert_allclose(of_state, np.diag(1 - c * b + (c * b) ** 2 / 2), atol=1e-12)
    np.testing.assert_allclose(of_predictor, -eta * sigma * np.diag(c * b / 2), atol=1e-12)
    np.testing.assert_allclose(of_corrector, eta * sigma * np.eye(PIXELS), atol=1e-12)
    assert not of_churn.any()

    first_mean, covariance = map(np.asarray, target.marginal(jnp.asarray(sigma)))
    mean = first_mean
    for _ in range(400 if eta > 0.5 else 4000):
        mean, covariance = of_state @ mean + offset, of_state @ covariance @ of_state.T
        for m in [of_predictor + of_corrector] if same_noise else [of_predictor, of_corrector]:
            covariance = covariance + m @ m.T
    np.testing.assert_allclose(mean, first_mean, atol=1e-9)
    ratio = np.diag(covariance) * b / sigma**2  # to the exact S + sigma^2
    fresh = (1 - c * b / 2) ** 2 if same_noise else 1 + (c * b / 2) ** 2
    np.testing.assert_allclose(
        ratio, eta**2 * fresh / (1 - (1 - c * b + (c * b) ** 2 / 2) ** 2) * b, rtol=1e-6
    )
    # To first order 1 - c / 2 + c b, or 1 - c / 2 where the noises are the same.
    assert np.all(np.abs(ratio - (1 - c / 2 + (0 if same_noise else c * b))) < c**2)
    assert same_noise or np.all(np.abs(ratio - 1) < c / 2 + c**2)


def test_heun_with_eta_matches_relay_without_blur():
    sharp = Levels(jnp.asarray([1.7, 0.9]), jnp.ones((2, 2, 2)))
    level, to = split_levels(sharp)
    x, i, eta = draw(1), jnp.int32(3), 0.6
    # Heun's churn, which is off here, has a noise of its own.
    noises = {7: draw(2), 8: draw(3)}, {10: jnp.full(SHAPE, jnp.nan), 11: draw(2), 12: draw(3)}
    relay, heun = (lambda k, noise=noise: noise[int(k)] for noise in noises)
    relay = RelayHeun(eta=eta).step(shrink, x, i, level, to, relay)
    heun = Heun(eta=eta).step(shrink, x, i, Levels(level.sigma), Levels(to.sigma), heun)
    chex.assert_trees_all_close(heun, relay, atol=5e-6)  # a DCT there and back in float32


def test_heun_starts_from_noise():
    level = Levels(jnp.asarray(80.0))
    chex.assert_trees_all_equal(Heun().start(None, level, draw), 80 * draw(0))
