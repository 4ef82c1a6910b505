"""What networks read of a condition with captions: its sizes, its parts, and tokens as context."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from rdm_jax.models.attention import Context
from rdm_jax.models.backbone import vector_size
from rdm_jax.models.transformer_layers import RMSNorm, dense


class Sizes(NamedTuple):
    """Sizes of a condition.

    Attributes:
      classes: values of a one-hot class; 0 for none.
      tokens, width: of captions; 0 for none.
    """

    classes: int
    tokens: int = 0
    width: int = 0


def sizes_of(condition: Any) -> Sizes:
    """The sizes of a condition of one vector, or of `Text`. Raises InputError for another tree."""
    if not isinstance(condition, dict) or condition.keys() != {"tokens", "mask", "vector"}:
        return Sizes(vector_size(condition))
    tokens, width = condition["tokens"].shape
    return Sizes(condition["vector"].shape[0] - width, tokens, width)


class Caption(NamedTuple):
    """Captions: tokens, zero behind each one's end; their mean; their numbers."""

    tokens: Float[Array, "b t w"]
    vector: Float[Array, "b w"]
    lengths: Int[Array, " b"]


def parts_of(
    condition: Any, sizes: Sizes, images: int
) -> tuple[Float[Array, "b k"] | None, Caption | None]:
    """One-hot classes and captions.

    Args:
      condition: a tree of `sizes`; None is the null condition.
      sizes: those of the network.
      images: b.

    Returns:
      None for parts that the network does not have, and for the null class.
    """
    if not sizes.tokens:
        return condition, None
    if condition is None:
        tokens, vector = jnp.zeros((images, sizes.tokens, sizes.width)), jnp.zeros(sizes.width)
        lengths = jnp.zeros(images, jnp.int32)
        return None, Caption(tokens, jnp.broadcast_to(vector, (images, sizes.width)), lengths)
    vector, classes = jnp.split(condition["vector"], [sizes.width], axis=1)
    lengths = condition["mask"].sum(1).astype(jnp.int32)
    caption = Caption(condition["tokens"], vector, lengths)
    return (classes if sizes.classes else None), caption


class CaptionContext(nnx.Module):
    """A caption's tokens, normalised, behind a learnt one, which is alone for the null caption.

    Args:
      width: of the tokens.
      channels: that they are projected to; 0 for none.
    """

    def __init__(self, width: int, channels: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.norm = RMSNorm(width, dtype=dtype, rngs=rngs)
        self.project = dense(width, channels, dtype=dtype, rngs=rngs) if channels else None
        self.first = nnx.Param(jax.random.normal(rngs.params(), (channels or width,)))

    def __call__(self, caption: Caption) -> Context:
        """Of the dtype, with `channels` or `width`."""
        tokens = self.norm(caption.tokens)
        tokens = tokens if self.project is None else self.project(tokens)
        first = jnp.broadcast_to(self.first[...].astype(tokens.dtype), tokens[:, :1].shape)
        return Context(jnp.concatenate([first, tokens], axis=1), caption.lengths + 1)
