"""Gaussian targets, whose denoisers, marginals and flows are known in closed form, and what
samplers do to them.

A sampler then is an affine map of its state and its noises, so its marginals are propagated
exactly, without drawing samples: what is measured is its discretisation alone. Images are 4 x 4
  pixels, flattened to vectors of 16 here.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import scipy.fft

from rdm_jax.diffusion import blurring, processes, schedules
from rdm_jax.diffusion.samplers import RelayHeun
from rdm_jax.diffusion.walks import walk

SIZE, PIXELS = 4, 16
SHAPE = (1, SIZE, SIZE, 1)
NOISES = 3  # that a step may ask for


def patch_dct_matrix(patch):
    """u = matrix x, x the pixels of an image row by row, u its coefficients in their patch's place;
    by SciPy."""
    columns = []
    for pixel in np.eye(PIXELS).reshape(PIXELS, SIZE // patch, patch, SIZE // patch, patch):
        columns.append(scipy.fft.dctn(pixel, axes=(1, 3), norm="ortho").ravel())
    return np.stack(columns, axis=1)


def tile(weights):
    """(p, p) weights in the place of every patch, flattened."""
    repeats = (SIZE // len(weights),) * 2
    return (
        np.tile(weights, repeats).ravel()
        if isinstance(weights, np.ndarray)
        else jnp.tile(weights, repeats).ravel()
    )


def is_mean(patch):
    """Which coefficients are patch means."""
    return np.asarray(tile(np.outer(*np.eye(patch)[[0, 0]]))).astype(bool)


@dataclasses.dataclass(frozen=True, eq=False)  # equal to itself alone, so that jit may know it
class Target:
    """Images ~ N(mean, covariance), seen through a process as blur(sigma) x0 + sigma N(0,
    noise)."""

    mean: np.ndarray
    covariance: np.ndarray
    noise: np.ndarray
    process: processes.GaussianProcess | processes.RelayProcess

    def blur(self, sigma):
        if isinstance(self.process, processes.GaussianProcess):
            return jnp.eye(PIXELS)
        basis = patch_dct_matrix(self.process.patch)
        weights = self.process.blur_weights(self.process.clock.time(jnp.reshape(sigma, 1)))[0]
        return basis.T @ (tile(weights)[:, None] * basis)

    @functools.partial(jax.jit, static_argnums=0)
    def marginal(self, sigma):
        blur = self.blur(sigma)
        return blur @ self.mean, blur @ self.covariance @ blur.T + sigma**2 * self.noise

    def denoise(self, x, sigma):
        """E[x0 | x]."""
        centre, covariance = self.marginal(sigma)
        gain = jnp.linalg.solve(covariance, self.blur(sigma) @ self.covariance).T
        return (
            (self.mean + (x.reshape(-1, PIXELS) - centre) @ gain.T).reshape(x.shape).astype(x.dtype)
        )


@functools.cache
def relay_target(process, variance=None, seed=0):
    """A target that is diagonal in the patch DCT, as the process is, unless its noise is
    coloured."""
    rng, basis = np.random.default_rng(seed), patch_dct_matrix(process.patch)
    variance = (
        rng.uniform(0.05, 0.5, PIXELS) if variance is None else np.broadcast_to(variance, PIXELS)
    )
    block = np.zeros((PIXELS, PIXELS))
    if process.block_scale:
        images = np.eye(PIXELS, dtype=np.float32).reshape(PIXELS, SIZE, SIZE, 1)
        columns = blurring.block_noise(
            jnp.asarray(images), block=process.block_size or process.patch
        )
        block = process.block_scale * np.asarray(columns, np.float64).reshape(PIXELS, PIXELS)
    noise = np.eye(PIXELS) + block.T @ block
    return Target(0.3 * rng.standard_normal(PIXELS), (basis.T * variance) @ basis, noise, process)


@functools.cache
def gaussian_target(seed=0):
    rng = np.random.default_rng(seed)
    return Target(
        rng.standard_normal(PIXELS),
        np.diag(rng.uniform(0.05, 1.0, PIXELS)),
        np.eye(PIXELS),
        processes.GaussianProcess(),
    )


def concrete_levels(sampler, process):
    """The levels as NumPy arrays, whose parts need no compilation."""
    return jax.tree.map(np.asarray, sampler.levels(process))


def linearized(sampler, target):
    """A compiled (level, to) -> (offset, and the matrices that the state and the step's noises are
    multiplied with)."""
    # A batch for one run of the step: zero, then every pixel of the state and of each noise by
    # itself.
    pixels = np.eye((1 + NOISES) * PIXELS + 1, k=-1)[:, :-1].reshape(-1, 1 + NOISES, SIZE, SIZE, 1)
    x, *noise = pixels.swapaxes(0, 1)
    noise = jnp.asarray(noise)
    step = jax.jit(
        lambda x, level, to: sampler.step(
            target.denoise, x, jnp.int32(0), level, to, lambda k: noise[k - 1]
        )
    )

    def matrices(level, to):
        offset, *columns = np.asarray(step(jnp.asarray(x), level, to)).reshape(-1, PIXELS)
        return offset, *np.reshape(columns - offset, (1 + NOISES, PIXELS, PIXELS)).transpose(
            0, 2, 1
        )

    return matrices


def split_levels(levels):
    return [
        jax.tree.map(lambda a, k=k: jnp.asarray(a[k]), levels) for k in range(len(levels.sigma))
    ]


def propagate(sampler, target, *, same_noise=False):
    """Mean and covariance of the state at the last level, where the first level has the exact ones,
    and that level."""
    matrices, levels = (
        linearized(sampler, target),
        split_levels(concrete_levels(sampler, target.process)),
    )
    mean, covariance = map(np.asarray, target.marginal(levels[0].sigma))
    for level, to in zip(levels, levels[1:], strict=False):
        offset, of_state, *of_noise = matrices(level, to)
        mean, covariance = of_state @ mean + offset, of_state @ covariance @ of_state.T
        for m in [sum(of_noise)] if same_noise else of_noise:
            covariance = covariance + m @ target.noise @ m.T
    return mean, covariance, float(levels[-1].sigma)


def marginal_error(sampler, target):
    """How far the last level's covariance is off, in coefficients that have unit variance there,
    and its mean."""
    mean, covariance, sigma = propagate(sampler, target)
    exact_mean, exact = map(np.asarray, target.marginal(sigma))
    whiten = np.linalg.inv(np.linalg.cholesky(exact))
    return max(
        np.abs(whiten @ covariance @ whiten.T - np.eye(PIXELS)).max(),
        np.abs(whiten @ (mean - exact_mean)).max(),
    )


def integrate(samplers, target, x):
    """The deterministic state at the last level, with that level's ends, for samplers that differ
    in their steps alone."""
    step = jax.jit(
        lambda x, i, level, to: samplers[0].step(
            target.denoise, x, i, level, to, lambda k: jnp.zeros(SHAPE)
        )
    )
    for sampler in samplers:
        levels = concrete_levels(sampler, target.process)
        yield (
            np.asarray(walk(step, lambda x, i, level: x, x, levels)).ravel(),
            levels.sigma,
        )


def flow(target, basis, x, sigma):
    """Where the exact probability flow brings x from the first level to the last: each coefficient
    keeps its quantile."""
    (m0, c0), (m1, c1) = (target.marginal(s) for s in (sigma[0], sigma[-1]))

    def variance(c):
        return np.diag(basis @ np.asarray(c) @ basis.T)

    u = np.sqrt(variance(c1) / variance(c0)) * (basis @ (np.asarray(x).ravel() - np.asarray(m0)))
    return basis.T @ u + np.asarray(m1)


def relay(steps, *, eta=0.0, **settings):
    """A relay sampler that walks every level from 0.8 to 0.05: twice the steps walk the same levels
    and those between."""
    return RelayHeun(
        steps=steps + 1,
        sigma_min=0.05,
        sigma_max=0.8,
        rho=7.0,
        truncation_sigma=0.81,
        eta=eta,
        **settings,
    )


def relay_process(blur_sigma_max=3.0, patch=2, block_scale=0.0):
    return processes.RelayProcess(
        patch=patch, clock=schedules.Clock(blur_sigma_max=blur_sigma_max), block_scale=block_scale
    )


def falls(errors):
    """The factor by which each error is below the one before."""
    return np.asarray(errors)[:-1] / np.asarray(errors)[1:]


def draw(k):
    return jax.random.normal(jax.random.fold_in(jax.random.key(0), k), SHAPE)


def shrink(x, sigma):
    return jnp.tanh(x) / (1 + sigma)
