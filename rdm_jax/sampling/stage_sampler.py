"""Sampling of one stage: parameters, labels and seeds in, images out."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from rdm_jax.config import Config, Stage, to_dict
from rdm_jax.diffusion import preconditioning
from rdm_jax.diffusion.guidance import ClassifierFree
from rdm_jax.diffusion.protocols import Denoiser, Levels, Noise
from rdm_jax.diffusion.walks import scanned_walk, walk
from rdm_jax.models.functional import Network
from rdm_jax.models.target import compiling_for
from rdm_jax.runtime import random_streams, sharding
from rdm_jax.runtime.random_streams import RandomStream

AnyArray = Array | np.ndarray
# Fields of a stage that its images depend on, besides the checkpoint.
SETTINGS = (
    "resolution",
    "process",
    "sampler",
    "guidance",
    "guidance_interval",
    "network",
    "precondition",
)


def stage_levels(stage: Stage) -> Levels:
    """The levels of the stage's sampler; without blur, rounded to those that the network knows."""
    levels = stage.sampler.levels(stage.process)
    if levels.blur is not None:
        return levels
    return levels._replace(sigma=stage.precondition.round(levels.sigma))


def stage_settings(config: Config, number: int) -> dict[str, Any]:
    """The settings of stage `number` (from 1) that its images depend on, as JSON."""
    values = to_dict(config)[f"stage{number}"]
    return {field: values[field] for field in SETTINGS}


class StageSampler:
    """Samples a stage, compiled.

    Args:
      stage: its process, sampler and guidance.
      network: its network.
      number: the stage's number from 1; part of the images' randomness.
      channels, classes: of the images; 0 classes for none.
      run_seed: the config's seed.
    """

    def __init__(
        self,
        stage: Stage,
        network: Network,
        *,
        number: int,
        channels: int,
        classes: int,
        run_seed: int,
    ):
        self._stage, self._network = stage, network
        self._shape = (*stage.resolution, channels)
        self._condition = stage.condition_for(classes)
        interval = stage.guidance_interval or ClassifierFree.interval
        self._guidance = ClassifierFree(stage.guidance, self._condition, interval)
        self._levels = stage_levels(stage)
        self._root = random_streams.stream_key(run_seed, number - 1, RandomStream.SAMPLE)
        self._start = jax.jit(self._start)
        self._step = jax.jit(self._step)
        self._finish = jax.jit(self._finish)
        self._clipped = jax.jit(self._clipped)
        self._scanned = jax.jit(self._scanned)

    def __call__(
        self,
        params: Any,
        low: Float[AnyArray, "b h2 w2 c"] | None,
        labels: Int[AnyArray, " b"],
        seeds: UInt32[AnyArray, " b"],
    ) -> tuple[Float[Array, "b h w c"], Bool[Array, " b"]]:
        """Samples a batch; image i depends on params, low[i], labels[i] and seeds[i] alone.

        Args:
          params: of the network.
          low: the images of the stage before; None for stage 1.
          labels: int32 class indices, -1 for the null condition.
          seeds: uint32.

        Returns:
          The images, float32 in [-1, 1]; and for each whether all its values were finite before
          they were clipped.
        """
        # XLA runs convolutions inside of a loop several times slower on CPU.
        if jax.default_backend() == "cpu":
            return self._walked(params, low, labels, seeds)
        return self._scanned(params, low, labels, seeds)

    def _scanned(self, params, low, labels, seeds):
        # Cast once, not in every evaluation.
        params = jax.tree.map(lambda leaf, d: leaf.astype(d), params, self._network.dtypes)
        noise, sampler = self._noise(seeds), self._stage.sampler

        def step(denoise, x, i, level, to):
            return sampler.step(denoise, x, i, level, to, noise)

        def finish(denoise, x, i, level):
            return sampler.finish(denoise, x, i, level, noise)

        denoise = self._denoiser(params, low, labels, noise)
        x = scanned_walk(step, finish, denoise, self._start(low, seeds), self._levels)
        return self._clipped(x)

    def _walked(self, params, low, labels, seeds):
        def step(x, i, level, to):
            return self._step(params, low, labels, seeds, x, i, level, to)

        def finish(x, i, level):
            return self._finish(params, low, labels, seeds, x, i, level)

        x = walk(step, finish, self._start(low, seeds), self._levels)
        return self._clipped(x)

    def _start(self, low, seeds):
        first = jax.tree.map(lambda a: a[0], self._levels)
        return self._stage.sampler.start(low, first, self._noise(seeds))

    def _step(self, params, low, labels, seeds, x, i, level, to):
        noise = self._noise(seeds)
        denoise = self._denoiser(params, low, labels, noise)
        return self._stage.sampler.step(denoise, x, i, level, to, noise)

    def _finish(self, params, low, labels, seeds, x, i, level):
        noise = self._noise(seeds)
        denoise = self._denoiser(params, low, labels, noise)
        return self._stage.sampler.finish(denoise, x, i, level, noise)

    def _clipped(self, x):
        return self._stage.representation.clip(x), jnp.isfinite(x).all((1, 2, 3))

    def _noise(self, seeds: UInt32[Array, " b"]) -> Noise:
        """noise(k): the k-th unit noise of each seed's image."""
        keys = random_streams.image_keys(self._root, seeds)

        def draw(key, k):
            return self._stage.process.draw_noise(jax.random.fold_in(key, k), self._shape)

        return lambda k: jax.vmap(lambda key: draw(key, k))(keys)

    def _denoiser(
        self, params: Any, low: Array | None, labels: Int[Array, " b"], noise: Noise
    ) -> Denoiser:
        """The guided denoiser, with everything but the state and its noise level bound."""
        stage = self._stage
        conditioning = stage.sampler.conditioning(stage.process, low, noise)
        condition = self._condition.from_labels(labels)

        def conditional(x, sigma, condition):
            def network(x, c_noise):
                if conditioning is not None:  # guidance may have each image twice
                    repeated = jnp.repeat(conditioning, len(x) // len(conditioning), axis=0)
                    x = jnp.concatenate([x, repeated], -1)
                with compiling_for(sharding.local_mesh()):
                    return self._network.apply(params, x, c_noise, condition)

            return preconditioning.denoiser(network, stage.precondition)(x, sigma)

        guided: Callable[..., Array] = self._guidance(conditional)
        return lambda x, sigma: guided(x, sigma, condition)


def in_batches(seeds: Int[np.ndarray, " n"], size: int) -> list[Int[np.ndarray, " b"]]:
    """The seeds in order, `size` at a time; the last batch may be shorter."""
    return [seeds[first : first + size] for first in range(0, len(seeds), size)]
