"""The encoder of T5 v1.1 and Flan-T5, of any size.

Raffel et al. (arXiv 1910.10683), with the gated feed-forward layers of Shazeer (arXiv 2002.05202).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from rdm_jax.text.attention import attend

Params = dict[str, Any]


class Sizes(NamedTuple):
    """The sizes of a T5 encoder.

    Attributes:
      vocabulary, width, layers, heads: of the network.
      head: width of a head; `heads` of them need not be as wide as the network.
      hidden: width of the feed-forward layers.
      buckets, distance: of relative positions, as in `relative_buckets`.
      last: the id of the token that ends a text.
      epsilon: of the normalisations.
    """

    vocabulary: int
    width: int
    layers: int
    heads: int
    head: int
    hidden: int
    buckets: int
    distance: int
    last: int
    epsilon: float


def apply(
    sizes: Sizes, params: Params, ids: Int[Array, "b t"], mask: Bool[Array, "b t"]
) -> Float[Array, "b t w"]:
    """The last layer's tokens, float32.

    Parameters are converted to float32 layer by layer: they may be stored in half precision.

    Args:
      sizes: of the network.
      params: from `t5.load`.
      ids: of the tokens.
      mask: of the valid ones.
    """

    def layer(x: Array, stored: dict[str, Array]) -> tuple[Array, None]:
        p = jax.tree.map(jnp.float32, stored)
        y = _norm(x, p["norm1"], sizes.epsilon)
        q, k, v = (jnp.einsum("btw,whd->bthd", y, p[name]) for name in ("q", "k", "v"))
        x += jnp.einsum("bthd,hdw->btw", attend(q, k, v, mask, bias), p["out"])
        y = _norm(x, p["norm2"], sizes.epsilon)
        y = jax.nn.gelu(y @ p["gate"], approximate=True) * (y @ p["in"])
        return x + y @ p["back"], None

    with jax.default_matmul_precision("highest"):
        buckets = relative_buckets(ids.shape[1], sizes.buckets, sizes.distance)
        bias = jnp.float32(params["bias"])[buckets].transpose(2, 0, 1)
        x = jnp.float32(params["words"][ids])
        x = jax.lax.scan(layer, x, params["layers"])[0]
        return _norm(x, jnp.float32(params["norm"]), sizes.epsilon)


def relative_buckets(tokens: int, buckets: int, distance: int) -> Int[np.ndarray, "t t"]:
    """The bucket of every pair of positions (query, key), int32 (arXiv 1910.10683, section 2.1).

    Half of the buckets are for keys behind the query. Of each half, the first half is for single
    distances; the others grow logarithmically, and the last begins below `distance`.

    Args:
      tokens: the number of positions.
      buckets: their number, even.
      distance: from which on all are in the last bucket.
    """
    offsets = np.arange(tokens)[None] - np.arange(tokens)[:, None]
    half = buckets // 2
    single = half // 2
    far = np.abs(offsets)
    # In float32, like the published code: elsewhere distances on a bucket's edge might be rounded
    # into the other bucket.
    ratio = np.log(np.float32(np.maximum(far, 1)) / np.float32(single)) / np.float32(
        np.log(distance / single)
    )
    grown = single + (ratio * np.float32(half - single)).astype(np.int32)
    bucket = np.where(far < single, far, np.minimum(grown, half - 1))
    return np.asarray(bucket + half * (offsets > 0), np.int32)


def _norm(x: Array, scale: Array, epsilon: float) -> Array:
    """Division by the root of the mean square."""
    return x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + epsilon) * scale
