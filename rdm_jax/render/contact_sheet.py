"""What the stages are trained on: images of each resolution, blurred versions, statistics."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from rdm_jax.config import Config, Stage
from rdm_jax.data.image_sets import ImageSet
from rdm_jax.diffusion.latents import Latents
from rdm_jax.diffusion.pixels import Pixels
from rdm_jax.render import pictures
from rdm_jax.runtime.console import log

Decoder = Callable[[jax.Array], jax.Array | np.ndarray]
COLUMNS = 8
DETAIL = 64  # pixels of a larger image that are drawn as large as the image, to show its blur
TIMES = (0.25, 0.5, 0.75, 1.0)
# Evenly chosen images: enough for mean and std of pixels to about a percent, decoded in seconds.
MEASURED, AT_A_TIME = 2048, 64


def draw(
    config: Config,
    sets: Mapping[int, ImageSet],
    path: Path,
    *,
    again: bool = True,
    decode: Decoder | None = None,
) -> None:
    """Logs the statistics of every stage's images and draws the contact sheet.

    Args:
      config: of the run.
      sets: the training set of each stage, by its number.
      path: of the PNG.
      again: whether to draw over an existing PNG.
      decode: from normalised latents to pixels, for sets with latents.
    """
    if path.exists() and not again:
        return
    for number, images in sets.items():
        _log_statistics(number, config.stage(number), images)
    rows = [
        row
        for number, images in sets.items()
        for row in _rows(number, config.stage(number), images, decode)
    ]
    shown = sets[len(config.stages)]
    pictures.save_picture(pictures.labelled_rows(rows, _named(shown)), path)
    log.info("data: the stages' images and their blurred versions -> %s", path)


def statistics(
    stage: Stage, images: ImageSet
) -> tuple[int, Float[np.ndarray, " c"], Float[np.ndarray, " c"]]:
    """The number of measured images, and mean and standard deviation (c,) of their channels.

    Pixels are as the stage sees them, in [-1, 1], or normalised latents.
    """
    indices, sums = _evenly(images, MEASURED), 0.0
    for first in range(0, len(indices), AT_A_TIME):
        some = indices[first : first + AT_A_TIME]
        seen = _seen(stage, images, some)
        sums += len(some) * np.asarray(
            jnp.stack([seen.mean((0, 1, 2)), (seen**2).mean((0, 1, 2))]), np.float64
        )
    mean, square = sums / len(indices)
    return len(indices), mean, np.sqrt(np.maximum(square - mean**2, 0))


def _log_statistics(number: int, stage: Stage, images: ImageSet) -> None:
    count, mean, std = statistics(stage, images)
    means, stds = (" ".join(f"{value:.3f}" for value in values) for values in (mean, std))
    assumed = stage.precondition.data_std or 0.5
    log.info(
        "data: stage%d: %s images, per channel: mean %s, std %s (assumed std: %g)",
        number,
        f"{count:,}",
        means,
        stds,
        assumed,
    )


def _evenly(images: ImageSet, most: int) -> np.ndarray:
    return np.unique(np.linspace(0, len(images) - 1, min(most, len(images))).astype(int))


def _seen(stage: Stage, images: ImageSet, indices: np.ndarray) -> jax.Array:
    """Images as the stage sees them: pooled to its resolution, in [-1, 1] or latents."""
    representation: Pixels | Latents = stage.representation
    if images.latents is not None:
        images = images.latents
        representation = Latents(*images.latent_spec.statistics)
    pool = images.image_shape[0] // stage.resolution[0]
    return representation.encode(jnp.asarray(images.batch(indices)["image"]), pool)


def _named(images: ImageSet) -> list[str]:
    """The caption of each image that is shown, or else its class."""
    indices, names = _evenly(images, COLUMNS), images.class_names
    captions = images.caption(indices)
    if captions is not None:
        return captions
    return [names[label] if names else "" for label in images.batch(indices)["label"]]


def _rows(
    number: int, stage: Stage, images: ImageSet, decode: Decoder | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    decode = decode or stage.representation.decode
    seen = _seen(stage, images, _evenly(images, COLUMNS))
    height, width = stage.resolution
    yield f"stage{number}: {height} x {width}", np.asarray(decode(seen))
    if stage.process.blurs:
        detail = _detail(seen, stage.process.enlarges)
        for t in (0.0, *TIMES) if detail.shape != seen.shape else TIMES:
            blurred = stage.process.blurred(detail, jnp.full(len(seen), t, jnp.float32))
            shown = np.asarray(decode(blurred))
            yield f"blurred, t = {t:g}" if t else "a detail", shown


def _detail(images: jax.Array, patch: int) -> jax.Array:
    """The centre of images: whole patches, with about the images' aspect ratio."""
    _, h, w, _ = images.shape
    scale = min(1.0, DETAIL / max(h, w))
    rows, columns = (max(1, round(side * scale / patch)) * patch for side in (h, w))
    top, left = ((side - part) // (2 * patch) * patch for side, part in ((h, rows), (w, columns)))
    return images[:, top : top + rows, left : left + columns]
