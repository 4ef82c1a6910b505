"""Streams of images to measure, a batch at a time: sets of images and .npz files."""

import concurrent.futures
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from rdm_jax.config import Config
from rdm_jax.config.schema import LEAST
from rdm_jax.data.classes import Classes, matched
from rdm_jax.data.image_sets import ImageSet, open_prepared
from rdm_jax.data.images import ImageSpec
from rdm_jax.data.source import DecodedSource, Source
from rdm_jax.data.sources import cores, open_source
from rdm_jax.interop import latent_space
from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.npz import Npz

SHOWN = 50  # images in a picture of a set
CLASS_NAMES = "class_names"  # the array of an .npz with the names of its labels' classes
PROMPTS = "prompts"  # the array of an .npz with what its images were made from
NO_CLASSES = Classes()
Batch = tuple[dict[str, np.ndarray], np.ndarray]


class ImageStream(ABC):
    """Sets of images that are made together: image i of one set belongs to image i of the others.

    Attributes:
      names: of the sets.
      count: images per set.
      batch_size: images per batch.
      about: what the images are, as JSON; streams with equal `about` have equal images.
      notes: remarks on the metrics of the sets.
    """

    names: tuple[str, ...]
    count: int
    batch_size: int
    about: dict[str, Any]
    notes: tuple[str, ...] = ()

    def begin(self) -> None:  # noqa: B027
        """To be called before the first batch, by all processes together."""

    @abstractmethod
    def batch(self, first: int, count: int) -> Batch:
        """The images `first` to `first + count - 1`.

        Returns:
          uint8 (b, h, w, c) of each set by name, and int32 (b,) labels (-1 for none).
        """

    def captions(self, indices: Int[np.ndarray, " n"]) -> list[str] | None:
        """The captions of images, '' for none; None if the images have no captions."""
        return None

    def texts_below(self, indices: Int[np.ndarray, " n"]) -> list[str] | None:
        """What is drawn below images in a picture of a set; None for nothing."""
        return self.captions(indices)

    def shown(self) -> Int[np.ndarray, " n"]:
        """Indices of the images in the picture of a set."""
        return np.arange(min(SHOWN, self.count))


class SetStream(ImageStream):
    """A set of images, in a fixed random order.

    Args:
      name: of the set.
      images: the set.
      batch_size: images per batch.
      classes: whose indices the labels are.
    """

    def __init__(self, name: str, images: ImageSet, batch_size: int, classes: Classes):
        self.names, self.count, self.batch_size = (name,), len(images), batch_size
        self.about = {"set": name, "images": len(images), "fingerprint": images.fingerprint}
        self._images = images
        self._labels = labels_by_name(name, Classes(images.class_names), classes)
        # The inception score depends on the order, and sets are often sorted by class.
        self._order = np.random.default_rng(0).permutation(len(images))

    def batch(self, first: int, count: int) -> Batch:  # noqa: D102
        parts = np.array_split(self._order[first : first + count], cores())
        # Threads, as images that are not in memory have to be decoded.
        with concurrent.futures.ThreadPoolExecutor(len(parts)) as pool:
            batches = list(pool.map(self._images.batch, parts))
        images = np.concatenate([batch["image"] for batch in batches])
        labels = np.concatenate([batch["label"] for batch in batches])
        return {self.names[0]: images}, self._labels[labels]

    def captions(self, indices: Int[np.ndarray, " n"]) -> list[str] | None:  # noqa: D102
        return self._images.caption(self._order[indices])


class NpzStream(ImageStream):
    """Images in an .npz file.

    They are in `arr_0` (ADM's format), or in `images` with `labels`, the names of their classes in
    `class_names` and their `prompts` (this project's).

    Args:
      name: of the set.
      path: of the file, which is never in memory as a whole.
      image_shape: that the images must have.
      classes: whose indices the labels are; without `class_names` labels are ignored.
      batch_size: images per batch.

    Raises:
      InputError: the file cannot be read, or its images have another shape, dtype or classes.
    """

    def __init__(
        self, name: str, path: Path, image_shape: tuple[int, ...], classes: Classes, batch_size: int
    ):
        self._file = Npz(path)
        self._name = next((n for n in ("images", "arr_0") if n in self._file.arrays), "")
        if not self._name:
            found = ", ".join(self._file.arrays) or "nothing"
            raise InputError(
                f"{path} has no images, only {found}", "Use a file with an array arr_0 or images."
            )
        shape, dtype = self._file.arrays[self._name]
        if dtype != np.uint8 or shape[1:] != image_shape:
            raise InputError(
                f"{path} has images of shape {shape}, {dtype}",
                f"Use uint8 of shape {('n', *image_shape)}, as config.stages and "
                "config.data.channels say.",
            )
        self.names, self.count, self.batch_size = (name,), shape[0], batch_size
        labels = {"images": "labels", "arr_0": "arr_1"}[self._name]
        self._labels = self._read_labels(labels, classes)
        self._prompts = self._read_prompts()
        self.about = {
            "set": name,
            "images": self.count,
            "sha256 of checksums": self._file.identity(),
        }

    def _read_prompts(self) -> list[str]:
        """What the images were made from, in this project's files; [] if it is not known."""
        shape, dtype = self._file.arrays.get(PROMPTS, ((), np.dtype(bool)))
        known = self._name == "images" and shape == (self.count,) and dtype.kind == "U"
        return self._file.read(PROMPTS).tolist() if known else []

    def _read_labels(self, name: str, classes: Classes) -> np.ndarray:
        if name not in self._file.arrays or not len(classes):
            return np.full(self.count, -1, np.int32)
        if CLASS_NAMES not in self._file.arrays:
            self.notes = (
                f"accuracy: the labels are ignored, as no array {CLASS_NAMES} names their classes",
            )
            return np.full(self.count, -1, np.int32)
        theirs = Classes(tuple(map(str, self._file.read(CLASS_NAMES).ravel())))
        numbers = labels_by_name(self.names[0], theirs, classes)
        shape, dtype = self._file.arrays[name]
        problem = InputError(
            f"{self._file.path} has {name} that are not indices of its {CLASS_NAMES}",
            f"Use {self.count} integers from 0 to {len(theirs) - 1} (-1 for none).",
        )
        if shape != (self.count,) or dtype.kind not in "iu":
            raise problem
        labels = self._file.read(name)
        if labels.min() < -1 or labels.max() >= len(theirs):
            raise problem
        return numbers[labels]

    def batch(self, first: int, count: int) -> Batch:  # noqa: D102
        images = self._file.rows(self._name, first, count)
        return {self.names[0]: images}, self._labels[first : first + count]

    def captions(self, indices: Int[np.ndarray, " n"]) -> list[str] | None:  # noqa: D102
        return [self._prompts[i] for i in indices.tolist()] if self._prompts else None


def labels_by_name(name: str, theirs: Classes, classes: Classes) -> Int[np.ndarray, " n"]:
    """The index among `classes` of each class of a set, and last -1, for images without a class.

    Args:
      name: of the set, for the message.
      theirs: the classes of the set.
      classes: of the features; if there are none, all indices are -1.

    Returns:
      int32 (len(theirs) + 1,).

    Raises:
      InputError: the set has other classes.
    """
    numbers = matched(theirs, classes) if len(classes) else [-1] * len(theirs)
    if numbers is None:
        raise InputError(
            f"config.evaluation: {name} has the classes {theirs}, and the accuracy is that of "
            f"{classes}",
            "Use the same names, a set without classes, or other --config.evaluation.features.",
        )
    return np.asarray([*numbers, -1], np.int32)


class _OfOneSize(DecodedSource):
    """Images that must have the size of the spec already."""

    def __init__(self, name: str, source: Source, spec: ImageSpec):
        super().__init__(source, spec)
        self._name, self._spec = name, spec

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        spec = self._spec
        pixels = self._source.decode(index, spec.channels, spec.background)
        rows, columns, _ = pixels.shape
        if (rows, columns) != (spec.height, spec.width):
            raise InputError(
                f"config.evaluation: image {self._source.names[index]!r} of {self._name} is "
                f"{rows} x {columns} (height x width)",
                f"Use images of {spec.height} x {spec.width}, as config.stages say.",
            )
        return pixels, self._source.label(index)


def open_stream(
    name: str, config: Config, sets: dict[str, ImageSet], classes: Classes = NO_CLASSES
) -> ImageStream:
    """Opens images that exist already.

    Args:
      name: 'training' or 'held_out' (of `sets`), 'prepared:PATH', 'folder:PATH', 'zip:PATH',
        'tar:PATH', or 'npz:PATH'.
      config: of the run; images must have the size of its last stage.
      sets: the config's own images by name.
      classes: whose indices the labels are; without any, labels are ignored.

    Raises:
      InputError: the images are missing, cannot be read, are too few, or have another size, number
        of channels or other classes.
    """
    stream = _open(name, config, sets, classes)
    if stream.count < LEAST:
        raise InputError(
            f"config.evaluation: {name} has {stream.count} images", f"Use {LEAST} or more."
        )
    return stream


def _open(name: str, config: Config, sets: dict[str, ImageSet], classes: Classes) -> ImageStream:
    batch_size = config.evaluation.batch_size
    image_shape = latent_space.image_shape(config, len(config.stages))
    if name in sets:
        return SetStream(name, sets[name], batch_size, classes)
    kind, _, location = name.partition(":")
    path = Path(location).expanduser()
    if kind == "npz":
        return NpzStream(name, path, image_shape, classes, batch_size)
    if kind == "prepared":
        images = open_prepared(path)
        if images.image_shape != image_shape:
            raise InputError(
                f"config.evaluation: the images of {name} are {images.image_shape}",
                f"Use {' x '.join(map(str, image_shape))}, as config.stages and "
                "config.data.channels say.",
            )
        return SetStream(name, images, batch_size, classes)
    return SetStream(name, _open_source(name, config, classes), batch_size, classes)


def _open_source(name: str, config: Config, classes: Classes) -> ImageSet:
    """The images of a folder or an archive, decoded when they are read."""
    height, width, channels = latent_space.image_shape(config, len(config.stages))
    source = open_source(name).among(classes.names)
    modes = (source.reader.load(file).mode for file in source.names[:SHOWN])
    if channels == 3 and all(mode in ("1", "L", "LA") for mode in modes):
        raise InputError(
            f"config.evaluation: the images of {name} are grey",
            "Use colour images, or config.data.channels=1.",
        )
    spec = ImageSpec(height, width, channels, config.data.background, "none")
    images = ImageSet(_OfOneSize(name, source, spec), (height, width, channels), source.class_names)
    images.batch([0])  # refuses another size early: mostly all images have it
    return images
