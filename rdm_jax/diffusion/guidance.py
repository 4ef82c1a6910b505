"""Guidance: transforms of conditional denoisers, independent of samplers.

`compose` chains several; the result is a conditional denoiser again, to which the sampling of a
stage binds the condition.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rdm_jax.diffusion.protocols import ConditionalDenoiser

Guidance = Callable[[ConditionalDenoiser], ConditionalDenoiser]


@runtime_checkable
class HasNull(Protocol):
    """The part of a condition that guidance needs."""

    def null(self, condition: Any) -> Any:
        """The null condition, a tree of the shapes of `condition`."""


@dataclasses.dataclass(frozen=True)
class ClassifierFree:
    """D = w D(x | c) - (w - 1) D(x | null) (arXiv 2207.12598), both passes in one call.

    The two of an image are neighbours in a batch of 2 b, so that both are on the device of the
    image and nothing moves between devices. Weight 1 is plain conditional denoising, one pass.

    Attributes:
      weight: w.
      condition: gives the null condition.
      interval: the noise levels between which w applies, lower and upper, both exclusive (arXiv
        2404.07724). Levels within 1e-5 of a bound count as outside, so that rounding does not
        decide about a level that a sampler has put on it.
    """

    weight: float
    condition: HasNull
    interval: tuple[float, float] = (0.0, math.inf)

    def __call__(self, conditional: ConditionalDenoiser) -> ConditionalDenoiser:
        """The guided denoiser."""
        if self.weight == 1:
            return conditional

        def guided(
            x: Float[Array, "b h w c"], sigma: Float[Array, "*b"], condition: Any
        ) -> Float[Array, "b h w c"]:
            both = jax.tree.map(_interleaved, condition, self.condition.null(condition))
            twice_sigma = jnp.repeat(jnp.broadcast_to(sigma, x.shape[:1]), 2)
            passes = conditional(jnp.repeat(x, 2, axis=0), twice_sigma, both)
            passes = passes.reshape(len(x), 2, *x.shape[1:])
            weight = self._weight_at(jnp.broadcast_to(sigma, x.shape[:1]))
            return weight * passes[:, 0] - (weight - 1) * passes[:, 1]

        return guided

    def _weight_at(self, sigma: Float[Array, " b"]) -> Float[Array, "b 1 1 1"] | float:
        low, high = self.interval
        if (low, high) == (0, math.inf):
            return self.weight
        inside = (sigma > low * (1 + 1e-5)) & (sigma < high * (1 - 1e-5))
        return jnp.where(inside, self.weight, 1.0).astype(sigma.dtype)[:, None, None, None]


def _interleaved(one: Array, other: Array) -> Array:
    return jnp.stack([one, other], axis=1).reshape(-1, *one.shape[1:])


def compose(*transforms: Guidance) -> Guidance:
    """One transform of several; the first is applied first."""
    return lambda conditional: functools.reduce(
        lambda denoiser, transform: transform(denoiser), transforms, conditional
    )
