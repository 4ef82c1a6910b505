"""Images to be measured, a batch at a time: generated ones, sets, and files."""

import concurrent.futures
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from rdm_jax.config import Config
from rdm_jax.config.schema import LEAST
from rdm_jax.data.classes import Classes, matched
from rdm_jax.data.image_sets import DecodedSource, ImageSet, open_prepared
from rdm_jax.data.images import ImageSpec
from rdm_jax.data.sources import Source, cores, open_source
from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.npz import Npz

SHOWN = 50  # images of a picture
CLASS_NAMES = "class_names"  # in an .npz: what its labels are numbers of
NO_CLASSES = Classes()
Batch = tuple[dict[str, np.ndarray], np.ndarray]


class ImageStream(ABC):
    """Sets of images that come together: image i of each belongs to image i of the others.

    Attributes:
      names: of the sets.
      count: images in each.
      batch_size: how many at a time.
      about: JSON: what they are; two streams with the same one are the same images.
      notes: what is to be known of their figures.
    """

    names: tuple[str, ...]
    count: int
    batch_size: int
    about: dict[str, Any]
    notes: tuple[str, ...] = ()

    @abstractmethod
    def batch(self, first: int, count: int) -> Batch:
        """`count` images from number `first` on: uint8 (b, h, w, c) of each set by name, and int32
        (b,) labels (-1: none)."""

    def shown(self) -> Int[np.ndarray, " n"]:
        """Numbers of the images for a picture."""
        return np.arange(min(SHOWN, self.count))


class SetStream(ImageStream):
    """A set of images, in a random order that is always the same; labels are numbers of
    `classes`."""

    def __init__(self, name: str, images: ImageSet, batch_size: int, classes: Classes):
        self.names, self.count, self.batch_size = (name,), len(images), batch_size
        self.about = {"set": name, "images": len(images), "fingerprint": images.fingerprint}
        self._images, self._labels = (
            images,
            labels_by_name(name, Classes(images.class_names), classes),
        )
        # A score is of images in their order, and a set is often sorted by class.
        self._order = np.random.default_rng(0).permutation(len(images))

    def batch(self, first: int, count: int) -> Batch:  # noqa: D102
        parts = np.array_split(self._order[first : first + count], cores())
        with concurrent.futures.ThreadPoolExecutor(
            len(parts)
        ) as pool:  # images that are not in memory are decoded
            batches = list(pool.map(self._images.batch, parts))
        images, labels = (
            np.concatenate([batch[key] for batch in batches]) for key in ("image", "label")
        )
        return {self.names[0]: images}, self._labels[labels]


class NpzStream(ImageStream):
    """Images in a .npz file: `arr_0` (ADM's name), or `images`, `labels` and the names of these
    classes in `class_names` (ours).

    Args:
      name: of the set.
      path: of the file, which is never in memory as a whole.
      image_shape: that the images must have.
      classes: by whose numbers labels count; labels without the names of their classes do not.

    Raises:
      InputError: it cannot be read, its images are of another shape or dtype, or its classes are
        others.
    """

    def __init__(
        self, name: str, path: Path, image_shape: tuple[int, ...], classes: Classes, batch_size: int
    ):
        self._file = Npz(path)
        self._name = next((n for n in ("images", "arr_0") if n in self._file.arrays), "")
        if not self._name:
            found = ", ".join(self._file.arrays) or "nothing"
            raise InputError(
                f"{path} has no images, only {found}; an array arr_0 or images would do."
            )
        shape, dtype = self._file.arrays[self._name]
        if dtype != np.uint8 or shape[1:] != image_shape:
            wanted = f"uint8 of shape {('n', *image_shape)}, as config.stages and config.data.channels say,"
            raise InputError(f"{path} has images of shape {shape}, {dtype}; {wanted} would do.")
        self.names, self.count, self.batch_size = (name,), shape[0], batch_size
        self._labels = self._read_labels(
            {"images": "labels", "arr_0": "arr_1"}[self._name], classes
        )
        self.about = {
            "set": name,
            "images": self.count,
            "sha256 of checksums": self._file.identity(),
        }

    def _read_labels(self, name: str, classes: Classes) -> np.ndarray:
        if name not in self._file.arrays or not len(classes):
            return np.full(self.count, -1, np.int32)
        if CLASS_NAMES not in self._file.arrays:
            self.notes = (
                f"accuracy: the labels are numbers, and no array {CLASS_NAMES} says of which classes; they do not count",
            )
            return np.full(self.count, -1, np.int32)
        theirs = Classes(tuple(map(str, self._file.read(CLASS_NAMES).ravel())))
        numbers = labels_by_name(self.names[0], theirs, classes)
        shape, dtype = self._file.arrays[name]
        labels = (
            self._file.read(name)
            if shape == (self.count,) and dtype.kind in "iu"
            else np.array([len(theirs)])
        )
        if labels.min() < -1 or labels.max() >= len(theirs):
            wanted = f"{self.count} whole numbers from 0 to {len(theirs) - 1} (-1: none)"
            raise InputError(
                f"{self._file.path} has {name} that are no classes of its {CLASS_NAMES}; {wanted} would do."
            )
        return numbers[labels]

    def batch(self, first: int, count: int) -> Batch:  # noqa: D102
        return {self.names[0]: self._file.rows(self._name, first, count)}, self._labels[
            first : first + count
        ]


def labels_by_name(name: str, theirs: Classes, classes: Classes) -> Int[np.ndarray, " n"]:
    """For each class of a set its number among `classes`; last -1, for images without a class. All
    are -1 where there are none.

    Args:
      name: of the set, for the message.

    Raises:
      InputError: the set has other classes.
    """
    numbers = matched(theirs, classes) if len(classes) else [-1] * len(theirs)
    if numbers is None:
        would_do = (
            "the same names, or a set without classes, or other --config.evaluation.features,"
        )
        message = f"config.evaluation: {name} has the classes {theirs}, and the accuracy is that of {classes}; {would_do} would do."
        raise InputError(message)
    return np.asarray([*numbers, -1], np.int32)


class _OfOneSize(DecodedSource):
    """Images that have the size already."""

    def __init__(self, spec: str, source: Source, form: ImageSpec):
        super().__init__(source, form)
        self._spec = spec

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        pixels = self._source.decode(index, self._form.channels, self._form.background)
        (rows, columns, _), wanted = (
            pixels.shape,
            f"{self._form.height} x {self._form.width}, as config.stages say,",
        )
        if (rows, columns) != (self._form.height, self._form.width):
            name = self._source.names[index]
            found = f"image {name!r} of {self._spec} is of {rows} x {columns} (height x width)"
            raise InputError(f"config.evaluation: {found}; {wanted} would do.")
        return pixels, self._source.label(index)


def open_stream(
    spec: str, config: Config, sets: dict[str, ImageSet], classes: Classes = NO_CLASSES
) -> ImageStream:
    """Images that are there already.

    Args:
      spec: 'training' or 'held_out' (of `sets`), 'prepared:PATH', 'folder:PATH', 'zip:PATH',
        'tar:PATH', or 'npz:PATH'.
      config: of the run; its last stage says what size the images must have.
      classes: by whose numbers labels count; none where they do not.

    Raises:
      InputError: they are not there, cannot be read, too few, or of another size, number of
        channels or classes.
    """
    stream = _open(spec, config, sets, classes)
    if stream.count < LEAST:
        raise InputError(
            f"config.evaluation: {spec} has {stream.count} images; {LEAST} or more would do."
        )
    return stream


def _open(spec: str, config: Config, sets: dict[str, ImageSet], classes: Classes) -> ImageStream:
    batch_size, (height, width), channels = (
        config.evaluation.batch_size,
        config.stages[-1].resolution,
        config.data.channels,
    )
    if spec in sets:
        return SetStream(spec, sets[spec], batch_size, classes)
    kind, _, where = spec.partition(":")
    path = Path(where).expanduser()
    if kind == "npz":
        return NpzStream(spec, path, (height, width, channels), classes, batch_size)
    if kind == "prepared":
        images = open_prepared(path)
        if images.image_shape != (height, width, channels):
            wanted = (
                f"{height} x {width} x {channels}, as config.stages and config.data.channels say,"
            )
            raise InputError(
                f"config.evaluation: the images of {spec} are {images.image_shape}; {wanted} would do."
            )
        return SetStream(spec, images, batch_size, classes)
    source = open_source(spec).among(classes.names)
    if channels == 3 and all(
        source.reader.load(name).mode in ("1", "L", "LA") for name in source.names[:SHOWN]
    ):
        raise InputError(
            f"config.evaluation: the images of {spec} are grey; colour, or config.data.channels=1, would do."
        )
    form = ImageSpec(height, width, channels, config.data.background, "none")
    images = ImageSet(_OfOneSize(spec, source, form), (height, width, channels), source.class_names)
    images.batch([0])  # of another size, most often all are
    return SetStream(spec, images, batch_size, classes)
