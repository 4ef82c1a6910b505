"""The walk of any sampler through its levels: step by step, or as one compiled loop.

A sampler's step evaluates the denoiser once or twice, and its last step once more. `scanned_walk`
loops over the evaluations, and the body of its loop has one network; a loop over the steps as they
are would have a copy for each of these calls, and take as many times as long to compile. The
arithmetic between two calls runs in branches of `lax.switch`.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rdm_jax.diffusion.protocols import Denoiser, Levels

# A step with its denoiser still open: (denoise, x, i, level, to) -> x.
OpenStep = Callable[..., Array]


def walk(
    step: Callable[..., Array],
    finish: Callable[..., Array],
    x: Float[Array, "b h w c"],
    levels: Levels,
) -> Float[Array, "b h w c"]:
    """Takes the state x at levels[0] through all levels to clean images, step by step.

    For CPUs, where XLA runs convolutions inside of a loop several times slower; `step` and `finish`
    should be compiled.

    Args:
      step: (x, i, level, to) -> x, a sampler's step with everything else bound.
      finish: (x, i, level) -> x.
      x: the state at the first level.
      levels: n of them.
    """
    n = levels.sigma.shape[0]

    def at(i: int) -> Levels:
        return jax.tree.map(lambda a: a[i], levels)

    for i in range(n - 1):
        x = step(x, jnp.int32(i), at(i), at(i + 1))
    return finish(x, jnp.int32(n - 1), at(n - 1))


def scanned_walk(
    step: OpenStep,
    finish: OpenStep,
    denoise: Denoiser,
    x: Float[Array, "b h w c"],
    levels: Levels,
) -> Float[Array, "b h w c"]:
    """`walk` as one compiled loop, for accelerators, inside `jit`.

    Args:
      step: (denoise, x, i, level, to) -> x.
      finish: (denoise, x, i, level) -> x.
      denoise: of a state and a scalar noise level. How often a step calls it must not depend on
        the step.
      x: the state at the first level.
      levels: two or more.
    """
    n = levels.sigma.shape[0]
    levels = jax.tree.map(jnp.asarray, levels)

    def at(i: Array) -> Levels:
        return jax.tree.map(lambda a: a[i], levels)

    def one_step(denoise: Denoiser, x: Array, i: Array) -> Array:
        return step(denoise, x, i, at(i), at(i + 1))

    def last_step(denoise: Denoiser, x: Array, i: Array) -> Array:
        return finish(denoise, x, i, at(i))

    calls, last_calls = (_count_calls(f, x) for f in (one_step, last_step))
    # A branch for each call of either step: the state and level that it asks for, and the state
    # after it, which is new after a step's last call.
    asked, after = [], []
    for function, count in ((one_step, calls), (last_step, last_calls)):
        for call in range(count):
            asked.append(functools.partial(_asked, function, call))
            replayed = functools.partial(_replayed, function)
            after.append(replayed if call == count - 1 else lambda x, i, images: x)

    def body(carry: Any, trip: Any) -> tuple[Any, None]:
        (x, images), (i, branch, call) = carry, trip
        state, sigma = jax.lax.switch(branch, asked, x, i, images)
        images = images.at[call].set(denoise(state, sigma))
        return (jax.lax.switch(branch, after, x, i, images), images), None

    steps = [(i, call, call) for i in range(n - 1) for call in range(calls)]
    steps += [(n - 1, calls + call, call) for call in range(last_calls)]
    trips = tuple(jnp.array(column, jnp.int32) for column in zip(*steps, strict=True))
    images = jnp.zeros((max(calls, last_calls), *x.shape), x.dtype)
    (x, _), _ = jax.lax.scan(body, (x, images), trips)
    return x if last_calls else last_step(denoise, x, jnp.int32(n - 1))


class _Asked(Exception):
    """Ends the trace of a step at the call of the denoiser that is not answered yet."""


def _answering(images: Array, known: int, asked: list[tuple[Array, Array]]) -> Denoiser:
    """A denoiser whose first `known` answers are `images`; what it is asked for is added."""

    def denoise(x: Array, sigma: Array) -> Array:
        asked.append((x, jnp.asarray(sigma)))
        if len(asked) > known:
            raise _Asked
        return images[len(asked) - 1]

    return denoise


def _asked(function: OpenStep, call: int, x: Array, i: Array, images: Array) -> Any:
    """The state and noise level of a step's call of the denoiser, given the images before."""
    asked: list[tuple[Array, Array]] = []
    with contextlib.suppress(_Asked):
        function(_answering(images, call, asked), x, i)
    return asked[call]


def _replayed(function: OpenStep, x: Array, i: Array, images: Array) -> Array:
    """The step with the denoiser's answers."""
    return function(_answering(images, len(images), []), x, i)


def _count_calls(function: OpenStep, x: Array) -> int:
    """How often a step calls the denoiser."""
    calls = []

    def denoise(x: Array, sigma: Array) -> Array:
        calls.append(sigma)
        return x

    jax.eval_shape(lambda x: function(denoise, x, jnp.int32(0)), x)
    return len(calls)
