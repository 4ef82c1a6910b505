"""Images to be measured, a batch at a time: generated ones, sets, and files."""

import concurrent.futures
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from rdm_jax.checks import LEAST
from rdm_jax.config import Config
from rdm_jax.data.image_sets import DecodedSource, ImageSet, open_prepared
from rdm_jax.data.images import Form
from rdm_jax.data.sources import cores, open_source
from rdm_jax.errors import InputError
from rdm_jax.evaluation.npz import Npz

SHOWN = 50  # images of a picture
Batch = tuple[dict[str, np.ndarray], np.ndarray]


class Stream(ABC):
    """Sets of images that come together: image i of each belongs to image i of the others.

    Attributes:
      names: of the sets.
      count: images in each.
      batch_size: how many at a time.
      about: JSON: what they are; two streams with the same one are the same images.
    """

    names: tuple[str, ...]
    count: int
    batch_size: int
    about: dict[str, Any]

    @abstractmethod
    def batch(self, first: int, count: int) -> Batch:
        """`count` images from number `first` on: uint8 (b, h, w, c) of each set by name, and int32 (b,) labels (-1: none)."""

    def shown(self) -> Int[np.ndarray, " n"]:
        """Numbers of the images for a picture."""
        return np.arange(min(SHOWN, self.count))


class SetStream(Stream):
    """A set of images, in a random order that is always the same; labels count by the names in `class_names`."""

    def __init__(self, name: str, images: ImageSet, batch_size: int, class_names: tuple[str, ...]):
        self.names, self.count, self.batch_size = (name,), len(images), batch_size
        self.about = {"set": name, "images": len(images), "fingerprint": images.fingerprint}
        self._images, self._labels = images, labels_by_name(images.class_names, class_names)
        # A score is of images in their order, and a set is often sorted by class.
        self._order = np.random.default_rng(0).permutation(len(images))

    def batch(self, first: int, count: int) -> Batch:  # noqa: D102
        parts = np.array_split(self._order[first : first + count], cores())
        with concurrent.futures.ThreadPoolExecutor(len(parts)) as pool:  # images that are not in memory are decoded
            batches = list(pool.map(self._images.batch, parts))
        images, labels = (np.concatenate([batch[key] for batch in batches]) for key in ("image", "label"))
        return {self.names[0]: images}, self._labels[labels]


class NpzStream(Stream):
    """Images in a .npz file: `arr_0`, with labels in `arr_1` (ADM's names), or `images` and `labels` (ours).

    Args:
      name: of the set.
      path: of the file, which is never in memory as a whole.
      image_shape: that the images must have.
      classes: of the data; what labels in the file may be.

    Raises:
      InputError: it cannot be read, or its images are of another shape or dtype.
    """

    def __init__(self, name: str, path: Path, image_shape: tuple[int, ...], classes: int, batch_size: int):
        self._file = Npz(path)
        self._name = next((n for n in ("images", "arr_0") if n in self._file.arrays), "")
        if not self._name:
            found = ", ".join(self._file.arrays) or "nothing"
            raise InputError(f"{path} has no images, only {found}; an array arr_0 or images would do.")
        shape, dtype = self._file.arrays[self._name]
        if dtype != np.uint8 or shape[1:] != image_shape:
            wanted = f"uint8 of shape {('n', *image_shape)}"
            raise InputError(f"{path} has images of shape {shape}, {dtype}; {wanted}, as config.stages say, would do.")
        self.names, self.count, self.batch_size = (name,), shape[0], batch_size
        labels = {"images": "labels", "arr_0": "arr_1"}[self._name]
        self._labels = self._read_labels(labels, classes) if classes else np.full(self.count, -1, np.int32)
        self.about = {"set": name, "images": self.count, "sha256 of checksums": self._file.identity()}

    def _read_labels(self, name: str, classes: int) -> np.ndarray:
        if name not in self._file.arrays:
            return np.full(self.count, -1, np.int32)
        shape, dtype = self._file.arrays[name]
        labels = self._file.read(name) if shape == (self.count,) and dtype.kind in "iu" else np.array([classes])
        if labels.min() < -1 or labels.max() >= classes:
            wanted = f"{self.count} whole numbers from 0 to {classes - 1} (-1: none)"
            raise InputError(f"{self._file.path} has labels in {name} that are no classes of the data; {wanted} would do.")
        return labels.astype(np.int32)

    def batch(self, first: int, count: int) -> Batch:  # noqa: D102
        return {self.names[0]: self._file.rows(self._name, first, count)}, self._labels[first : first + count]


def labels_by_name(names: tuple[str, ...], class_names: tuple[str, ...]) -> Int[np.ndarray, " n"]:
    """For each of a set's own classes its number among `class_names`, -1 if it is none; last -1, for images without a class.

    Imported weights know their classes by number alone, '0' and so on.
    """
    numbers = {name: number for number, name in enumerate(class_names)}
    if names == tuple(map(str, range(len(class_names)))):
        numbers = {name: int(name) for name in names}
    return np.asarray([*(numbers.get(name, -1) for name in names), -1], np.int32)


def open_stream(spec: str, config: Config, sets: dict[str, ImageSet]) -> Stream:
    """Images that are there already.

    Args:
      spec: 'training' or 'held_out' (of `sets`), 'prepared:PATH', 'folder:PATH', 'zip:PATH', or 'npz:PATH'.
      config: of the run; its last stage says what size the images must have.

    Raises:
      InputError: they are not there, cannot be read, too few, or of another size or number of channels.
    """
    stream = _open(spec, config, sets)
    if stream.count < LEAST:
        raise InputError(f"config.evaluation: {spec} has {stream.count} images; {LEAST} or more would do.")
    return stream


def _open(spec: str, config: Config, sets: dict[str, ImageSet]) -> Stream:
    batch_size, (height, width), channels = config.evaluation.batch_size, config.stages[-1].resolution, config.data.channels
    class_names = sets["training"].class_names if sets else ()
    if spec in sets:
        return SetStream(spec, sets[spec], batch_size, class_names)
    kind, _, where = spec.partition(":")
    path = Path(where).expanduser()
    if kind == "npz":
        return NpzStream(spec, path, (height, width, channels), len(class_names), batch_size)
    if kind == "prepared":
        images = open_prepared(path)
        if images.image_shape != (height, width, channels):
            wanted = f"{height} x {width} x {channels}, as config.stages and config.data.channels say,"
            raise InputError(f"config.evaluation: the images of {spec} are {images.image_shape}; {wanted} would do.")
        return SetStream(spec, images, batch_size, class_names)
    source = open_source(spec).among(class_names)
    if channels == 3 and all(source.reader.load(name).mode in ("1", "L", "LA") for name in source.names[:SHOWN]):
        raise InputError(f"config.evaluation: the images of {spec} are grey; colour, or config.data.channels=1, would do.")
    form = Form(height, width, channels, config.data.background, "none")
    images = ImageSet(DecodedSource(source, form), (height, width, channels), source.class_names)
    return SetStream(spec, images, batch_size, class_names)
