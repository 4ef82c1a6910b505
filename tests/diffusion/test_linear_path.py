"""The linear path on Gaussian targets, and beside the other processes."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rdm_jax.diffusion.guidance import ClassifierFree
from rdm_jax.diffusion.linear_path import LinearHeun, LinearProcess
from rdm_jax.diffusion.preconditioning import (
    EDMPreconditioning,
    VPPreconditioning,
    XPreconditioning,
    denoiser,
)
from rdm_jax.diffusion.processes import GaussianProcess, RelayProcess, edm_weight
from rdm_jax.diffusion.samplers import Heun
from rdm_jax.diffusion.schedules import Path
from rdm_jax.diffusion.walks import walk
from rdm_jax.models.conditions import ClassLabels
from rdm_jax.runtime.errors import InputError
from tests.support.gaussian_targets import SHAPE, falls, gaussian_target


def sampled(sampler, process, denoise, unit):
    """Runs a sampler from this unit noise; the linear path draws no more."""
    levels = sampler.levels(process)

    def noise(k):
        return unit

    def step(x, i, level, to):
        return sampler.step(denoise, x, i, level, to, noise)

    def finish(x, i, level):
        return sampler.finish(denoise, x, i, level, noise)

    start = sampler.start(None, jax.tree.map(lambda a: a[0], levels), noise)
    return walk(jax.jit(step), jax.jit(finish), start, levels)


@pytest.mark.parametrize("noise_scale", [1.0, 2.0])
@pytest.mark.parametrize(("order", "steps", "error"), [(2, 64, 2e-3), (1, 256, 2e-2)])
def test_linear_order(x64, order, steps, error, noise_scale):
    """From infinite noise, the flow of N(mean, variance) ends in mean + sqrt(variance) e."""
    target, process = gaussian_target(), LinearProcess(Path(noise_scale))
    unit = jnp.asarray(np.random.default_rng(2).standard_normal(SHAPE))
    exact = target.mean.reshape(SHAPE) + unit * np.sqrt(np.diag(target.covariance)).reshape(SHAPE)
    errors = [
        np.abs(sampled(LinearHeun(n, 1e-6, order), process, target.denoise, unit) - exact).max()
        for n in (steps, 2 * steps)
    ]
    chex.assert_trees_all_close(falls(errors), np.full(1, 2.0**order), rtol=0.1)
    assert errors[-1] < error


def test_linear_and_edm_sampler_agree(x64):
    """The two walk the same flow in other coordinates, so many steps end in the same images."""
    target, process = gaussian_target(), LinearProcess()
    unit = jnp.asarray(np.random.default_rng(3).standard_normal(SHAPE))
    ours = sampled(LinearHeun(512, 1e-6), process, target.denoise, unit)
    edm = sampled(Heun(512, 1e-4, 1e4), process, target.denoise, unit)
    np.testing.assert_allclose(ours, edm, atol=1e-3)


def test_first_time_is_pure_noise():
    """In float32 too, whose numbers end at 3e38."""
    process = LinearProcess(Path(2.0))
    levels = LinearHeun().levels(process)
    assert np.isfinite(levels.sigma).all() and (np.diff(levels.sigma) < 0).all()
    first = jax.tree.map(lambda a: a[0], levels)
    unit = jax.random.normal(jax.random.key(0), (2, 4, 4, 3))
    state = LinearHeun().start(None, first, lambda k: unit)
    np.testing.assert_allclose(state, 2 * unit, rtol=1e-6)
    seen = []

    def network(z, time):
        seen.append((z, time))
        return z

    denoiser(network, XPreconditioning(Path(2.0)))(state / first.time, first.sigma)
    ((z, time),) = seen
    np.testing.assert_allclose(z, 2 * unit, rtol=1e-6)
    np.testing.assert_allclose(time, 0, atol=1e-19)


def test_path_round_trip(x64):
    path, time = Path(1.5), jnp.linspace(0.001, 1.0, 50)
    np.testing.assert_allclose(path.time(path.sigma(time)), time, rtol=1e-12)


def test_times_are_logit_normal():
    process = LinearProcess(p_mean=-0.8, p_std=0.8)
    draws = jax.vmap(process.draw_level)(jax.random.split(jax.random.key(0), 20_000))
    time = process.path.time(process.sigma(draws))
    logit = np.log(time / (1 - time))
    assert abs(logit.mean() + 0.8) < 0.03 and abs(logit.std() - 0.8) < 0.03


@pytest.mark.parametrize("noise_scale", [1.0, 2.0])
def test_weight_is_that_of_velocities(x64, noise_scale):
    process = LinearProcess(Path(noise_scale), t_eps=0.05)
    time = jnp.asarray([0.1, 0.5, 0.9, 0.99])
    weight = process.weight(process.path.sigma(time))
    np.testing.assert_allclose(weight, 1 / np.maximum(1 - time, 0.05) ** 2, rtol=1e-12)


def test_relay_weighting():
    sigma = jnp.asarray([0.01, 0.3, 1.7])
    velocity = RelayProcess(weighting="velocity", max_weight=400.0).weight(sigma)
    np.testing.assert_allclose(velocity, [400, (1.3 / 0.3) ** 2, (2.7 / 1.7) ** 2], rtol=1e-5)
    np.testing.assert_array_equal(RelayProcess().weight(sigma), edm_weight(sigma, 0.5))


def test_x_prediction_returns_the_network():
    x, sigma = jax.random.normal(jax.random.key(1), (2, 4, 4, 3)), jnp.asarray([0.5, 3.0])
    out = denoiser(lambda z, time: z + time[:, None, None, None], XPreconditioning())(x, sigma)
    time = (1 / (1 + sigma))[:, None, None, None]
    np.testing.assert_allclose(out, time * x + time, rtol=1e-6)


def test_linear_sampler_refuses_limited_levels():
    LinearHeun().check("config.stage1.sampler", LinearProcess(), EDMPreconditioning())
    with pytest.raises(InputError, match="config.stage1.sampler: the linear path has all"):
        LinearHeun().check("config.stage1.sampler", LinearProcess(), VPPreconditioning())
    assert LinearHeun().walks(LinearProcess())
    assert not LinearHeun().walks(GaussianProcess()) and Heun().walks(LinearProcess())


@pytest.mark.parametrize(
    ("sigma", "weight"), [(0.5, 1.0), (0.500004, 1.0), (0.6, 3.0), (1.99999, 1.0), (2.0, 1.0)]
)
def test_guidance_in_an_interval(sigma, weight):
    """Bounds, up to rounding, are outside."""
    labels = ClassLabels(2).encode({"label": jnp.asarray([0, 1, 1])})

    def conditional(x, sigma, condition):
        return x * (1 + condition[:, 1, None, None, None])

    x = jnp.ones((3, 2, 2, 1))
    denoise = ClassifierFree(3.0, (0.5, 2.0)).transform(conditional, ClassLabels(2).null)
    out = denoise(x, jnp.asarray(sigma), labels)
    np.testing.assert_allclose(out[:, 0, 0, 0], [1, 1 + weight, 1 + weight], rtol=1e-6)


def test_guidance_interval_is_per_image():
    labels = ClassLabels(1).encode({"label": jnp.zeros(2, jnp.int32)})
    denoise = ClassifierFree(3.0, (0.0, 2.0)).transform(
        lambda x, s, c: x * c[:, 0, None, None, None], ClassLabels(1).null
    )
    out = denoise(jnp.ones((2, 1, 1, 1)), jnp.asarray([1.0, 5.0]), labels)
    np.testing.assert_allclose(out.ravel(), [3, 1])


def test_guidance_interval_of_all_levels_is_none():
    labels, x = ClassLabels(1).encode({"label": jnp.zeros(2, jnp.int32)}), jnp.ones((2, 1, 1, 1))
    out = [
        ClassifierFree(3.0, interval).transform(
            lambda x, s, c: x * c[:, 0, None, None, None], ClassLabels(1).null
        )(x, jnp.asarray([1.0, 5.0]), labels)
        for interval in ((), (0.0, math.inf))
    ]
    np.testing.assert_array_equal(*out)
