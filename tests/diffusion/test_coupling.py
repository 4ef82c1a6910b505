"""Data-dependent coupling on Gaussian targets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rdm_jax.config import Stage
from rdm_jax.diffusion import blurring, coupling, processes
from rdm_jax.diffusion.coupling import FIRST_TIME, CouplingHeun, CouplingProcess
from rdm_jax.diffusion.linear_path import LinearHeun, LinearProcess
from rdm_jax.diffusion.preconditioning import XPreconditioning, denoiser
from rdm_jax.diffusion.samplers import Heun
from rdm_jax.diffusion.schedules import Path
from rdm_jax.diffusion.walks import walk
from tests.support.gaussian_targets import PIXELS, SHAPE, SIZE, falls, is_mean, patch_dct_matrix


class Target:
    """Images N(mean, .) with independent patch DCTs; known are the means of the 2 x 2 patches."""

    def __init__(self, process, seed=0):
        rng = np.random.default_rng(seed)
        self.process, self.basis = process, patch_dct_matrix(2)
        self.mean, self.variance = rng.standard_normal(PIXELS), rng.uniform(0.05, 0.5, PIXELS)
        self.known = is_mean(2)

    def split(self, low):
        """The coefficients of E(low)."""
        return self.basis @ jnp.asarray(blurring.enlarge(low, factor=2)).ravel()

    def denoise(self, low):
        """E[x | z / t, low]: the patch means are known, the rest is shrunk towards its mean."""
        given = self.split(low)

        def of_state(x, sigma):
            u = self.basis @ x.ravel()
            gain = self.variance / (self.variance + sigma**2)
            detail = self.mean + gain * (u - self.mean)
            return (self.basis.T @ jnp.where(self.known, given, detail)).reshape(x.shape)

        return of_state

    def exact(self, low, unit):
        """Where the flow from t = 0 ends: each coefficient keeps its quantile."""
        detail = self.mean + np.sqrt(self.variance) * (self.basis @ unit.ravel())
        return self.basis.T @ np.where(self.known, self.split(low), detail)


def draws():
    """A small image, and the noise of a large one."""
    rng = np.random.default_rng(1)
    return (jnp.asarray(rng.standard_normal(shape)) for shape in ((1, 2, 2, 1), SHAPE))


def no_noise(k):
    raise AssertionError("an ODE draws no noise")


def sampled(sampler, process, denoise, low, unit):
    levels = sampler.levels(process)
    start = sampler.start(low, jax.tree.map(lambda a: a[0], levels), lambda k: unit)
    step = jax.jit(lambda x, i, level, to: sampler.step(denoise, x, i, level, to, no_noise))

    def finish(x, i, level):
        return sampler.finish(denoise, x, i, level, no_noise)

    return walk(step, finish, start, levels)


@pytest.mark.parametrize("noise_scale", [0.5, 1.0])
@pytest.mark.parametrize("order", [1, 2])
def test_coupling_order(x64, monkeypatch, order, noise_scale):
    """If the first time is 0 but for rounding, only the discretisation is left."""
    monkeypatch.setattr(coupling, "FIRST_TIME", 1e-12)
    process = CouplingProcess(Path(noise_scale), patch=2)
    target, low, unit = Target(process), *draws()
    off = []
    for n in (128, 256):
        sampler = CouplingHeun(n, t_eps=1e-6, order=order)
        x = sampled(sampler, process, target.denoise(low), low, unit)
        off.append(np.abs(np.asarray(x).ravel() - target.exact(low, unit)).max())
    np.testing.assert_allclose(falls(off), 2**order, rtol=0.1)


def test_coupling_flow(x64):
    """What the first time leaves out is a thousandth of the detail, of up to some units here."""
    process = CouplingProcess(Path(0.5), patch=2)
    target, low, unit = Target(process), *draws()
    sampler = CouplingHeun(256, t_eps=1e-6)
    x = sampled(sampler, process, target.denoise(low), low, unit)
    assert np.abs(np.asarray(x).ravel() - target.exact(low, unit)).max() < 5 * FIRST_TIME


def test_coupling_marginals(x64):
    """Over small images and noises the end has the images' distribution."""
    process = CouplingProcess(Path(0.5), patch=2)
    target, sampler = Target(process), CouplingHeun(64, t_eps=1e-6)
    small, zero = jnp.zeros((1, 2, 2, 1)), jnp.zeros(SHAPE)

    @jax.jit
    def end(low, unit):
        levels = sampler.levels(process)
        denoise = target.denoise(low)
        x = sampler.start(low, jax.tree.map(lambda a: a[0], levels), lambda k: unit)

        def step(x, pair):
            return sampler.step(denoise, x, jnp.int32(0), *pair, no_noise), None

        pairs = tuple(jax.tree.map(lambda a, s=s: a[s], levels) for s in (np.s_[:-1], np.s_[1:]))
        x, _ = jax.lax.scan(step, x, pairs)
        last = jax.tree.map(lambda a: a[-1], levels)
        return sampler.finish(denoise, x, jnp.int32(0), last, no_noise).ravel()

    offset = end(small, zero)
    of_low = jax.jacobian(lambda low: end(low, zero))(small).reshape(PIXELS, -1)
    of_unit = jax.jacobian(lambda unit: end(small, unit))(zero).reshape(PIXELS, -1)
    # The variance of a patch's mean is a quarter of that of its DC coefficient, for p = 2.
    variance = target.variance[target.known] / 4
    covariance = (of_low * variance) @ of_low.T + of_unit @ of_unit.T
    in_dct = target.basis @ covariance @ target.basis.T
    np.testing.assert_allclose(in_dct, np.diag(target.variance), atol=2e-3)
    detail = ~target.known
    np.testing.assert_allclose((target.basis @ offset)[detail], target.mean[detail], atol=3e-3)


def test_coupling_path(x64):
    """z = t x + (1 - t) (E(M x) + s0 e), as x-prediction's network sees it."""
    process, stage_path = CouplingProcess(Path(0.7), patch=2), Path(0.7)
    x, e = (jax.random.normal(jax.random.key(seed), (3, 4, 6, 2)) for seed in (0, 1))
    level = jnp.asarray([0.0, 0.3, 0.9])
    noised = process.noised(x, level, e)
    time = FIRST_TIME + (1 - FIRST_TIME) * level
    seen = []

    def network(z, t):
        seen.append((z, t))
        return z

    denoiser(network, XPreconditioning(stage_path))(noised.images, noised.sigma)
    flat = blurring.enlarge(blurring.mean_pool(x, factor=2), factor=2)
    t = time[:, None, None, None]
    np.testing.assert_allclose(seen[0][0], t * x + (1 - t) * (flat + 0.7 * e), atol=1e-12)
    np.testing.assert_allclose(seen[0][1], time, rtol=1e-12)
    np.testing.assert_allclose(noised.weight, 1 / np.maximum(1 - time, 0.05) ** 2, rtol=1e-9)


def test_coupling_times_are_uniform():
    process = CouplingProcess()
    draws = jax.vmap(process.draw_level)(jax.random.split(jax.random.key(0), 20_000))
    time = np.sort(process.path.time(process.sigma(draws)))
    assert np.abs(time - np.linspace(FIRST_TIME, 1, len(time))).max() < 0.015
    assert np.isfinite(
        process.noised(jnp.ones((1, 4, 4, 1)), jnp.zeros(1), jnp.zeros((1, 4, 4, 1))).images
    ).all()


def test_coupling_conditions_on_the_enlarged_image():
    process, sampler = CouplingProcess(patch=2), CouplingHeun()
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 3))
    keys = jax.random.split(jax.random.key(1), 2)
    _, given = processes.diffuse(process, x, keys)
    low = blurring.mean_pool(x, factor=2)
    np.testing.assert_array_equal(given, sampler.conditioning(process, low, no_noise))
    assert given.shape[-1] == process.conditioning_channels(3) == 3
    first = jax.tree.map(lambda a: a[0], sampler.levels(process))
    state = sampler.start(low, first, lambda k: jnp.ones(x.shape))
    np.testing.assert_allclose(state - given, 0.5, atol=1e-3)
    assert SIZE == 4 and process.enlarges == 2


def test_coupling_has_its_own_sampler():
    assert CouplingHeun().walks(CouplingProcess()) and not CouplingHeun().walks(LinearProcess())
    assert not LinearHeun().walks(CouplingProcess()) and not Heun().walks(CouplingProcess())
    assert "noise of sigma 0.5" in CouplingHeun().handover(CouplingProcess())
    assert Stage(process=CouplingProcess(), sampler=CouplingHeun(8)).nfe == 15
