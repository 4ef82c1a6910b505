"""The representation of images in records and in the network: uint8 pixels, and [-1, 1]."""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from rdm_jax.diffusion import blurring


@dataclasses.dataclass(frozen=True)
class Pixels:
    """Records hold uint8 pixels; networks see values in [-1, 1].

    Attributes:
      dtype: of records.
    """

    dtype: ClassVar[Any] = jnp.uint8

    def encode(self, images: UInt8[Array, "b h w c"], pool: int = 1) -> Float[Array, "b h2 w2 c"]:
        """uint8 to [-1, 1], then the means of pool x pool pixels."""
        return blurring.mean_pool(images.astype(jnp.float32) / 127.5 - 1, factor=pool)

    def decode(self, x: Float[Array, "b h w c"]) -> UInt8[Array, "b h w c"]:
        """[-1, 1] to uint8, rounded; values outside are clipped."""
        return jnp.clip(jnp.round((x + 1) * 127.5), 0, 255).astype(jnp.uint8)

    def clip(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Clips values to those that images can have."""
        return jnp.clip(x, -1, 1)
