"""The published weights of Inception-v3: read, checked, and folded for `inception.apply`."""

import shlex
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from rdm_jax.evaluation import published_weights
from rdm_jax.evaluation.features import FeatureSpace
from rdm_jax.evaluation.inception import EPSILON, LAYERS, SIZES, Params, apply
from rdm_jax.runtime.files import cache_folder

NETWORK = "Inception-v3"
URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth"
)
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


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
    fix = _download(path)
    digest = published_weights.check_digest(path, sha256, NETWORK, fix)
    with published_weights.open_parameters(path, _shapes(), NETWORK, fix) as read:
        params = {
            name: published_weights.fold(read, f"{name}.conv", f"{name}.bn", EPSILON)
            for name in LAYERS
        }
        read("fc.bias")
        params["fc"] = {"kernel": read("fc.weight").T}
    return jax.tree.map(jnp.asarray, params), digest


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
        shapes |= {f"{name}.bn.{part}": (outputs,) for part in published_weights.NORMALISATION}
    return shapes
