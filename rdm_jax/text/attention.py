"""Attention of text networks: float32, to the valid tokens."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def attend(
    q: Float[Array, "b t h d"],
    k: Float[Array, "b s h d"],
    v: Float[Array, "b s h d"],
    mask: Bool[Array, "b s"],
    bias: Float[Array, "h t s"] | float = 0.0,
) -> Float[Array, "b t h d"]:
    """softmax(q k^T + bias) v over the tokens of the mask; without the usual 1 / sqrt(d).

    A row whose mask is empty attends to all tokens equally: what it gives is finite, and not used.
    """
    logits = jnp.einsum("bthd,bshd->bhts", q, k) + bias
    logits = jnp.where(mask[:, None, None], logits, jnp.finfo(logits.dtype).min)
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(logits), v)
