"""Properties of every sampler. The mathematics of each is tested in test_edm_sampler.py and
test_relay_sampler.py."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rdm_jax.diffusion import processes
from rdm_jax.diffusion.samplers import Heun
from rdm_jax.diffusion.walks import scanned_walk, walk
from tests.support.arrays import images
from tests.support.gaussian_targets import (
    PIXELS,
    SHAPE,
    SIZE,
    concrete_levels,
    draw,
    gaussian_target,
    propagate,
    relay,
    relay_process,
    relay_target,
    shrink,
    split_levels,
)


@pytest.mark.parametrize(
    "sampler",
    [
        Heun(steps=6, sigma_min=0.2, sigma_max=3.0, churn=4.0, eta=0.5),
        relay(5, eta=0.5, order=1),
        relay(5, eta=0.5, order=2),
    ],
    ids=["heun", "relay-1", "relay-2"],
)
def test_sampler_moments_match_propagation(x64, sampler):
    """A batch sampled with the sampler's own noise has the moments that independent noise gives."""
    target = (
        gaussian_target()
        if isinstance(sampler, Heun)
        else relay_target(relay_process(block_scale=0.5))
    )
    draws, levels = 10_000, concrete_levels(sampler, target.process)
    mean, covariance, _ = propagate(sampler, target)
    first = map(np.asarray, target.marginal(levels.sigma[0]))
    x = jnp.asarray(
        np.random.default_rng(0).multivariate_normal(*first, size=draws).reshape(-1, SIZE, SIZE, 1)
    )

    @jax.jit
    def noise(k):
        keys = jax.random.split(jax.random.fold_in(jax.random.key(0), k), draws)
        return jax.vmap(lambda key: target.process.draw_noise(key, SHAPE[1:]))(keys)

    step = jax.jit(lambda x, i, level, to: sampler.step(target.denoise, x, i, level, to, noise))
    out = np.asarray(walk(step, lambda x, i, level: x, x, levels)).reshape(draws, PIXELS)
    variance = np.diag(covariance)
    # 5 standard errors of a mean and of a covariance: once in 10,000 seeds for all 152 of them.
    assert np.all(np.abs(out.mean(0) - mean) < 5 * np.sqrt(variance / draws))
    standard_error = np.sqrt((np.outer(variance, variance) + covariance**2) / draws)
    assert np.all(np.abs(np.cov(out.T) - covariance) < 5 * standard_error)


SAMPLERS = {
    "heun": Heun(steps=6, sigma_min=0.1, sigma_max=10.0),
    "euler": Heun(steps=6, sigma_min=0.1, sigma_max=10.0, order=1),
    "heun-churn": Heun(steps=6, sigma_min=0.1, sigma_max=10.0, churn=2.0),
    "heun-eta": Heun(steps=6, sigma_min=0.1, sigma_max=10.0, eta=0.5),
    "relay-1": relay(5, eta=0.2, order=1),
    "relay-2": relay(5, eta=0.2, order=2),
}
every_sampler = pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS.keys())


def process_of(sampler):
    return processes.GaussianProcess() if isinstance(sampler, Heun) else relay_process()


def run(sampler, *, denoise=shrink, noise=draw):
    """All steps from `start`, not compiled."""
    levels = sampler.levels(process_of(sampler))
    low = None if isinstance(sampler, Heun) else jnp.ones((1, 2, 2, 1))

    def step(x, i, level, to):
        return sampler.step(denoise, x, jnp.asarray(i), level, to, noise)

    def finish(x, i, level):
        return sampler.finish(denoise, x, jnp.asarray(i), level, noise)

    return walk(step, finish, sampler.start(low, split_levels(levels)[0], noise), levels)


@pytest.mark.parametrize(
    ("name", "evaluations"),
    [
        ("heun", 11),
        ("euler", 6),
        ("heun-churn", 11),
        ("heun-eta", 11),
        ("relay-1", 6),
        ("relay-2", 11),
    ],
)
def test_nfe_and_levels(name, evaluations):
    """N levels take 2 N - 1 NFE, or N at first order: both ends of every step, and the last
    level."""
    calls, sampler = (
        [],
        dataclasses.replace(SAMPLERS[name], **({"churn_max": 0.0} if name == "heun-churn" else {})),
    )

    def denoise(x, sigma):
        calls.append(float(sigma))
        return shrink(x, sigma)

    run(sampler, denoise=denoise)
    sigma = np.asarray(sampler.levels(process_of(sampler)).sigma).tolist()
    assert len(sigma) == 6 and len(calls) == evaluations
    both_ends = [s for pair in zip(sigma, sigma[1:], strict=False) for s in pair]
    assert calls == (sigma if name in ("euler", "relay-1") else [*both_ends, sigma[-1]])


@every_sampler
def test_noise_is_used_once(sampler):
    asked = []

    def noise(k):
        asked.append(int(k))
        return draw(k)

    run(sampler, noise=noise)
    assert asked[0] == 0 and len(set(asked)) == len(asked), asked


@every_sampler
def test_last_step_returns_denoised_image(sampler):
    x, level = draw(7), split_levels(concrete_levels(sampler, process_of(sampler)))[-1]
    still = dataclasses.replace(sampler, **({"churn": 0.0} if isinstance(sampler, Heun) else {}))
    chex.assert_trees_all_equal(
        still.finish(shrink, x, jnp.int32(5), level, draw), shrink(x, level.sigma)
    )


@every_sampler
def test_step_is_traced_once(sampler):
    chex.clear_trace_counter()  # the counter knows a function by its source, which all cases share
    levels = sampler.levels(process_of(sampler))
    once = chex.assert_max_traces(n=1)(
        lambda x, i, level, to: sampler.step(shrink, x, i, level, to, draw)
    )
    out = walk(jax.jit(once), lambda x, i, level: x, draw(0), levels)
    chex.assert_shape(out, SHAPE)
    chex.assert_tree_all_finite(out)


@pytest.mark.parametrize(
    "sampler", [SAMPLERS["heun-churn"], SAMPLERS["relay-2"]], ids=["heun", "relay"]
)
def test_sampler_is_independent_of_batch(sampler):
    levels, shape = concrete_levels(sampler, process_of(sampler)), (5, 8, 4, 2)
    x, noises = images(shape), images((16, *shape), seed=1)

    @jax.jit
    def sample(x, noises):
        def step(denoise, x, i, level, to):
            return sampler.step(denoise, x, i, level, to, lambda k: noises[k])

        return scanned_walk(step, lambda denoise, x, i, level: x, shrink, x, levels)

    some = np.asarray([4, 1])
    alone = sample(jnp.asarray(np.asarray(x)[some]), jnp.asarray(np.asarray(noises)[:, some]))
    chex.assert_trees_all_close(
        np.asarray(alone), np.asarray(sample(x, noises))[some], atol=1e-5
    )  # float32
