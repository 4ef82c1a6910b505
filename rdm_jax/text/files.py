"""The files of a text encoder, as Hugging Face distributes them."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.files import parse_json, sha256
from rdm_jax.runtime.lazy import lazy_import

safetensors = lazy_import("safetensors.numpy", "text")
tokenizers = lazy_import("tokenizers", "text")

CONFIG, TOKENIZER, WEIGHTS = "config.json", "tokenizer.json", "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"


class Files(NamedTuple):
    """What a folder holds.

    Attributes:
      config: the content of config.json.
      arrays: by name.
      weights_hash: sha256 of the weights; of several files, of their hashes.
      tokenizer: without truncation and padding.
    """

    config: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray]
    weights_hash: str
    tokenizer: Any


def read(folder: Path, model_types: Sequence[str], field: str, spec: str) -> Files:
    """Reads an encoder's folder.

    Args:
      folder: of the files.
      model_types: what `model_type` in config.json may be.
      field, spec: for errors.

    Raises:
      InputError: a file is missing or damaged, or the config is of another model.
    """
    for name in (CONFIG, TOKENIZER):
        if not (folder / name).is_file():
            raise InputError(
                f"{field}={spec!r}: {folder / name} is missing",
                f"Give a folder with {CONFIG}, {TOKENIZER} and {WEIGHTS}.",
            )
    try:
        config = parse_json((folder / CONFIG).read_text())
        model_type = config["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(folder / CONFIG, error) from error
    if model_type not in model_types:
        raise InputError(
            f"{field}={spec!r}: {folder} is a {model_type!r:.40} and not a {model_types[0]!r}",
            "Use the folder of the encoder that it names.",
        )
    paths = _weights(folder, field, spec)
    arrays: dict[str, np.ndarray] = {}
    for path in paths:
        try:
            arrays |= safetensors.load_file(path)
        except InputError:
            raise
        except Exception as error:  # the library raises its own errors
            raise _damaged(path, error) from error
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(folder / TOKENIZER))
    except InputError:
        raise
    except Exception as error:  # the library raises plain exceptions
        raise _damaged(folder / TOKENIZER, error) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    hashes = [sha256(path) for path in paths]
    whole = hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
    return Files(config, arrays, whole, tokenizer)


def _weights(folder: Path, field: str, spec: str) -> list[Path]:
    """The files of the weights: one, or those of an index."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise InputError(
            f"{field}={spec!r}: {folder / WEIGHTS} is missing",
            f"Give a folder with {CONFIG}, {TOKENIZER} and {WEIGHTS}.",
        )
    try:
        names = sorted(set(parse_json((folder / INDEX).read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(folder / INDEX, error) from error
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise InputError(f"{folder / INDEX} names {name!r:.80}, which is missing", "Add it.")
    return [folder / name for name in names]


def check_shapes(
    arrays: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]], folder: Path
) -> None:
    """Raises InputError if an array is missing, of another shape, or not finite."""
    for name, shape in shapes.items():
        if name not in arrays:
            raise InputError(f"{folder} has no array {name!r}", "Copy it again.")
        found = arrays[name]
        if found.shape != shape:
            raise InputError(
                f"{folder}: {name!r} has the shape {found.shape}, and {CONFIG} says {shape}",
                "Use the files of one model.",
            )
        if not np.isfinite(found.astype(np.float32)).all():
            raise InputError(f"{folder}: {name!r} has values that are not finite", "Copy it again.")


def _damaged(path: Path, error: Exception) -> InputError:
    return InputError(f"{path} cannot be read ({error!s:.120})", "Copy it again.")
