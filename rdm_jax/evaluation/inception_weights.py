"""The published weights of Inception-v3: read, checked, and folded for `inception.apply`."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from rdm_jax.evaluation.features import FeatureSpace
from rdm_jax.evaluation.inception import EPSILON, LAYERS, SIZES, Params, apply
from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.files import cache_folder, sha256
from rdm_jax.runtime.lazy import lazy_import

torch_files = lazy_import("rdm_jax.interop.torch_files")

URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth"
)
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"

_NORMALISATION = ("weight", "bias", "running_mean", "running_var")


def inception_space(path: Path) -> FeatureSpace:
    """The feature space of Inception-v3, in which 'pool' is called 'features'.

    Args:
      path: of the weights.

    Raises:
      InputError: as `load`.
    """
    params, digest = load(path)

    def renamed(outputs: dict[str, Any]) -> dict[str, Any]:
        return {
            "features": outputs["pool"],
            "spatial": outputs["spatial"],
            "logits": outputs["logits"],
        }

    def renamed_apply(params: Params, images: Array) -> dict[str, Array]:
        return renamed(apply(params, images))

    return FeatureSpace("inception", digest, renamed(SIZES), params, renamed_apply)


def default_path() -> Path:
    """The default path of the weights."""
    return cache_folder() / URL.rpartition("/")[2]


def load(path: Path, sha256: str = SHA256) -> tuple[Params, str]:
    """Reads the published weights.

    Nothing in the file is executed, and the file is read only if its checksum is right.

    Args:
      path: of the PyTorch port's state_dict.
      sha256: the beginning of the expected SHA-256, in hexadecimal digits.

    Returns:
      The parameters for `apply` by layer, and the file's SHA-256. A layer has 'kernel' (height,
      width, in, out) and batch normalisation as 'scale' and 'shift' (out,); 'fc' has only 'kernel'
      (in, out).

    Raises:
      InputError: the file is missing or another one, or its parameters are not those of the
        network, or not finite.
    """
    digest = _sha256(path)
    if not digest.startswith(sha256):
        found = f"its SHA-256 begins with {digest[:8]}, not {sha256[:8]}"
        raise InputError(f"{path} cannot be used ({found})", _download(path))
    with torch_files.open_state_dict(path) as tensors:
        _check(tensors, path)

        def read(name: str) -> np.ndarray:
            array = tensors[name].read()
            if not np.isfinite(array).all() or (name.endswith("running_var") and array.min() < 0):
                raise InputError(
                    f"{path} has values in {name!r} that are not finite, or negative variances",
                    _download(path),
                )
            return array

        params = {name: _fold(name, read) for name in LAYERS}
        read("fc.bias")
        params["fc"] = {"kernel": read("fc.weight").T}
    return jax.tree.map(jnp.asarray, params), digest


def _sha256(path: Path) -> str:
    if not path.exists():
        raise InputError(
            f"there is no {path}, the weights of Inception-v3 in the PyTorch port's format",
            _download(path),
        )
    if not path.is_file():  # opening a pipe would block
        raise InputError(f"{path} is not a file", _download(path))
    try:
        return sha256(path)
    except OSError as error:
        raise InputError(f"{path} cannot be used ({error.strerror})", _download(path)) from error


def _download(path: Path) -> str:
    """The remedy for missing or wrong weights."""
    command = f"curl -L --create-dirs -o {shlex.quote(str(path))} {URL}"
    return f"Download the published file with `{command}`."


def _shapes() -> dict[str, tuple[int, ...]]:
    """The shape of every parameter in the file, by the port's names."""
    shapes: dict[str, tuple[int, ...]] = {
        "fc.weight": (SIZES["logits"], SIZES["pool"]),
        "fc.bias": (SIZES["logits"],),
    }
    for name, (height, width, inputs, outputs) in LAYERS.items():
        shapes[f"{name}.conv.weight"] = (outputs, inputs, height, width)
        shapes |= {f"{name}.bn.{part}": (outputs,) for part in _NORMALISATION}
    return shapes


def _check(tensors: dict[str, Any], path: Path) -> None:
    """Refuses a file of another network, before anything large is read.

    The batch counters of batch normalisation are ignored.
    """
    wanted = _shapes()
    found = {
        name: tensor
        for name, tensor in tensors.items()
        if not name.endswith(".num_batches_tracked")
    }
    for name, shape in wanted.items():
        if name not in found:
            raise InputError(f"{path} has no parameter {name!r}", _download(path))
        if found[name].shape != shape or found[name].dtype != np.float32:
            what = f"shape {found[name].shape} and {found[name].dtype}, not {shape} and float32"
            raise InputError(f"{path} has {name!r} of {what}", _download(path))
    unknown = sorted(found.keys() - wanted.keys())
    if unknown:
        raise InputError(
            f"{path} has a parameter {unknown[0]!r:.100}, which Inception-v3 does not have",
            _download(path),
        )


def _fold(name: str, read: Callable[[str], np.ndarray]) -> dict[str, np.ndarray]:
    """A layer's parameters for `apply`, folded in float64.

    scale = weight / sqrt(variance + EPSILON), shift = bias - mean scale.
    """
    weight, bias, mean, variance = (
        read(f"{name}.bn.{part}").astype(np.float64) for part in _NORMALISATION
    )
    scale = weight / np.sqrt(variance + EPSILON)
    kernel = read(f"{name}.conv.weight").transpose(2, 3, 1, 0)
    return {"kernel": kernel, "scale": np.float32(scale), "shift": np.float32(bias - mean * scale)}
