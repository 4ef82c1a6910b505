"""The relay sampler on Gaussian targets."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft

from rdm_jax.diffusion import blurring, schedules
from rdm_jax.diffusion.samplers import Levels, RelayHeun, relay_update
from rdm_jax.diffusion.walks import walk
from tests.support.arrays import images
from tests.support.gaussian_targets import (
    SHAPE,
    concrete_levels,
    falls,
    flow,
    integrate,
    is_mean,
    marginal_error,
    patch_dct_matrix,
    propagate,
    relay,
    relay_process,
    relay_target,
    split_levels,
)


# The published corrector averages (u - u0) / sigma. That is the flow's noise only where nothing is
# blurred (D = 1): in patch means, or without blur. In blurred coefficients it converges to the same
# flow, but at first order. With images u0 averaged, d(u / sigma) = u0 d(D / sigma), the flow, is
# integrated by the trapezoidal rule.
@pytest.mark.parametrize(
    ("settings", "blur_sigma_max", "patch", "of_means", "of_the_rest"),
    [
        ({"order": 1}, 3.0, 4, 2.0, 2.0),
        ({}, 3.0, 2, 4.0, 2.0),
        ({}, 3.0, 4, 4.0, 2.0),
        ({"order": 1}, 0.0, 2, 2.0, 2.0),
        ({}, 0.0, 4, 4.0, 4.0),
        ({"corrector": "images"}, 3.0, 2, 4.0, 4.0),
        ({"corrector": "images"}, 3.0, 4, 4.0, 4.0),
    ],
)
def test_relay_order(x64, settings, blur_sigma_max, patch, of_means, of_the_rest):
    target, basis = relay_target(relay_process(blur_sigma_max, patch)), patch_dct_matrix(patch)
    x = jnp.asarray(np.random.default_rng(1).standard_normal(SHAPE))
    samplers = [relay(steps, **settings) for steps in (64, 128)]
    errors = [
        np.abs(basis @ (out - flow(target, basis, x, sigma)))
        for out, sigma in integrate(samplers, target, x)
    ]
    # Halving the step divides the error by 2 or 4, but for the next term of its series.
    mean = is_mean(patch)

    def largest(which):
        return np.asarray([e[which].max() for e in errors])

    chex.assert_trees_all_close(falls(largest(mean)), np.full(1, of_means), rtol=0.05)
    chex.assert_trees_all_close(falls(largest(~mean)), np.full(1, of_the_rest), rtol=0.05)


def test_relay_corrector_reduces_error(x64):
    target, basis = relay_target(relay_process(patch=4)), patch_dct_matrix(4)
    x = jnp.asarray(np.random.default_rng(1).standard_normal(SHAPE))

    def error(out, sigma):
        return np.abs(basis @ (out - flow(target, basis, x, sigma)))

    plain, corrected = (
        error(*next(integrate([relay(64, order=order)], target, x))) for order in (1, 2)
    )
    assert corrected.max() < plain.max() / 2


@pytest.mark.parametrize(("eta", "order"), [(0.0, 2), (0.2, 1), (0.2, 2), (0.5, 2)])
def test_relay_marginals_converge(x64, eta, order):
    """Also under coloured noise, with eta^2, the variance of the fresh noise of a step,
    proportional to the step.

    `eta` holds for 64 steps. The limit is an SDE with the exact marginals.
    """
    target = relay_target(relay_process(block_scale=0.5))
    errors = [
        marginal_error(relay(steps, eta=eta * (64 / steps) ** 0.5, order=order), target)
        for steps in (64, 128)
    ]
    chex.assert_trees_all_close(
        falls(errors), np.full(1, 2.0), rtol=0.05
    )  # first order, but for the series' next term
    assert errors[-1] < 0.1


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_relay_marginals_of_single_image_are_exact(x64, eta):
    """If u0 is known, the first-order update samples from the process itself at any number of
    steps."""
    target = relay_target(relay_process(block_scale=0.5), variance=0.0)
    assert marginal_error(relay(5, eta=eta, order=1), target) < 1e-10  # float64


@pytest.mark.parametrize("eta", [0.2, 0.5])
def test_relay_fixed_eta_leaves_small_bias(x64, eta):
    """More steps do not remove the bias: a step adds eta^2 sigma^2, and its mean uses u0_hat, not a
    sample of u0, which reduces the variance too much.

    An unblurred coefficient that takes many steps at one sigma converges to (S + sigma^2) (1 - c /
    2 + c b) up to O(c^2), where c = 1 - sqrt(1 - eta^2) and b = sigma^2 / (S + sigma^2) lies in (0,
    1). So the relative error is at most c / 2.
    """
    target = relay_target(relay_process(blur_sigma_max=0.0))
    errors = [marginal_error(relay(steps, eta=eta), target) for steps in (64, 128)]
    assert errors[0] / 2 < errors[1] < (1 - (1 - eta**2) ** 0.5) / 2


@pytest.mark.parametrize("corrector", ["slopes", "images"])
@pytest.mark.parametrize("exact_start", [False, True])
def test_relay_exact_start_recovers_single_image(x64, corrector, exact_start):
    """The enlarged image lacks the detail that the process still has where the relay starts. An
    exact start accounts for that."""
    target = relay_target(relay_process(), variance=0.0)
    sampler = relay(5, eta=0.2, corrector=corrector, exact_start=exact_start)
    levels, image = sampler.levels(target.process), jnp.asarray(target.mean.reshape(SHAPE))
    low, silent = blurring.mean_pool(image, factor=target.process.patch), lambda k: jnp.zeros(SHAPE)
    assert jnp.abs(blurring.enlarge(low, factor=target.process.patch) - image).max() > 0.1

    def step(x, i, level, to):
        return sampler.step(lambda x, sigma: image, x, i, level, to, silent)

    out = walk(
        step,
        lambda x, i, level: x,
        sampler.start(low, split_levels(levels)[0], silent),
        levels,
    )
    error = float(jnp.abs(out.ravel() - target.marginal(levels.sigma[-1])[0]).max())
    assert (error < 1e-10) == (corrector == "images" and exact_start), error  # float64


def test_relay_corrector_needs_fresh_noise(x64):
    """With the published ImageNet sampler, on images with EDM's sigma_data: the standard deviation
    of the patch means."""
    target = relay_target(relay_process(patch=4), variance=0.25)
    sampler = RelayHeun(steps=200, rho=100.0, truncation_sigma=0.9, eta=0.2)
    mean = patch_dct_matrix(4)[is_mean(4)]
    ratios = []
    for same_noise in (False, True):
        _, covariance, sigma = propagate(sampler, target, same_noise=same_noise)
        ratios.append(float((mean @ covariance @ mean.T / (0.25 + sigma**2)).squeeze()) ** 0.5)
    fresh, same = ratios
    assert abs(fresh - 1) < 0.002
    assert same < 0.995


def test_relay_start_is_noised_enlarged_image():
    patch = 3
    process = dataclasses.replace(relay_process(), patch=patch)
    level = split_levels(concrete_levels(RelayHeun(steps=200, rho=100.0), process))[0]
    low, noise = images((2, 3, 5, 3)), images((2, 3 * patch, 5 * patch, 3), seed=1)
    flat = np.asarray(RelayHeun().start(low, level, lambda k: jnp.zeros_like(noise)))
    for i, j in np.ndindex(patch, patch):
        chex.assert_trees_all_equal(flat[:, i::patch, j::patch], np.asarray(low))
    noised = np.asarray(RelayHeun().start(low, level, lambda k: {0: noise}[k]))
    assert float(level.sigma) == pytest.approx(0.8691, abs=5e-5)  # published to four places
    # float32 numbers up to 5, divided by 0.87
    np.testing.assert_allclose((noised - flat) / np.asarray(level.sigma), noise, atol=1e-5)


def test_relay_start_matches_process_end():
    process = dataclasses.replace(relay_process(blur_sigma_max=100.0), min_scale=0.0)
    sampler = relay(5)
    level = split_levels(concrete_levels(sampler, process))[0]
    x, noise = images((2, 4, 6, 3)), images((2, 4, 6, 3), seed=1)
    noised = jax.jit(lambda sigma: process.noised(x, process.clock.time(sigma), noise))(
        jnp.asarray(np.repeat(level.sigma, 2))
    )
    start = sampler.start(blurring.mean_pool(x, factor=2), level, lambda k: noise)
    chex.assert_trees_all_close(
        start, noised.images, atol=1e-5
    )  # the clock's round trip in float32


@pytest.mark.parametrize("truncation_time", [0.0, 1.05])
def test_relay_levels_use_sampling_clock(truncation_time):
    process, sampler = (
        relay_process(),
        dataclasses.replace(relay(5), truncation_time=truncation_time),
    )
    levels = sampler.levels(process)
    chex.assert_shape([levels.sigma, levels.blur], [(6,), (6, 2, 2)])
    clock = schedules.Clock(length=truncation_time or process.clock.length)
    chex.assert_trees_all_equal(levels.blur, process.blur_weights(clock.time(levels.sigma)))
    assert np.all(np.diff(np.asarray(levels.blur)[:, 1, 1]) > 0)


@pytest.mark.parametrize("eta", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("patch", [2, 3, 5])
def test_relay_update_matches_pixel_form(x64, patch, eta):
    rng = np.random.default_rng(0)
    x, x0, d1, d2 = (rng.uniform(0, 1, (patch, patch)) for _ in range(4))
    level, to = Levels(jnp.asarray(0.8), jnp.asarray(d1)), Levels(jnp.asarray(0.6), jnp.asarray(d2))
    dct = scipy.fft.dct(np.eye(patch), axis=0, norm="ortho")
    v = np.kron(dct, dct).T

    def in_pixels(weights):
        return v @ np.diag(weights.ravel()) @ v.T

    g = np.sqrt(1 - eta**2) * 0.6 / 0.8
    # u' = g u + (D' - g D) u0, before u0 is eliminated
    expected = g * x.ravel() + in_pixels(d2 - g * d1) @ x0.ravel()
    update = jax.jit(lambda x, image: relay_update(x, image, level, to, eta))
    out = update(jnp.asarray(x), jnp.asarray(x0))
    chex.assert_trees_all_close(np.asarray(out).ravel(), expected, atol=1e-12)
    # and after
    slope = rng.standard_normal((patch, patch))
    expected = (
        in_pixels(d2 + g * (1 - d1)) @ x.ravel() + 0.8 * in_pixels(g * d1 - d2) @ slope.ravel()
    )
    out = update(jnp.asarray(x), jnp.asarray(x) - 0.8 * slope)
    chex.assert_trees_all_close(np.asarray(out).ravel(), expected, atol=1e-12)
