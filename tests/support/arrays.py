"""Arrays that stand for images."""

import jax
import jax.numpy as jnp
import numpy as np


def images(shape: tuple[int, ...], seed: int = 0) -> jax.Array:
    """Standard normal, float32."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)
