"""BERT's encoder (arXiv 1810.04805), of which MiniLM (arXiv 2002.10957) is a small one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float, Int

from rdm_jax.runtime.errors import InputError

MODEL_TYPES = ("bert",)


class Settings(NamedTuple):
    """Sizes of a BERT.

    Attributes:
      width, layers, heads, hidden: of the transformer; `hidden` of its feed-forward layers.
      vocabulary: number of words.
      most_tokens: number of positions.
      epsilon: of the layer norms.
    """

    width: int
    layers: int
    heads: int
    hidden: int
    vocabulary: int
    most_tokens: int
    epsilon: float


def settings(config: Mapping[str, Any], folder: Path) -> Settings:
    """The sizes in config.json. Raises InputError for a variant that is not supported."""
    wanted = {"hidden_act": "gelu", "position_embedding_type": "absolute"}
    for field, value in wanted.items():
        if config.get(field, value) != value:
            raise InputError(f"{folder}: {field} is {config[field]!r:.40}", f"Use {value!r}.")
    try:
        return Settings(
            width=config["hidden_size"],
            layers=config["num_hidden_layers"],
            heads=config["num_attention_heads"],
            hidden=config["intermediate_size"],
            vocabulary=config["vocab_size"],
            most_tokens=config["max_position_embeddings"],
            epsilon=config["layer_norm_eps"],
        )
    except KeyError as error:
        raise InputError(f"{folder}: config.json has no {error}", "Copy it again.") from error


def shapes(sizes: Settings) -> dict[str, tuple[int, ...]]:
    """The arrays that are used, by their names; linear layers are (out, in)."""
    w, h = sizes.width, sizes.hidden
    found: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (sizes.vocabulary, w),
        "embeddings.position_embeddings.weight": (sizes.most_tokens, w),
        "embeddings.token_type_embeddings.weight": (2, w),
        "embeddings.LayerNorm.weight": (w,),
        "embeddings.LayerNorm.bias": (w,),
    }
    for layer in range(sizes.layers):
        at = f"encoder.layer.{layer}"
        for name, (outputs, inputs) in {
            "attention.self.query": (w, w),
            "attention.self.key": (w, w),
            "attention.self.value": (w, w),
            "attention.output.dense": (w, w),
            "intermediate.dense": (h, w),
            "output.dense": (w, h),
        }.items():
            found |= {f"{at}.{name}.weight": (outputs, inputs), f"{at}.{name}.bias": (outputs,)}
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            found |= {f"{at}.{name}.weight": (w,), f"{at}.{name}.bias": (w,)}
    return found


def apply(
    sizes: Settings, params: dict[str, Array], ids: Int[Array, "b t"], mask: Float[Array, "b t"]
) -> Float[Array, "b t w"]:
    """The last layer's tokens; those behind the mask are of no use."""

    def linear(x: Array, name: str) -> Array:
        return x @ params[f"{name}.weight"].T + params[f"{name}.bias"]

    def norm(x: Array, name: str) -> Array:
        mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        x = (x - mean) * jax.lax.rsqrt(variance + sizes.epsilon)
        return x * params[f"{name}.weight"] + params[f"{name}.bias"]

    x = params["embeddings.word_embeddings.weight"][ids]
    x += params["embeddings.position_embeddings.weight"][: ids.shape[1]]
    x += params["embeddings.token_type_embeddings.weight"][0]
    x = norm(x, "embeddings.LayerNorm")
    for layer in range(sizes.layers):
        at = f"encoder.layer.{layer}"
        q, k, v = (
            linear(x, f"{at}.attention.self.{name}").reshape(*x.shape[:2], sizes.heads, -1)
            for name in ("query", "key", "value")
        )
        mixed = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None, None, :] > 0)
        mixed = linear(mixed.reshape(x.shape), f"{at}.attention.output.dense")
        x = norm(x + mixed, f"{at}.attention.output.LayerNorm")
        wide = jax.nn.gelu(linear(x, f"{at}.intermediate.dense"), approximate=False)
        x = norm(x + linear(wide, f"{at}.output.dense"), f"{at}.output.LayerNorm")
    return x
