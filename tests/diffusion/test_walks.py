"""The walk as one loop over evaluations is the walk step by step, with one copy of the network."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rdm_jax.diffusion.processes import GaussianProcess, RelayProcess
from rdm_jax.diffusion.samplers import Heun, RelayHeun
from rdm_jax.diffusion.walks import scanned_walk, walk

SAMPLERS = {
    "heun": (Heun(steps=6), GaussianProcess()),
    "euler": (Heun(steps=2, order=1), GaussianProcess()),
    "churn": (Heun(steps=6, churn=5.0), GaussianProcess()),
    "relay": (RelayHeun(steps=30, eta=0.2), RelayProcess(patch=4)),
    "relay-1": (RelayHeun(steps=30, order=1, exact_start=True), RelayProcess(patch=4)),
    "relay-images": (RelayHeun(steps=30, corrector="images"), RelayProcess(patch=4)),
}


def noise(k):
    return jax.random.normal(jax.random.fold_in(jax.random.key(0), k), (2, 8, 8, 1))


def network(x, sigma):
    """Not linear in either argument, so that no call can stand in for another."""
    return jnp.tanh(x * (1 + sigma) + jnp.sin(10 * sigma))


def walked(sampler, process):
    def step(x, i, level, to):
        return sampler.step(network, x, i, level, to, noise)

    def finish(x, i, level):
        return sampler.finish(network, x, i, level, noise)

    return walk(step, finish, *start(sampler, process))


def start(sampler, process):
    levels = sampler.levels(process)
    low = jnp.asarray(np.random.default_rng(0).standard_normal((2, 2, 2, 1)), jnp.float32)
    return sampler.start(low, jax.tree.map(lambda a: a[0], levels), noise), levels


def scanned(sampler, process, denoise=network, compiled=lambda f: f):
    def step(denoise, x, i, level, to):
        return sampler.step(denoise, x, i, level, to, noise)

    def finish(denoise, x, i, level):
        return sampler.finish(denoise, x, i, level, noise)

    return compiled(lambda x, levels: scanned_walk(step, finish, denoise, x, levels))(
        *start(sampler, process)
    )


@pytest.mark.parametrize("name", SAMPLERS)
def test_scanned_walk_is_the_walk(name):
    chex.assert_trees_all_close(scanned(*SAMPLERS[name]), walked(*SAMPLERS[name]), atol=2e-5)


@pytest.mark.parametrize("name", SAMPLERS)
def test_scanned_walk_has_one_network_and_evaluates_it_nfe_times(name):
    sampler, process = SAMPLERS[name]
    traced, evaluated = [], []

    def denoise(x, sigma):
        traced.append(sigma)
        jax.debug.callback(lambda: evaluated.append(1))
        return network(x, sigma)

    jax.block_until_ready(scanned(sampler, process, denoise, jax.jit))
    jax.effects_barrier()
    assert len(traced) == 1
    assert len(evaluated) == sampler.nfe(process)
