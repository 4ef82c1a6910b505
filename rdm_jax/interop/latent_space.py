"""The space of a run's stages: pixels, or the latents of the autoencoder `data.autoencoder`.

A stage's `resolution` is what its network sees; of latents its images are larger by the
autoencoder's factor.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Array, Float, UInt8

from rdm_jax.config import Config
from rdm_jax.config.rules import require
from rdm_jax.data.latent_spec import LatentSpec
from rdm_jax.diffusion.latents import Latents
from rdm_jax.diffusion.pixels import Pixels
from rdm_jax.interop import autoencoder_files
from rdm_jax.interop.latent_encoder import PixelCodec
from rdm_jax.models.autoencoder import AutoencoderKL
from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.files import local_path, sha256

FIELD = "config.data.autoencoder"
TRAIN_ONE = "Train one with --mode=autoencoder, or use the folder of a published one."
# Fields of `Training` that pixels alone can have, and the values of none.
OF_PIXELS = {"augment": 0.0, "flip": False, "dct_quality": 0}


def folder(config: Config) -> Path | None:
    """The folder of the autoencoder; None for pixels. Raises InputError if there is none."""
    if not config.data.autoencoder:
        return None
    path = local_path(config.data.autoencoder, FIELD)
    for name in (autoencoder_files.CONFIG, autoencoder_files.WEIGHTS):
        if not (path / name).is_file():
            raise InputError(f"{FIELD}={str(path)!r} has no {name}", TRAIN_ONE)
    return path


def network(config: Config) -> AutoencoderKL | None:
    """The sizes of the autoencoder, by its config.json; None for pixels.

    Raises:
      InputError: there is no such folder, or its config.json is damaged or not supported.
    """
    path = folder(config)
    if path is None:
        return None
    try:
        return autoencoder_files.read_config(path / autoencoder_files.CONFIG)
    except InputError as error:
        raise InputError(f"{FIELD}: {error.problem}", error.fix) from error


def digest(config: Config) -> str | None:
    """SHA-256 of the autoencoder's weights; None for pixels."""
    path = folder(config)
    return path and sha256(path / autoencoder_files.WEIGHTS)


def open_codec(config: Config) -> PixelCodec | None:
    """The autoencoder; None for pixels. Raises InputError: it is missing or damaged."""
    path = folder(config)
    return path and PixelCodec(path)


def channels(config: Config) -> int:
    """The channels of what networks see."""
    found = network(config)
    return found.latent_channels if found else config.data.channels


def image_shape(config: Config, number: int) -> tuple[int, int, int]:
    """(h, w, c) of the images of a stage, from 1, in pixels."""
    found = network(config)
    factor = found.factor if found else 1
    height, width = config.stage(number).resolution
    return height * factor, width * factor, config.data.channels


def in_pixels(config: Config) -> Config:
    """The config for the training of its own autoencoder: stages of the size of its images."""
    if not config.data.autoencoder:
        return config
    factor = config.autoencoder.network.factor
    for stage in config.stages:
        size = tuple(side * factor for side in stage.resolution)
        config = config.with_stage(stage.number, resolution=size)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, autoencoder=""))


def decoder(
    codec: PixelCodec | None, spec: LatentSpec | None
) -> Callable[[Float[Array, "b h w c"]], UInt8[Array, "b h2 w2 c2"]]:
    """From what networks make to pixels, on the devices; both None for pixels."""
    if codec is None or spec is None:
        return jax.jit(Pixels().decode)
    return lambda x: codec.decoded(Latents(*spec.statistics).decode(x))


def decoder_on_host(
    codec: PixelCodec, spec: LatentSpec
) -> Callable[[Float[Array, "b h w c"]], UInt8[np.ndarray, "b h2 w2 c2"]]:
    """The same, for any number of images."""
    return lambda x: codec.decode(np.asarray(Latents(*spec.statistics).decode(x)))


def check(config: Config) -> None:
    """Refuses an autoencoder that the run cannot use, and what latents cannot have.

    Raises:
      InputError: names the field, its value and the remedy.
    """
    found = network(config)
    if found is None:
        return
    data, last = config.data, config.stages[-1]
    found.check_images(*image_shape(config, last.number), FIELD)
    require(
        data.directory or data.source.startswith("prepared:"),
        "config.data.directory",
        data.directory,
        "Name a folder, as latents are encoded once and lie there.",
    )
    for stage in config.stages:
        path = f"config.{stage.name}"
        fix = "Use '': all stages see the latents of the same images."
        require(not stage.source, f"{path}.source", stage.source, fix)
        for field, none in OF_PIXELS.items():
            given = getattr(stage.training, field)
            fix = f"Use {none!r}, as it is for pixels, not latents."
            require(given == none, f"{path}.training.{field}", given, fix)
    fix = "Use '': stages of latents do not continue from given images."
    require(not config.sampling.low, "config.sampling.low", config.sampling.low, fix)
