"""Pixels as numbers: uint8 images to [-1, 1] and back."""

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from rdm_jax.diffusion import blurring


def from_uint8(images: UInt8[Array, "b h w c"], pool: int) -> Float[Array, "b h2 w2 c"]:
    """uint8 to [-1, 1], then the means of pool x pool pixels."""
    return blurring.mean_pool(images.astype(jnp.float32) / 127.5 - 1, factor=pool)


def to_uint8(images: Float[Array, "b h w c"]) -> Array:
    """[-1, 1] to uint8, rounded."""
    return jnp.clip(jnp.round((images + 1) * 127.5), 0, 255).astype(jnp.uint8)
