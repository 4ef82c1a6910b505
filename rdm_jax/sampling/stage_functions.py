"""A stage as pure functions of its parameters: to compile, map, differentiate and build upon."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Integer, Key

from rdm_jax.config import Stage
from rdm_jax.diffusion import blurring, preconditioning
from rdm_jax.diffusion.guidance import guided
from rdm_jax.diffusion.latents import Latents
from rdm_jax.diffusion.pixels import Pixels
from rdm_jax.diffusion.protocols import ConditionalDenoiser, Levels, Noise
from rdm_jax.diffusion.walks import scanned_walk
from rdm_jax.models.conditions import Condition
from rdm_jax.models.functional import Network
from rdm_jax.models.target import compiling_for
from rdm_jax.runtime import random_streams, sharding
from rdm_jax.runtime.random_streams import RandomStream
from rdm_jax.sampling.guides import Guide

AnyArray = Array | np.ndarray
PIXELS = Pixels()
Given = Mapping[str, AnyArray]  # what images are conditioned on, under the names of a batch


class StageParams(NamedTuple):
    """The parameters of a stage, a tree of float32 arrays.

    Attributes:
      network: of its network, a nested dict.
      guides: of the networks that guide it, in the order of its guidance.
    """

    network: Any
    guides: tuple[Any, ...] = ()


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


class _Part(NamedTuple):
    """What makes a conditional denoiser of parameters: of the stage itself, or of a guide."""

    network: Network
    precondition: preconditioning.Preconditioning
    condition: Condition


def stage_levels(stage: Stage) -> Levels:
    """The levels of the stage's sampler; without blur, rounded to those that the network knows."""
    levels = stage.sampler.levels(stage.process)
    if levels.blur is not None:
        return levels
    return levels._replace(sigma=stage.precondition.round(levels.sigma))


class StageFunctions:
    """A stage's denoiser and sampler as pure functions.

    Images and states are float32 (b, h, w, c); clean images are in [-1, 1], or normalised latents.
    Row i of what a function returns depends on row i of its arguments and on the parameters alone.
    Nothing is compiled or kept: use `jax.jit`, `jax.vmap` and `jax.grad`.

    Args:
      config: the stage.
      network: its network.
      number: the stage's number from 1; part of the images' randomness.
      channels, classes: of the images; 0 classes for none.
      run_seed: the config's seed.
      guides: of `config.guidance` (`guides.load`).
      representation: of the images, which are clipped to its values.

    Attributes:
      config: the stage: `config.sampler` and `config.process` have methods of their own.
      shape: (h, w, c) of its images.
      levels: of its sampler, with a leading axis n.
    """

    def __init__(
        self,
        config: Stage,
        network: Network,
        *,
        number: int,
        channels: int,
        classes: int,
        run_seed: int,
        guides: Sequence[Guide] = (),
        representation: Pixels | Latents = PIXELS,
    ):
        self.config, self._representation = config, representation
        self.shape = (*config.resolution, channels)
        self.levels = stage_levels(config)
        built = [(config, network, classes), *((g.stage, g.network, g.classes) for g in guides)]
        self._parts = tuple(
            _Part(network, each.precondition, each.condition_for(count))
            for each, network, count in built
        )
        self._root = random_streams.stream_key(run_seed, number - 1, RandomStream.SAMPLE)

    def keys(self, seeds: Integer[AnyArray, " b"]) -> Key[Array, " b"]:
        """The keys with which `sample` makes the images that the pipeline makes of these seeds."""
        return random_streams.image_keys(self._root, jnp.asarray(seeds, jnp.uint32))

    def noise(self, keys: Key[Array, " b"]) -> Noise:
        """noise(k): the k-th unit noise of each image, as the process draws it."""

        def draw(key, k):
            return self.config.process.draw_noise(jax.random.fold_in(key, k), self.shape)

        return lambda k: jax.vmap(lambda key: draw(key, k))(keys)

    def level(self, i: int) -> Levels:
        """The sampler's i-th level, from the highest; -1 is the last one."""
        return jax.tree.map(lambda a: a[i], self.levels)

    def condition(self, given: Given) -> tuple[Any, ...]:
        """What `denoise` and `sample` are conditioned on, with a leading axis b.

        A tuple: what the stage's network gets, then what each guide gets.

        Args:
          given: as `RelayPipeline.given` returns it: 'label', int32 (b,) class indices, -1 for the
            null class; and of prompts 'text', float16 (b, tokens, width), and 'text_length', int32
            (b,), 0 for the null text.
        """
        arrays = {name: jnp.asarray(value) for name, value in given.items()}
        return tuple(part.condition.encode(arrays) for part in self._parts)

    def null(self, condition: tuple[Any, ...]) -> tuple[Any, ...]:
        """The null condition, of the shapes of `condition`."""
        parts = zip(self._parts, condition, strict=True)
        return tuple(part.condition.null(each) for part, each in parts)

    def conditioning(
        self, low: Float[AnyArray, "b h2 w2 c"] | None, noise: Noise
    ) -> Float[Array, "b h w k"] | None:
        """What the network of a cascade or a coupling gets besides the state; None for others.

        Args:
          low: images of the stage before; None for stage 1.
          noise: of the images.
        """
        return self.config.sampler.conditioning(self.config.process, low, noise)

    def noised(
        self, x: Float[Array, "b h w c"], level: Levels, noise: Float[Array, "b h w c"]
    ) -> Float[Array, "b h w c"]:
        """The sampler's state at a level, if clean images are known: a draw of the process.

        x + sigma n; of a relay, the blurred images instead of x; of a sampler that steps in time t,
        t times that.

        Args:
          x: clean images in [-1, 1].
          level: one of the sampler's (`level`).
          noise: unit noise (`noise`).
        """
        if level.blur is not None:
            filtered = blurring.over_patches(blurring.filter_patch, level.blur.shape[-1])
            weights = jnp.broadcast_to(level.blur, (len(x), *level.blur.shape))
            return filtered((x,), (weights,)) + level.sigma * noise
        process: Any = self.config.process
        state = process.noised_at(x, jnp.broadcast_to(level.sigma, x.shape[:1]), noise).images
        return state if level.time is None else level.time * state

    def denoise(
        self,
        params: StageParams,
        x: Float[Array, "b h w c"],
        sigma: Float[AnyArray, "*b"] | float,
        condition: tuple[Any, ...],
        conditioning: Float[Array, "b h w k"] | None = None,
    ) -> Float[Array, "b h w c"]:
        """The denoised images D(x, sigma), not clipped, with the stage's guidance.

        Args:
          params: of the stage, or others of the same tree.
          x: noised images: x0 + sigma n; of a relay, blurred ones (`noised`).
          sigma: noise levels, () or (b,).
          condition: from `condition`.
          conditioning: from `conditioning`.
        """

        def conditional(index: int) -> ConditionalDenoiser:
            part, own = self._parts[index], (params.network, *params.guides)[index]

            def denoise(x, sigma, condition):
                def network(x, c_noise):
                    if conditioning is not None:  # guidance may have each image twice
                        repeated = jnp.repeat(conditioning, len(x) // len(conditioning), axis=0)
                        x = jnp.concatenate([x, repeated], -1)
                    with compiling_for(sharding.local_mesh()):
                        return part.network.apply(own, x, c_noise, condition[index])

                return preconditioning.denoiser(network, part.precondition)(x, sigma)

            return denoise

        first, *others = map(conditional, range(len(self._parts)))
        denoise: Callable[..., Array] = guided(self.config.guidance, first, self.null, others)
        return denoise(x, jnp.asarray(sigma, x.dtype), condition)

    def sample(
        self,
        params: StageParams,
        keys: Key[Array, " b"],
        condition: tuple[Any, ...],
        low: Float[AnyArray, "b h2 w2 c"] | None = None,
        *,
        unfinished: bool = False,
    ) -> Sampled:
        """Samples a batch; a loop over the levels with one copy of the network.

        XLA runs convolutions inside of a loop several times slower on CPU, where the pipeline
        compiles a step instead.

        Args:
          params: of the stage, or others of the same tree.
          keys: one per image: of seeds (`keys`), or any (`jax.random.split`).
          condition: from `condition`.
          low: what the stage before hands over, float32 in [-1, 1]; None for stage 1.
          unfinished: whether `low` is the state of a stage that has stopped.
        """
        params = self.in_dtypes(params)  # once, not in every evaluation
        noise, sampler = self.noise(keys), self.config.sampler
        conditioning = self.conditioning(low, noise)

        def step(denoise, x, i, level, to):
            return sampler.step(denoise, x, i, level, to, noise)

        def finish(denoise, x, i, level):
            return sampler.finish(denoise, x, i, level, noise)

        def stay(denoise, x, i, level):
            return x

        def denoise(x, sigma):
            return self.denoise(params, x, sigma, condition, conditioning)

        start = self.start(low, noise, unfinished=unfinished)
        if not sampler.stop:
            return self.clipped(scanned_walk(step, finish, denoise, start, self.levels))
        state = scanned_walk(step, stay, denoise, start, self.levels)
        i = jnp.int32(len(self.levels.sigma) - 1)
        return self.clipped(finish(denoise, state, i, self.level(-1)), state)

    def in_dtypes(self, params: StageParams) -> StageParams:
        """The parameters in the dtypes that their networks compute in."""
        cast = [
            jax.tree.map(lambda leaf, dtype: leaf.astype(dtype), own, part.network.dtypes)
            for own, part in zip((params.network, *params.guides), self._parts, strict=True)
        ]
        return StageParams(cast[0], tuple(cast[1:]))

    def start(
        self, low: Float[AnyArray, "b h2 w2 c"] | None, noise: Noise, *, unfinished: bool = False
    ) -> Float[Array, "b h w c"]:
        """The state at the first level; the arguments are those of `sample`."""
        sampler: Any = self.config.sampler
        return (sampler.join if unfinished else sampler.start)(low, self.level(0), noise)

    def clipped(
        self, x: Float[Array, "b h w c"], state: Float[Array, "b h w c"] | None = None
    ) -> Sampled:
        """What the stage makes of its last images; `state` is that of a stage that stops."""
        images, finite = self._representation.clip(x), jnp.isfinite(x).all((1, 2, 3))
        return Sampled(images, finite, images if state is None else state)
