"""Small rules that checks of a config share."""

import re
from typing import Any

from rdm_jax.config.schema import Config
from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.files import local_path

FOLDER = re.compile(r"\w[\w.-]{0,99}")  # names of folders in a workdir
RESERVED = re.compile(  # other names in a workdir
    r"stage\d+|checkpoints|report|config\.json|contact_sheet\.png|classifier\.safetensors"
    r"|tensorboard|autoencoder",
    re.IGNORECASE,
)
IMAGES = ("folder", "zip", "tar")  # kinds of images that are read without preparation


def require(fine: Any, field: str, value: Any, fix: str) -> None:
    """Refuses a value.

    Args:
      fine: whether the value can be used.
      field: its name, such as 'config.seed' or '--stage'.
      value: of the field.
      fix: what to do instead: one imperative sentence.

    Raises:
      InputError: it cannot be used.
    """
    if not fine:
        raise InputError(f"{field}={value!r} cannot be used", fix)


def refuse_latents(config: Config, what: str) -> None:
    """Refuses what is for stages of pixels only. Raises InputError."""
    if config.data.autoencoder:
        raise InputError(
            f"{what} is not supported with config.data.autoencoder={config.data.autoencoder!r}",
            "Use it for stages of pixels, with data.autoencoder=''.",
        )


def check_folder(name: str, field: str) -> None:
    """Refuses a name that no folder of results in a workdir can have. Raises InputError."""
    require(
        FOLDER.fullmatch(name) and not RESERVED.fullmatch(name),
        field,
        name,
        "Use one name of letters, digits, '-', '_' and '.', such as 'my-run', that nothing else in "
        "a workdir has.",
    )


def is_of_kind(spec: str, kinds: tuple[str, ...], field: str) -> bool:
    """Whether a text is 'KIND:PATH' of one of these kinds. Raises InputError for URLs."""
    kind, _, path = spec.partition(":")
    local_path(path if kind in kinds else spec, field)
    return kind in kinds and bool(path)
