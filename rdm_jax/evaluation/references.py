"""What sets of images are compared with: published statistics, or images whose features are
gathered first."""

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
from rdm_jax.runtime.npz import Npz

NATIVE = "@native"  # ends the name of a stage's set that is measured at its own size


class Reference(NamedTuple):
    """What some sets are compared with.

    Attributes:
      file: of an evaluation's folder, in which the statistics of the images are kept.
      published: statistics that are there already; None where all are of the images.
      stream: images whose features are needed; None where the published statistics are all.
      about: JSON: what tells it from others.
    """

    file: str
    published: Statistics | None
    stream: ImageStream | None
    about: dict[str, Any]


def open_references(
    config: Config, sets: dict[str, ImageSet], space: FeatureSpace
) -> dict[str, Reference]:
    """The reference of images of the final size under '', and, where the config has one, that of
    each 'stageN@native'.

    Args:
      config: of the run.
      sets: 'training' and 'held_out', where the config needs them.
      space: of the features.

    Raises:
      InputError: one is not there, cannot be used, or is of another size than the images it is for.
    """
    values = config.evaluation
    references = {"": _open(values.reference, config, sets, space, "reference.npz")}
    for number in range(1, len(config.stages)) if values.native_reference else ():
        until_here = dataclasses.replace(
            config, stages=config.stages[:number]
        )  # its last stage says what size images have
        means = {
            name: means_of(images, config.stage(number).resolution[0])
            for name, images in sets.items()
        }
        file = f"reference_stage{number}.npz"
        references[f"stage{number}{NATIVE}"] = _open(
            values.native_reference, until_here, means, space, file
        )
    return references


def _open(
    spec: str, config: Config, sets: dict[str, ImageSet], space: FeatureSpace, file: str
) -> Reference:
    kept = {"kept": config.evaluation.kept}
    if not spec.startswith("npz:"):
        stream = open_stream(spec, config, sets)
        return Reference(file, None, stream, stream.about | kept)
    path = Path(spec.removeprefix("npz:")).expanduser()
    published = read_statistics(path, space)
    with Npz(path) as npz:
        has_images = "arr_0" in npz.arrays  # as in ADM's: what precision and recall compare with
    stream = open_stream(spec, config, sets) if has_images and published.features is None else None
    return Reference(file, published, stream, published.about | (kept if stream else {}))


def means_of(images: ImageSet, height: int) -> ImageSet:
    """What a stage of this height is trained on: the means of a set's images, rounded to bytes."""
    full_height, width, channels = images.image_shape
    pool = full_height // height
    return ImageSet(_Means(images, pool), (height, width // pool, channels), images.class_names)


class _Means(Sequence):
    """Mean images and class numbers by index, as `ImageSet` takes them."""

    def __init__(self, images: ImageSet, pool: int):
        self._images, self._pool = images, pool

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[UInt8[np.ndarray, "h w c"], int]:
        image, label = self._images[index].values()
        h, w, c = image.shape
        cells = image.reshape(h // self._pool, self._pool, w // self._pool, self._pool, c)
        return np.rint(cells.mean((1, 3))).astype(np.uint8), int(label)

    def identity(self) -> str:
        """Tells the images from all others."""
        return f"means of {self._pool} x {self._pool} pixels of {self._images.fingerprint}"
