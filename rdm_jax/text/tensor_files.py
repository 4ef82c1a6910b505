"""Parameters from safetensors files, which are not trusted: known names and shapes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.files import sha256
from rdm_jax.runtime.lazy import lazy_import

safetensors = lazy_import("safetensors", "text")

FLOATS = ("F32", "F16", "BF16")

Read = Callable[[str], np.ndarray]


def check_file(path: Path, what: str, fix: str) -> None:
    """Refuses a path that is not a file.

    Args:
      path: of the file.
      what: it is, for errors, as in 'the weights of T5'.
      fix: of errors.

    Raises:
      InputError: it is missing, or not a file.
    """
    if not path.exists():
        raise InputError(f"there is no {path}, {what}", fix)
    if not path.is_file():  # opening a pipe would block
        raise InputError(f"{path}, {what}, is not a file", fix)


def digest(path: Path, fix: str) -> str:
    """The SHA-256 of a file, in hexadecimal digits. Raises InputError if it cannot be read."""
    try:
        return sha256(path)
    except OSError as error:
        raise InputError(f"{path} cannot be used ({error.strerror})", fix) from error


@contextmanager
def open_tensors(
    paths: Sequence[Path], shapes: Mapping[str, tuple[int, ...]], network: str, fix: str
) -> Iterator[Read]:
    """Opens files of weights; yields what reads a parameter by its name, in the file's dtype.

    Args:
      paths: of the files, which hold the parameters together; others in them are not looked at.
      shapes: of the parameters; they are float32, float16 or bfloat16.
      network: its name, for errors.
      fix: of errors.

    Raises:
      InputError: a file is damaged, or its parameters are not these.
    """
    with ExitStack() as opened:
        found: dict[str, tuple[Path, Any]] = {}
        for path in paths:
            try:
                file = opened.enter_context(safetensors.safe_open(path, framework="np"))
                found |= {name: (path, file) for name in file.keys()}  # noqa: SIM118 (no dict)
            except (safetensors.SafetensorError, OSError, ValueError) as error:
                raise InputError(f"{path} cannot be used ({error})", fix) from error
        for name, shape in shapes.items():
            if name not in found:
                raise InputError(f"{paths[0]} has no parameter {name!r} of {network}", fix)
            path, file = found[name]
            tensor = file.get_slice(name)
            if tuple(tensor.get_shape()) != shape or tensor.get_dtype() not in FLOATS:
                what = f"shape {tuple(tensor.get_shape())} and {tensor.get_dtype()}"
                raise InputError(
                    f"{path} has {name!r} of {what}, not {shape} and one of {', '.join(FLOATS)}",
                    fix,
                )
        yield lambda name: found[name][1].get_tensor(name)
