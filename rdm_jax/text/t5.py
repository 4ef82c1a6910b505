"""The files of a T5 v1.1 or Flan-T5: sizes, weights and tokenizer, in Hugging Face's layout."""

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.files import parse_json
from rdm_jax.text.network import TextNetwork
from rdm_jax.text.t5_network import Params, Sizes, apply
from rdm_jax.text.tensor_files import Read, check_file, digest, open_tensors
from rdm_jax.text.tokenizer import open_tokenizer

NETWORK = "a T5 v1.1 encoder"
CONFIG, TOKENIZER = "config.json", "tokenizer.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
FIX = (
    "Use the folder of a T5 v1.1 or Flan-T5 with config.json, tokenizer.json and model.safetensors."
)
# Of the sizes in config.json; far more than any published network has.
LARGEST, MOST_LAYERS = 2**24, 1000

# The sizes in config.json, and their values where the file does not have them.
_SIZES: dict[str, tuple[str, int | None]] = {
    "vocabulary": ("vocab_size", None),
    "width": ("d_model", None),
    "layers": ("num_layers", None),
    "heads": ("num_heads", None),
    "head": ("d_kv", None),
    "hidden": ("d_ff", None),
    "buckets": ("relative_attention_num_buckets", 32),
    "distance": ("relative_attention_max_distance", 128),
    "last": ("eos_token_id", 1),
}


def open_network(folder: Path, field: str) -> TextNetwork:
    """The network and its tokenizer from a folder.

    Args:
      folder: with config.json, tokenizer.json, and model.safetensors or the index of its shards.
      field: that names it, for messages.

    Raises:
      InputError: a library is not installed, or a file is missing, damaged, or another model's.
    """
    if not folder.is_dir():
        raise InputError(f"{field}=t5:{folder} is not a folder", FIX)
    sizes = read_sizes(folder / CONFIG)
    tokenizer = open_tokenizer(folder / TOKENIZER, sizes.vocabulary, sizes.last, FIX)
    paths = weight_files(folder)
    for path in paths:
        check_file(path, f"the weights of {NETWORK}", FIX)
    with open_tensors(paths, _shapes(sizes), NETWORK, FIX):
        pass
    return TextNetwork(
        name="t5",
        width=sizes.width,
        longest=None,
        tokenizer=tokenizer,
        load=functools.partial(load, paths, sizes),
        digest=functools.partial(_digest, [*paths, folder / TOKENIZER, folder / CONFIG]),
        apply=functools.partial(apply, sizes),
    )


def _digest(paths: Sequence[Path]) -> str:
    """The SHA-256 of the digits of the files' own, one after the other."""
    return hashlib.sha256("".join(digest(path, FIX) for path in paths).encode()).hexdigest()


def read_sizes(path: Path) -> Sizes:
    """The sizes of a network.

    Args:
      path: of config.json.

    Raises:
      InputError: the file is missing or damaged, or describes another network.
    """
    about = _read_json(path, f"the sizes of {NETWORK}")
    wanted = {"model_type": "t5", "feed_forward_proj": "gated-gelu"}
    for name, value in wanted.items():
        if about.get(name) != value:
            raise InputError(f"{path} has {name}={about.get(name)!r}, not {value!r}", FIX)
    found = {}
    for ours, (theirs, default) in _SIZES.items():
        size = about.get(theirs, default)
        largest = MOST_LAYERS if ours == "layers" else LARGEST
        if type(size) is not int or not 1 <= size <= largest:
            raise InputError(f"{path} has {theirs}={size!r}, not a size", FIX)
        found[ours] = size
    epsilon = about.get("layer_norm_epsilon", 1e-6)
    if type(epsilon) is not float or not 0 < epsilon < 1:
        raise InputError(f"{path} has layer_norm_epsilon={epsilon!r}, not between 0 and 1", FIX)
    buckets, distance = found["buckets"], found["distance"]
    if buckets % 4 or distance <= buckets // 4:
        raise InputError(
            f"{path} has relative_attention_num_buckets={buckets}, which do not divide distances "
            f"up to {distance}",
            FIX,
        )
    return Sizes(**found, epsilon=epsilon)


def weight_files(folder: Path) -> list[Path]:
    """The files of weights in a folder: model.safetensors, or the shards that its index names.

    Raises:
      InputError: there is neither, or the index is damaged.
    """
    index = folder / INDEX
    if (folder / WEIGHTS).exists() or not index.exists():
        return [folder / WEIGHTS]
    files = _read_json(index, "the index of the weights").get("weight_map")
    names = list(files.values()) if isinstance(files, dict) else []
    if not names or not all(isinstance(n, str) and n == Path(n).name and n for n in names):
        raise InputError(f"{index} has no weight_map with names of files beside it", FIX)
    return [folder / name for name in sorted(set(names))]


def load(paths: Sequence[Path], sizes: Sizes) -> Params:
    """Reads the weights; those of a decoder are left out.

    Args:
      paths: of safetensors files that hold the parameters together.
      sizes: of the network.

    Returns:
      The parameters for `t5_network.apply`, in the dtype of the file: 'words' (vocabulary, width),
      'bias' (buckets, heads), 'norm' (width,), and 'layers' with arrays whose first axis is the
      layer: 'q', 'k', 'v' (width, heads, head), 'out' (heads, head, width), 'gate' and 'in'
      (width, hidden), 'back' (hidden, width), 'norm1' and 'norm2' (width,).

    Raises:
      InputError: a file is damaged, or its parameters are not those of the network.
    """
    shapes = _shapes(sizes)
    with open_tensors(paths, shapes, NETWORK, FIX) as read:
        params = {
            "words": read(_WORDS),
            "bias": read(_BIAS),
            "norm": read(_NORM),
            "layers": _layers(read, sizes),
        }
    return jax.tree.map(jnp.asarray, params)


_WORDS = "shared.weight"
_BIAS = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
_NORM = "encoder.final_layer_norm.weight"
# Of a layer: our names, and Hugging Face's.
_NAMES = {
    "q": "layer.0.SelfAttention.q",
    "k": "layer.0.SelfAttention.k",
    "v": "layer.0.SelfAttention.v",
    "out": "layer.0.SelfAttention.o",
    "norm1": "layer.0.layer_norm",
    "gate": "layer.1.DenseReluDense.wi_0",
    "in": "layer.1.DenseReluDense.wi_1",
    "back": "layer.1.DenseReluDense.wo",
    "norm2": "layer.1.layer_norm",
}


def _layers(read: Read, sizes: Sizes) -> dict[str, np.ndarray]:
    found = {}
    for ours, theirs in _NAMES.items():
        # (outputs, inputs) in the file
        found[ours] = np.stack(
            [read(f"encoder.block.{n}.{theirs}.weight").T for n in range(sizes.layers)]
        )
    for name in ("q", "k", "v"):
        found[name] = found[name].reshape(sizes.layers, sizes.width, sizes.heads, sizes.head)
    found["out"] = found["out"].reshape(sizes.layers, sizes.heads, sizes.head, sizes.width)
    return found


def _shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """The shapes of the encoder's parameters in the file, by Hugging Face's names."""
    width, inner = sizes.width, sizes.heads * sizes.head
    layer: dict[str, tuple[int, ...]] = {
        **dict.fromkeys(("q", "k", "v"), (inner, width)),
        **dict.fromkeys(("gate", "in"), (sizes.hidden, width)),
        **dict.fromkeys(("norm1", "norm2"), (width,)),
        "out": (width, inner),
        "back": (width, sizes.hidden),
    }
    shapes: dict[str, tuple[int, ...]] = {
        _WORDS: (sizes.vocabulary, width),
        _BIAS: (sizes.buckets, sizes.heads),
        _NORM: (width,),
    }
    for n in range(sizes.layers):
        shapes |= {f"encoder.block.{n}.{_NAMES[key]}.weight": layer[key] for key in layer}
    return shapes


def _read_json(path: Path, what: str) -> dict[str, Any]:
    """A file that holds a JSON object."""
    if not path.is_file():
        raise InputError(f"there is no file {path}, {what}", FIX)
    try:
        found = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be used ({error})", FIX) from error
    if not isinstance(found, dict):
        raise InputError(f"{path} does not hold a JSON object", FIX)
    return found
