"""Sampling of one stage: parameters, labels and seeds in, images out."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from rdm_jax.config import Config, Stage, to_dict
from rdm_jax.diffusion import guidance, preconditioning, samplers
from rdm_jax.diffusion.processes import Cascade, Relay
from rdm_jax.models.functional import Network
from rdm_jax.runtime import random_streams
from rdm_jax.runtime.random_streams import RandomStream

StageSampler = Callable[..., tuple[Float[Array, "b h w c"], Bool[Array, " b"]]]


def stage_levels(stage: Stage) -> samplers.Levels:
    """The levels that the stage's sampler walks; in generating from noise, each rounded to one that
    the network knows."""
    levels = stage.sampler.levels(stage.process)
    return (
        levels
        if levels.blur is not None
        else levels._replace(sigma=stage.precondition.round(levels.sigma))
    )


def joined_level(stage: Stage) -> samplers.Levels:
    """The level that a relay begins at, with the blur that its process has there."""
    sampler = dataclasses.replace(stage.sampler, exact_start=False)
    return jax.tree.map(lambda a: a[0], sampler.levels(stage.process))


def handover(stage: Stage) -> str:
    """What a stage joins two images at: the paper takes the relay's blur to be complete there, and
    it is not quite."""
    if not isinstance(stage.process, Relay):
        return f"begins at pure noise, given the small image with noise of sigma {stage.sampler.augment:g}"
    first = joined_level(stage)
    end = stage.process.blur_weights(jnp.ones(1))[0]
    left = f"{first.blur[0, 1]:.1%} of a patch's lowest frequency is left ({end[0, 1]:.1%} where its training ends)"
    exact = stage.sampler.exact_start and (
        stage.sampler.order == 1 or stage.sampler.corrector == "images"
    )
    made_up = ", which the first step makes up for" if exact else ""
    return f"begins at sigma {first.sigma:.4g}, where {left}{made_up}"


def stage_settings(config: Config, number: int) -> dict[str, Any]:
    """All settings of stage `number` (from 1) that its images depend on, as JSON."""
    values = to_dict(config)[f"stage{number}"]
    return {
        k: values[k]
        for k in ("resolution", "process", "sampler", "guidance", "network", "precondition")
    }


def evaluations(stage: Stage) -> int:
    """How often the stage's network runs for an image, the two passes of guidance counted as
    one."""
    levels = len(stage.sampler.levels(stage.process).sigma)
    return levels if stage.sampler.order == 1 else 2 * levels - 1


def stage_sampler(
    stage: Stage, network: Network, *, number: int, channels: int, classes: int, run_seed: int
) -> StageSampler:
    """Compiles what samples a stage.

    Args:
      stage: its process, sampler and guidance.
      network: its network.
      number: the stage's number from 1; part of the images' randomness.
      channels, classes: of the images; 0 classes for an unconditional network.
      run_seed: the config's seed.

    Returns:
      `sample(params, low, labels, seeds)`: parameters; the images of the stage before (b, h/p, w/p,
      c), None for stage 1; int32 (b,) classes, -1 for the null label; uint32 (b,) seeds. It returns
      float32 (b, h, w, c) in [-1, 1], and bool (b,): whether all values of an image were finite
      before they were clipped to that range. Image i depends on the parameters, low[i], labels[i]
      and seeds[i] alone.
    """
    shape = (*stage.resolution, channels)
    levels = stage_levels(stage)
    root = random_streams.stream_key(run_seed, number - 1, RandomStream.SAMPLE)
    first = jax.tree.map(lambda a: a[0], levels)

    def noise_of(seeds: UInt32[Array, " b"]) -> samplers.Noise:
        keys = random_streams.image_keys(root, seeds)
        return lambda k: jax.vmap(
            lambda key: stage.process.draw_noise(jax.random.fold_in(key, k), shape)
        )(keys)

    def denoiser(
        params: Any, low: Array | None, labels: Int[Array, " b"], noise: samplers.Noise
    ) -> preconditioning.Denoiser:
        given = (
            stage.sampler.given(stage.process, low, noise)
            if isinstance(stage.process, Cascade)
            else None
        )

        def conditional(x, sigma, one_hot):
            def net(x, c_noise):
                if given is not None:  # guidance has each image twice
                    x = jnp.concatenate([x, jnp.repeat(given, len(x) // len(given), axis=0)], -1)
                return network.apply(params, x, c_noise, one_hot if classes else None)

            return preconditioning.denoiser(net, stage.precondition)(x, sigma)

        return guidance.classifier_free(
            conditional, jax.nn.one_hot(labels, classes), stage.guidance
        )

    @jax.jit
    def start(low, seeds):
        return stage.sampler.start(low, first, noise_of(seeds))

    @jax.jit
    def step(params, low, labels, seeds, x, i, level, to):
        noise = noise_of(seeds)
        return stage.sampler.step(denoiser(params, low, labels, noise), x, i, level, to, noise)

    @jax.jit
    def finish(params, low, labels, seeds, x, i, level):
        noise = noise_of(seeds)
        return stage.sampler.finish(denoiser(params, low, labels, noise), x, i, level, noise)

    @jax.jit
    def bounded(images):
        return jnp.clip(images, -1, 1), jnp.isfinite(images).all((1, 2, 3))

    def sample(params, low, labels, seeds, *, scan):
        bound = lambda f: lambda *args: f(params, low, labels, seeds, *args)  # noqa: E731
        return bounded(
            samplers.walk(bound(step), bound(finish), start(low, seeds), levels, scan=scan)
        )

    scanned = jax.jit(lambda *args: sample(*args, scan=True))
    return (lambda *args: sample(*args, scan=False)) if jax.default_backend() == "cpu" else scanned


def in_batches(seeds: Int[np.ndarray, " n"], size: int) -> list[Int[np.ndarray, " b"]]:
    """The seeds in order, so many at a time; the last batch may be shorter. No seeds are no
    batches."""
    return [seeds[first : first + size] for first in range(0, len(seeds), size)]
