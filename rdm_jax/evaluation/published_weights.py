"""Published weights of networks: a known file, read without executing it, checked and folded."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.files import sha256
from rdm_jax.runtime.lazy import lazy_import

torch_files = lazy_import("rdm_jax.interop.torch_files")

NORMALISATION = ("weight", "bias", "running_mean", "running_var")

Read = Callable[[str], np.ndarray]


def check_digest(path: Path, wanted: str, network: str, fix: str) -> str:
    """The SHA-256 of a file of weights, in hexadecimal digits.

    Args:
      path: of the file.
      wanted: the beginning of the expected SHA-256.
      network: its name, for errors.
      fix: of errors.

    Raises:
      InputError: the file is missing, cannot be read, or is another one.
    """
    if not path.exists():
        raise InputError(
            f"there is no {path}, the weights of {network} in the PyTorch port's format", fix
        )
    if not path.is_file():  # opening a pipe would block
        raise InputError(f"{path} is not a file", fix)
    try:
        digest = sha256(path)
    except OSError as error:
        raise InputError(f"{path} cannot be used ({error.strerror})", fix) from error
    if not digest.startswith(wanted):
        found = f"its SHA-256 begins with {digest[:8]}, not {wanted[:8]}"
        raise InputError(f"{path} cannot be used ({found})", fix)
    return digest


@contextmanager
def open_parameters(
    path: Path, shapes: dict[str, tuple[int, ...]], network: str, fix: str
) -> Iterator[Read]:
    """Opens a state_dict; yields what reads a parameter by its name.

    Args:
      path: of the file, of which nothing is executed.
      shapes: of all its parameters, which are float32; batch normalisation's counters are ignored.
      network: its name, for errors.
      fix: of errors.

    Raises:
      InputError: the file is damaged, or its parameters are not these; or, when one is read, it is
        not finite or a negative variance.
    """
    with torch_files.open_state_dict(path) as tensors:
        _check(tensors, path, shapes, network, fix)

        def read(name: str) -> np.ndarray:
            array = tensors[name].read()
            if not np.isfinite(array).all() or (name.endswith("running_var") and array.min() < 0):
                raise InputError(
                    f"{path} has values in {name!r} that are not finite, or negative variances", fix
                )
            return array

        yield read


def _check(
    tensors: dict[str, Any], path: Path, shapes: dict[str, tuple[int, ...]], network: str, fix: str
) -> None:
    """Refuses a file of another network, before anything large is read."""
    found = {
        name: tensor
        for name, tensor in tensors.items()
        if not name.endswith(".num_batches_tracked")
    }
    for name, shape in shapes.items():
        if name not in found:
            raise InputError(f"{path} has no parameter {name!r}", fix)
        if found[name].shape != shape or found[name].dtype != np.float32:
            what = f"shape {found[name].shape} and {found[name].dtype}, not {shape} and float32"
            raise InputError(f"{path} has {name!r} of {what}", fix)
    unknown = sorted(found.keys() - shapes.keys())
    if unknown:
        raise InputError(
            f"{path} has a parameter {unknown[0]!r:.100}, which {network} does not have", fix
        )


def fold(read: Read, conv: str, norm: str, epsilon: float) -> dict[str, np.ndarray]:
    """A convolution's kernel and the batch normalisation after it, folded in float64.

    Args:
      read: from `open_parameters`.
      conv, norm: names of the two.
      epsilon: of the normalisation.

    Returns:
      'kernel' (height, width, in, out), and float32 (out,) 'scale' = weight / sqrt(variance +
      epsilon) and 'shift' = bias - mean scale.
    """
    weight, bias, mean, variance = (
        read(f"{norm}.{part}").astype(np.float64) for part in NORMALISATION
    )
    scale = weight / np.sqrt(variance + epsilon)
    kernel = read(f"{conv}.weight").transpose(2, 3, 1, 0)
    return {"kernel": kernel, "scale": np.float32(scale), "shift": np.float32(bias - mean * scale)}
