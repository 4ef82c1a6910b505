"""Published autoencoders: a folder with config.json and safetensors, as diffusers writes it.

"The original" is its AutoencoderKL. Older files name attention's layers otherwise; both are read.
"""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rdm_jax.interop.import_export import Weights, open_weights
from rdm_jax.interop.settings import integer, is_integer, number, unusable
from rdm_jax.models.autoencoder import AutoencoderKL
from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.fields import check_bounds
from rdm_jax.runtime.files import atomic_write, parse_json, sha256
from rdm_jax.runtime.lazy import lazy_import

safetensors_numpy = lazy_import("safetensors.numpy", "weights")

CLASS = "AutoencoderKL"
CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
FIX = "Use a folder as it was published."
# A file is not trusted, and these numbers decide how much memory is used.
MOST, MOST_LEVELS, MOST_BLOCKS = 2**13, 8, 16
# Settings that change results, and the only values that are supported.
FIXED: dict[str, Any] = {
    "act_fn": "silu",
    "mid_block_add_attention": True,
    "latents_mean": None,
    "latents_std": None,
}

TOP = {"quant": "quant_conv", "post_quant": "post_quant_conv"}
PARTS = {
    "stem": "conv_in",
    "middle0": "mid_block.resnets.0",
    "middle1": "mid_block.resnets.1",
    "attention": "mid_block.attentions.0",
    "out_norm": "conv_norm_out",
    "out_conv": "conv_out",
}
BLOCK = {"norm0": "norm1", "conv0": "conv1", "norm1": "norm2", "conv1": "conv2"}
BLOCK["skip"] = "conv_shortcut"
ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj": "to_out.0"}
OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}


class Published(NamedTuple):
    """A published autoencoder.

    Attributes:
      config: its sizes.
      params: of `config.build()`, float32.
      digest: SHA-256 of the file of weights, in hexadecimal digits.
    """

    config: AutoencoderKL
    params: Any
    digest: str


def load(folder: Path, dtype: str = "float32") -> Published:
    """Reads a published autoencoder.

    Args:
      folder: with config.json and diffusion_pytorch_model.safetensors.
      dtype: 'float32' or 'bfloat16', of its computation.

    Raises:
      InputError: a file is missing or damaged, the config is not supported, or the parameters are
        not those of the config.
    """
    config = read_config(folder / CONFIG, dtype)
    path = folder / WEIGHTS
    if not path.is_file():
        raise InputError(f"there is no {path}, the weights of an autoencoder", FIX)
    abstract = config.build().parts.abstract
    with open_weights(path) as weights:
        names = _names_in(weights, abstract, path)

        def read(keys: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
            name = names[original_name(_path(keys))]
            array = weights.read(name).astype(np.float32)
            if not np.isfinite(array).all():
                raise InputError(f"{path} has values in {name!r} that are not finite", FIX)
            return jnp.asarray(to_ours(array, leaf.shape))

        params = jax.tree.map_with_path(read, abstract)
    return Published(config, params, sha256(path))


def read_config(path: Path, dtype: str = "float32") -> AutoencoderKL:
    """The sizes in a published config.json.

    Raises:
      InputError: they are not supported, or the dtype is none to compute in.
    """
    try:
        settings = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error})", FIX) from error
    if not isinstance(settings, dict):
        raise InputError(f"{path} is not a config of an autoencoder", FIX)
    found = settings.get("_class_name", CLASS)
    if found != CLASS:
        raise unusable("_class_name", found, repr(CLASS))
    for name, value in FIXED.items():
        if settings.get(name, value) != value:
            raise unusable(name, settings[name], f"an autoencoder with {value!r}")
    widths = _widths(settings)
    channels = integer(settings, "in_channels", 1, MOST)
    if settings.get("out_channels") != channels:
        raise unusable("out_channels", settings.get("out_channels"), f"{channels}, as in_channels")
    quantize = settings.get("use_quant_conv", True)
    if not isinstance(quantize, bool) or settings.get("use_post_quant_conv", True) is not quantize:
        raise unusable("use_quant_conv", quantize, "true or false, as use_post_quant_conv")
    shift = settings.get("shift_factor")
    config = AutoencoderKL(
        channels=channels,
        latent_channels=integer(settings, "latent_channels", 1, MOST),
        widths=widths,
        blocks=integer(settings, "layers_per_block", 1, MOST_BLOCKS),
        groups=integer(settings, "norm_num_groups", 1, MOST),
        quantize=quantize,
        scale=number(settings, "scaling_factor", 0.18215),
        shift=0.0 if shift is None else number(settings, "shift_factor", 0.0, least=-1e6),
        dtype=dtype,
    )
    check_bounds(config, "autoencoder")  # of the dtype; the others are checked above
    config.check(str(path))
    return config


def _widths(settings: dict[str, Any]) -> tuple[int, ...]:
    widths = settings.get("block_out_channels")
    if (
        not isinstance(widths, list)
        or not 1 <= len(widths) <= MOST_LEVELS
        or not all(is_integer(width, 1, MOST) for width in widths)
    ):
        raise unusable(
            "block_out_channels", widths, f"1 to {MOST_LEVELS} integers from 1 to {MOST}"
        )
    for name, kind in (
        ("down_block_types", "DownEncoderBlock2D"),
        ("up_block_types", "UpDecoderBlock2D"),
    ):
        if settings.get(name, [kind] * len(widths)) != [kind] * len(widths):
            raise unusable(name, settings[name], f"{len(widths)} times {kind!r}")
    return tuple(widths)


def save(config: AutoencoderKL, params: Any, folder: Path) -> None:
    """Writes an autoencoder as a published one, under the new names, in float32.

    Args:
      config: its sizes.
      params: of `config.build()`.
      folder: is made; files in it are replaced.

    Raises:
      OSError: a file cannot be written.
    """
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    named = ((original_name(_path(keys)), leaf) for keys, leaf in leaves)
    tensors = {name: to_theirs(name, np.asarray(leaf, np.float32)) for name, leaf in named}
    count = len(config.widths)
    settings = {
        "_class_name": CLASS,
        "act_fn": "silu",
        "block_out_channels": list(config.widths),
        "down_block_types": ["DownEncoderBlock2D"] * count,
        "in_channels": config.channels,
        "latent_channels": config.latent_channels,
        "layers_per_block": config.blocks,
        "norm_num_groups": config.groups,
        "out_channels": config.channels,
        "scaling_factor": config.scale,
        "shift_factor": config.shift or None,
        "up_block_types": ["UpDecoderBlock2D"] * count,
        "use_post_quant_conv": config.quantize,
        "use_quant_conv": config.quantize,
    }
    with atomic_write(folder / WEIGHTS) as partial:
        safetensors_numpy.save_file(tensors, partial, metadata={"format": "pt"})
    with atomic_write(folder / CONFIG) as partial:
        partial.write_text(json.dumps(settings, indent=2) + "\n")


def original_name(path: tuple[str, ...]) -> str:
    """The original's name of a parameter at a path such as ('encoder', 'stem', 'bias')."""
    first, *rest, leaf = path
    if first in TOP:
        return f"{TOP[first]}.{LEAVES[leaf]}"
    part, *inner = rest
    side = {"encoder": "down", "decoder": "up"}[first]
    if match := re.fullmatch(r"block(\d+)_(\d+)", part):
        name = "{}_blocks.{}.resnets.{}".format(side, *match.groups())
    elif match := re.fullmatch(r"(down|up)(\d+)", part):
        name = f"{side}_blocks.{match.group(2)}.{side}samplers.0.conv"
    else:
        name = PARTS[part]
    names = ATTENTION if part == "attention" else BLOCK
    return ".".join([first, name, *(names[each] for each in inner), LEAVES[leaf]])


def to_ours(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The original's layout to ours: (out, in, ...) to (..., in, out).

    Attention's matrices, which some files hold as kernels of 1x1, are such kernels here.
    """
    if len(shape) == 4:
        array = array.reshape(*array.shape[:2], *shape[:2]).transpose(2, 3, 1, 0)
    return array


def to_theirs(name: str, array: np.ndarray) -> np.ndarray:
    """The inverse of `to_ours`; attention's kernels become matrices."""
    if array.ndim == 4:
        array = np.ascontiguousarray(array.transpose(3, 2, 0, 1))
    return array[..., 0, 0] if array.ndim == 4 and ".attentions." in name else array


def _path(keys: Any) -> tuple[str, ...]:
    return tuple(key.key for key in keys)


def _names_in(weights: Weights, abstract: Any, path: Path) -> dict[str, str]:
    """The name in the file of every parameter, by the original's new names.

    Raises:
      InputError: one is missing, has another shape, or is not of this autoencoder.
    """
    names = {}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(abstract)[0]:
        new = original_name(_path(keys))
        name = new if new in weights.shapes else _old_name(new)
        if name not in weights.shapes:
            raise InputError(f"{path} has no parameter {new!r} of the autoencoder", FIX)
        shape = leaf.shape if leaf.ndim < 4 else (*leaf.shape[:1:-1], *leaf.shape[:2])
        found = weights.shapes[name]
        as_matrix = ".attentions." in name and (*found, 1, 1) == shape
        if found != shape and not as_matrix:
            raise InputError(
                f"{path} has {name!r} of shape {found}, not {shape} as in {CONFIG}", FIX
            )
        names[new] = name
    unknown = sorted(weights.shapes.keys() - set(names.values()))
    if unknown:
        raise InputError(
            f"{path} has a parameter {unknown[0]!r:.100}, which the autoencoder of {CONFIG} does "
            "not have",
            FIX,
        )
    return names


def _old_name(name: str) -> str:
    """The older name of a layer of attention; other names as they are."""
    match = re.fullmatch(r"(.*\.attentions\.0)\.(to_[qkv]|to_out\.0)\.(\w+)", name)
    return f"{match[1]}.{OLD_ATTENTION[match[2]]}.{match[3]}" if match else name
