"""T5's encoder (arXiv 1910.10683), version 1.1 and Flan-T5: gated GELU, no biases."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from rdm_jax.runtime.errors import InputError

MODEL_TYPES = ("t5",)


class Settings(NamedTuple):
    """Sizes of a T5 encoder.

    Attributes:
      width, layers, heads, head_width, hidden: of the transformer; `hidden` of its feed-forward
        layers.
      vocabulary: number of words.
      buckets, most_distance: of the relative positions.
      most_tokens: any number, as positions are relative.
      epsilon: of the RMS norms.
    """

    width: int
    layers: int
    heads: int
    head_width: int
    hidden: int
    vocabulary: int
    buckets: int
    most_distance: int
    most_tokens: int
    epsilon: float


def settings(config: Mapping[str, Any], folder: Path) -> Settings:
    """The sizes in config.json. Raises InputError for a variant that is not supported."""
    if config.get("feed_forward_proj") != "gated-gelu":
        raise InputError(
            f"{folder}: feed_forward_proj is {config.get('feed_forward_proj')!r:.40}",
            "Use T5 v1.1 or Flan-T5, whose layers are 'gated-gelu'.",
        )
    try:
        return Settings(
            width=config["d_model"],
            layers=config["num_layers"],
            heads=config["num_heads"],
            head_width=config["d_kv"],
            hidden=config["d_ff"],
            vocabulary=config["vocab_size"],
            buckets=config["relative_attention_num_buckets"],
            most_distance=config.get("relative_attention_max_distance", 128),
            most_tokens=2**16,
            epsilon=config["layer_norm_epsilon"],
        )
    except KeyError as error:
        raise InputError(f"{folder}: config.json has no {error}", "Copy it again.") from error


def shapes(sizes: Settings) -> dict[str, tuple[int, ...]]:
    """The arrays that are used, by their names; linear layers are (out, in)."""
    w, inner = sizes.width, sizes.heads * sizes.head_width
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    found: dict[str, tuple[int, ...]] = {
        "shared.weight": (sizes.vocabulary, w),
        bias: (sizes.buckets, sizes.heads),
        "encoder.final_layer_norm.weight": (w,),
    }
    for block in range(sizes.layers):
        at = f"encoder.block.{block}.layer"
        found |= {
            f"{at}.0.layer_norm.weight": (w,),
            f"{at}.0.SelfAttention.q.weight": (inner, w),
            f"{at}.0.SelfAttention.k.weight": (inner, w),
            f"{at}.0.SelfAttention.v.weight": (inner, w),
            f"{at}.0.SelfAttention.o.weight": (w, inner),
            f"{at}.1.layer_norm.weight": (w,),
            f"{at}.1.DenseReluDense.wi_0.weight": (sizes.hidden, w),
            f"{at}.1.DenseReluDense.wi_1.weight": (sizes.hidden, w),
            f"{at}.1.DenseReluDense.wo.weight": (w, sizes.hidden),
        }
    return found


def apply(
    sizes: Settings, params: dict[str, Array], ids: Int[Array, "b t"], mask: Float[Array, "b t"]
) -> Float[Array, "b t w"]:
    """The last layer's tokens; those behind the mask are of no use."""

    def linear(x: Array, name: str) -> Array:
        return x @ params[f"{name}.weight"].T

    def norm(x: Array, name: str) -> Array:
        x = x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + sizes.epsilon)
        return x * params[f"{name}.weight"]

    table = params["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    bias = table[buckets(sizes, ids.shape[1])].transpose(2, 0, 1)[None]  # (1, heads, t, t)
    x = params["shared.weight"][ids]
    for block in range(sizes.layers):
        at = f"encoder.block.{block}.layer"
        y = norm(x, f"{at}.0.layer_norm")
        q, k, v = (
            linear(y, f"{at}.0.SelfAttention.{name}").reshape(*y.shape[:2], sizes.heads, -1)
            for name in "qkv"
        )
        # T5 does not divide the logits by the root of the width.
        mixed = jax.nn.dot_product_attention(
            q, k, v, bias=bias, mask=mask[:, None, None, :] > 0, scale=1.0
        )
        x += linear(mixed.reshape(*y.shape[:2], -1), f"{at}.0.SelfAttention.o")
        y = norm(x, f"{at}.1.layer_norm")
        gate = jax.nn.gelu(linear(y, f"{at}.1.DenseReluDense.wi_0"), approximate=True)
        y = gate * linear(y, f"{at}.1.DenseReluDense.wi_1")
        x += linear(y, f"{at}.1.DenseReluDense.wo")
    return norm(x, "encoder.final_layer_norm")


def buckets(sizes: Settings, tokens: int) -> Int[np.ndarray, "t t"]:
    """The bucket of each pair's distance: half of them for each direction.

    Half of a direction's buckets hold one distance each, the others logarithmically more, up to
    `most_distance`; the last one holds all that are larger.
    """
    distance = np.arange(tokens)[None, :] - np.arange(tokens)[:, None]
    half = sizes.buckets // 2
    exact = half // 2
    size = np.maximum(np.abs(distance), 1)
    scale = (half - exact) / math.log(sizes.most_distance / exact)
    larger = exact + (np.log(size / exact) * scale).astype(int)
    near = np.abs(distance) < exact
    found = np.where(near, np.abs(distance), np.minimum(larger, half - 1))
    return found + half * (distance > 0)
