"""Sampling of one stage: parameters, what is given and seeds in, images out."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt32

from rdm_jax.config import Config, Stage, to_dict
from rdm_jax.diffusion import preconditioning
from rdm_jax.diffusion.guidance import guided
from rdm_jax.diffusion.protocols import ConditionalDenoiser, Denoiser, Levels, Noise
from rdm_jax.diffusion.walks import scanned_walk, walk
from rdm_jax.models.conditions import Condition
from rdm_jax.models.functional import Network
from rdm_jax.models.target import compiling_for
from rdm_jax.runtime import random_streams, sharding
from rdm_jax.runtime.random_streams import RandomStream
from rdm_jax.sampling.guides import Guide

AnyArray = Array | np.ndarray
Given = Mapping[str, AnyArray]  # what images are conditioned on, under the names of a batch
# Fields of a stage that its images depend on, besides the checkpoint.
SETTINGS = (
    "resolution",
    "process",
    "sampler",
    "guidance",
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


class _Part(NamedTuple):
    """What makes a conditional denoiser of parameters: of the stage itself, or of a guide."""

    network: Network
    precondition: preconditioning.Preconditioning
    condition: Condition


class Sampled(NamedTuple):
    """What a stage makes.

    Attributes:
      images: float32 in [-1, 1]; of a stage that stops, its denoised state.
      finite: whether all values of an image were finite before they were clipped.
      handed_over: what the next stage continues from: the images, or the state at the level where
        the stage stops, which is not clipped.
    """

    images: Float[Array, "b h w c"]
    finite: Bool[Array, " b"]
    handed_over: Float[Array, "b h w c"]


class StageSampler:
    """Samples a stage, compiled.

    Args:
      stage: its process, sampler and guidance.
      network: its network.
      number: the stage's number from 1; part of the images' randomness.
      channels, classes: of the images; 0 classes for none.
      run_seed: the config's seed.
      guides: of `stage.guidance` (`guides.load`).
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
    ):
        self._stage = stage
        self._shape = (*stage.resolution, channels)
        built = [(stage, network, classes), *((g.stage, g.network, g.classes) for g in guides)]
        self._parts = tuple(
            _Part(network, each.precondition, each.condition_for(count))
            for each, network, count in built
        )
        self._guides = tuple(guide.params for guide in guides)
        self._levels = stage_levels(stage)
        self._root = random_streams.stream_key(run_seed, number - 1, RandomStream.SAMPLE)
        self._start = jax.jit(self._start, static_argnums=2)
        self._step = jax.jit(self._step)
        self._finish = jax.jit(self._finish)
        self._clipped = jax.jit(self._clipped)
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
        return self._stage.sampler.stop > 0

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
        params = (params, *self._guides)  # an argument of what is compiled, as any other
        # XLA runs convolutions inside of a loop several times slower on CPU.
        how = self._walked if jax.default_backend() == "cpu" else self._scanned
        return how(params, low, given, seeds, unfinished)

    def _scanned(self, params, low, given, seeds, unfinished):
        # Cast once, not in every evaluation.
        dtypes = tuple(part.network.dtypes for part in self._parts)
        params = jax.tree.map(lambda leaf, d: leaf.astype(d), params, dtypes)
        noise, sampler = self._noise(seeds), self._stage.sampler

        def step(denoise, x, i, level, to):
            return sampler.step(denoise, x, i, level, to, noise)

        def finish(denoise, x, i, level):
            return sampler.finish(denoise, x, i, level, noise)

        def stay(denoise, x, i, level):
            return x

        denoise = self._denoiser(params, low, given, noise)
        start = self._start(low, seeds, unfinished)
        if not self.stops:
            return self._clipped(scanned_walk(step, finish, denoise, start, self._levels))
        state = scanned_walk(step, stay, denoise, start, self._levels)
        last = jax.tree.map(lambda a: a[-1], self._levels)
        i = jnp.int32(len(self._levels.sigma) - 1)
        return self._clipped(finish(denoise, state, i, last), state)

    def _walked(self, params, low, given, seeds, unfinished):
        def step(x, i, level, to):
            return self._step(params, low, given, seeds, x, i, level, to)

        def finish(x, i, level):
            return self._finish(params, low, given, seeds, x, i, level)

        states = []  # at the last level, before the stage finishes

        def kept(x, i, level):
            states.append(x)
            return finish(x, i, level)

        x = walk(step, kept, self._start(low, seeds, unfinished), self._levels)
        return self._clipped(x, *states) if self.stops else self._clipped(x)

    def _start(self, low, seeds, unfinished):
        first, sampler = jax.tree.map(lambda a: a[0], self._levels), self._stage.sampler
        return (sampler.join if unfinished else sampler.start)(low, first, self._noise(seeds))

    def _step(self, params, low, given, seeds, x, i, level, to):
        noise = self._noise(seeds)
        denoise = self._denoiser(params, low, given, noise)
        return self._stage.sampler.step(denoise, x, i, level, to, noise)

    def _finish(self, params, low, given, seeds, x, i, level):
        noise = self._noise(seeds)
        denoise = self._denoiser(params, low, given, noise)
        return self._stage.sampler.finish(denoise, x, i, level, noise)

    def _clipped(self, x, state=None):
        images, finite = self._stage.representation.clip(x), jnp.isfinite(x).all((1, 2, 3))
        return Sampled(images, finite, images if state is None else state)

    def _noise(self, seeds: UInt32[Array, " b"]) -> Noise:
        """noise(k): the k-th unit noise of each seed's image."""
        keys = random_streams.image_keys(self._root, seeds)

        def draw(key, k):
            return self._stage.process.draw_noise(jax.random.fold_in(key, k), self._shape)

        return lambda k: jax.vmap(lambda key: draw(key, k))(keys)

    def _denoiser(
        self,
        params: tuple[Any, ...],
        low: Array | None,
        given: Given,
        noise: Noise,
    ) -> Denoiser:
        """The guided denoiser, with everything but the state and its noise level bound.

        Guidance sees one condition, a tuple with that of the stage's network and of each guide.
        """
        conditioning = self._stage.sampler.conditioning(self._stage.process, low, noise)
        conditions = tuple(part.condition.encode(given) for part in self._parts)

        def conditional(index: int) -> ConditionalDenoiser:
            part = self._parts[index]

            def denoise(x, sigma, conditions):
                def network(x, c_noise):
                    if conditioning is not None:  # guidance may have each image twice
                        repeated = jnp.repeat(conditioning, len(x) // len(conditioning), axis=0)
                        x = jnp.concatenate([x, repeated], -1)
                    with compiling_for(sharding.local_mesh()):
                        return part.network.apply(params[index], x, c_noise, conditions[index])

                return preconditioning.denoiser(network, part.precondition)(x, sigma)

            return denoise

        own, *others = map(conditional, range(len(self._parts)))
        denoise: Callable[..., Array] = guided(self._stage.guidance, own, self._null, others)
        return lambda x, sigma: denoise(x, sigma, conditions)

    def _null(self, conditions: tuple[Any, ...]) -> tuple[Any, ...]:
        parts = zip(self._parts, conditions, strict=True)
        return tuple(part.condition.null(condition) for part, condition in parts)


def in_batches(items: np.ndarray, size: int) -> list[np.ndarray]:
    """Seeds in order, `size` at a time; the last batch may be shorter."""
    return [items[first : first + size] for first in range(0, len(items), size)]
