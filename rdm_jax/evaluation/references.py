"""What sets of images are compared with: published statistics, or other images."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from rdm_jax.config import Config
from rdm_jax.data.image_sets import ImageSet
from rdm_jax.evaluation.features import FeatureSpace
from rdm_jax.evaluation.image_streams import ImageStream, open_stream
from rdm_jax.evaluation.statistics import Statistics
from rdm_jax.evaluation.statistics_files import read_statistics
from rdm_jax.interop import latent_space
from rdm_jax.runtime.npz import Npz

NATIVE = "@native"  # suffix of a stage's set that is measured at its own resolution


class Reference(NamedTuple):
    """What some sets are compared with.

    Attributes:
      file: name of the file in the evaluation's folder that keeps the images' statistics.
      published: published statistics; None if all are measured on images.
      stream: images to measure; None if the published statistics suffice.
      about: what identifies the reference, as JSON.
    """

    file: str
    published: Statistics | None
    stream: ImageStream | None
    about: dict[str, Any]


def open_references(
    config: Config, sets: dict[str, ImageSet], space: FeatureSpace | None
) -> dict[str, Reference]:
    """Opens the references: '' for images of the final size, and those of each 'stageN@native'.

    Args:
      config: of the run; `evaluation.native_reference` may be empty.
      sets: 'training' and 'held_out', if the config needs them.
      space: of the features; needed for files (`of_files`).

    Raises:
      InputError: a reference is missing, cannot be used, or is of another size than the images.
    """
    values = config.evaluation
    references = {"": _open(values.reference, config, sets, space, "reference.npz")}
    if not values.native_reference:
        return references
    for number in range(1, len(config.stages)):
        height = latent_space.image_shape(config, number)[0]
        # Images must have the size of the config's last stage.
        until_here = dataclasses.replace(config, stages=config.stages[:number])
        means = {name: means_of(images, height) for name, images in sets.items()}
        references[f"stage{number}{NATIVE}"] = _open(
            values.native_reference, until_here, means, space, f"reference_stage{number}.npz"
        )
    return references


def of_files(config: Config) -> bool:
    """Whether a reference is a file, whose features must be those of the evaluation."""
    values = config.evaluation
    return any(spec.startswith("npz:") for spec in (values.reference, values.native_reference))


def _open(
    spec: str, config: Config, sets: dict[str, ImageSet], space: FeatureSpace | None, file: str
) -> Reference:
    kept = {"kept": config.evaluation.kept}
    if not spec.startswith("npz:"):
        stream = open_stream(spec, config, sets)
        return Reference(file, None, stream, stream.about | kept)
    path = Path(spec.removeprefix("npz:")).expanduser()
    assert space is not None
    published = read_statistics(path, space)
    with Npz(path) as npz:
        has_images = "arr_0" in npz.arrays  # ADM's files have images for precision and recall
    stream = open_stream(spec, config, sets) if has_images and published.features is None else None
    return Reference(file, published, stream, published.about | (kept if stream else {}))


def means_of(images: ImageSet, height: int) -> ImageSet:
    """What a stage of this height is trained on: the pooled images, rounded to uint8."""
    full_height, width, channels = images.image_shape
    pool = full_height // height
    return ImageSet(_Means(images, pool), (height, width // pool, channels), images.class_names)


class _Means(Sequence):
    """Pooled images and class indices, as `ImageSet` takes them."""

    def __init__(self, images: ImageSet, pool: int):
        self._images, self._pool = images, pool

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[UInt8[np.ndarray, "h w c"], int]:
        item = self._images[index]
        image, label = item["image"], item["label"]
        h, w, c = image.shape
        cells = image.reshape(h // self._pool, self._pool, w // self._pool, self._pool, c)
        return np.rint(cells.mean((1, 3))).astype(np.uint8), int(label)

    def identity(self) -> str:
        """Identifies the images."""
        return f"means of {self._pool} x {self._pool} pixels of {self._images.fingerprint}"
