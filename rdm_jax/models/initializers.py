"""How the published networks draw their parameters."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array


@dataclasses.dataclass(frozen=True)
class FanIn:
    """ADM's: U(-b, b) for kernel and bias alike, b = sqrt(scale / fan_in)."""

    scale: float = 1.0

    def kernel(self, key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        """Draws a kernel, inputs before outputs in its shape."""
        return self._uniform(key, shape, math.prod(shape[:-1]), dtype)

    def bias(self, fan_in: int) -> Callable[..., Array]:
        """The function that draws the bias of a layer with so many inputs per output."""
        return lambda key, shape, dtype=jnp.float32: self._uniform(key, shape, fan_in, dtype)

    def _uniform(self, key: Array, shape: tuple[int, ...], fan_in: int, dtype: Any) -> Array:
        bound = math.sqrt(self.scale / fan_in)
        if not bound:
            return jnp.zeros(shape, dtype)
        return jax.random.uniform(key, shape, dtype, -bound, bound)


@dataclasses.dataclass(frozen=True)
class Xavier:
    """DDPM++'s and NCSN++'s: U(-b, b), b = gain sqrt(6 / (fan_in + fan_out)); zero bias."""

    gain: float = 1.0

    def kernel(self, key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        """Draws a kernel, inputs before outputs in its shape."""
        return nnx.initializers.variance_scaling(self.gain**2, "fan_avg", "uniform")(
            key, shape, dtype
        )

    def bias(self, fan_in: int) -> Callable[..., Array]:
        """The function that draws the bias: zeros."""
        return nnx.initializers.zeros
