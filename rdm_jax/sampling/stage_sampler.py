"""Sampling of one stage, compiled: parameters, what is given and seeds in, images out."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, UInt32

from rdm_jax.config import Config, Stage, to_dict
from rdm_jax.diffusion.latents import Latents
from rdm_jax.diffusion.pixels import Pixels
from rdm_jax.diffusion.protocols import Denoiser, Noise
from rdm_jax.diffusion.walks import walk
from rdm_jax.models.functional import Network
from rdm_jax.sampling.guides import Guide
from rdm_jax.sampling.stage_functions import (
    PIXELS,
    AnyArray,
    Given,
    Sampled,
    StageFunctions,
    StageParams,
)

# Fields of a stage that its images depend on, besides the checkpoint.
SETTINGS = (
    "resolution",
    "process",
    "sampler",
    "guidance",
    "network",
    "precondition",
)


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
      guides: of `stage.guidance` (`guides.load`).
      representation: of the images.

    Attributes:
      functions: what is compiled.
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
        guides: Sequence[Guide] = (),
        representation: Pixels | Latents = PIXELS,
    ):
        self.functions = StageFunctions(
            stage,
            network,
            number=number,
            channels=channels,
            classes=classes,
            run_seed=run_seed,
            guides=guides,
            representation=representation,
        )
        self._guides = tuple(guide.params for guide in guides)
        self._start = jax.jit(self._start, static_argnums=2)
        self._step = jax.jit(self._step)
        self._finish = jax.jit(self._finish)
        self._clipped = jax.jit(self.functions.clipped)
        self._scanned = jax.jit(self._scanned, static_argnums=4)

    def __call__(
        self,
        params: Any,
        low: Float[AnyArray, "b h2 w2 c"] | None,
        given: Given,
        seeds: UInt32[AnyArray, " b"],
    ) -> tuple[Float[Array, "b h w c"], Bool[Array, " b"]]:
        """Samples a batch; image i depends on params, on row i of the rest, and on nothing else.

        Args:
          params: of the network.
          low: the images of the stage before; None for stage 1.
          given: what `Condition.encode` takes: 'label', int32 (b,) class indices, -1 for the null
            class; and for prompts 'text', float16 (b, tokens, width), and 'text_length', int32
            (b,), 0 for the null text.
          seeds: uint32.

        Returns:
          The images, float32 in [-1, 1]; and for each whether all its values were finite before
          they were clipped.
        """
        made = self.sample(params, low, given, seeds)
        return made.images, made.finite

    @property
    def stops(self) -> bool:
        """Whether what it hands over is a state with noise."""
        return self.functions.config.sampler.stop > 0

    def with_guides(self, params: Any) -> StageParams:
        """The parameters of the network, with those of its guides."""
        return StageParams(params, self._guides)

    def sample(
        self,
        params: Any,
        low: Float[AnyArray, "b h2 w2 c"] | None,
        given: Given,
        seeds: UInt32[AnyArray, " b"],
        *,
        unfinished: bool = False,
    ) -> Sampled:
        """The same, with what the next stage continues from.

        Args:
          params, low, given, seeds: as in a call.
          unfinished: whether `low` is the state of a stage that has stopped.
        """
        everything = self.with_guides(params)  # an argument of what is compiled, as any other
        # XLA runs convolutions inside of a loop several times slower on CPU.
        how = self._walked if jax.default_backend() == "cpu" else self._scanned
        return how(everything, low, given, seeds, unfinished)

    def _scanned(self, params, low, given, seeds, unfinished):
        keys, condition = self.functions.keys(seeds), self.functions.condition(given)
        return self.functions.sample(params, keys, condition, low, unfinished=unfinished)

    def _walked(self, params, low, given, seeds, unfinished):
        def step(x, i, level, to):
            return self._step(params, low, given, seeds, x, i, level, to)

        def finish(x, i, level):
            return self._finish(params, low, given, seeds, x, i, level)

        states = []  # at the last level, before the stage finishes

        def kept(x, i, level):
            states.append(x)
            return finish(x, i, level)

        start = self._start(low, seeds, unfinished)
        x = walk(step, kept, start, self.functions.levels)
        return self._clipped(x, *states) if self.stops else self._clipped(x)

    def _start(self, low, seeds, unfinished):
        return self.functions.start(low, self._noise(seeds), unfinished=unfinished)

    def _step(self, params, low, given, seeds, x, i, level, to):
        noise = self._noise(seeds)
        denoise = self._denoiser(params, low, given, noise)
        return self.functions.config.sampler.step(denoise, x, i, level, to, noise)

    def _finish(self, params, low, given, seeds, x, i, level):
        noise = self._noise(seeds)
        denoise = self._denoiser(params, low, given, noise)
        return self.functions.config.sampler.finish(denoise, x, i, level, noise)

    def _noise(self, seeds: UInt32[Array, " b"]) -> Noise:
        return self.functions.noise(self.functions.keys(seeds))

    def _denoiser(
        self, params: StageParams, low: Array | None, given: Given, noise: Noise
    ) -> Denoiser:
        """The guided denoiser, with everything but the state and its noise level bound."""
        conditioning = self.functions.conditioning(low, noise)
        condition = self.functions.condition(given)
        return lambda x, sigma: self.functions.denoise(params, x, sigma, condition, conditioning)


def in_batches(items: np.ndarray, size: int) -> list[np.ndarray]:
    """Seeds in order, `size` at a time; the last batch may be shorter."""
    return [items[first : first + size] for first in range(0, len(items), size)]
