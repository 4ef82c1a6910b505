"""Files of records: each is complete or absent, and a later run keeps what an earlier one wrote."""

import dataclasses
import importlib.metadata
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import rdm_jax
from rdm_jax.runtime.files import atomic_write, parse_json, sha256
from rdm_jax.runtime.lazy import lazy_import

array_record = lazy_import("array_record.python.array_record_data_source", "data")
tfds = lazy_import("tensorflow_datasets", "data")


def versions() -> dict[str, str]:
    """The versions of everything that decides the bytes of a record."""
    libraries = ("array_record", "pillow", "tensorflow-datasets")
    return {"rdm_jax": rdm_jax.__version__} | {
        name: importlib.metadata.version(name) for name in libraries
    }


@dataclasses.dataclass(frozen=True)
class Shard(ABC):
    """One file of records, to be written; can be pickled.

    Attributes:
      path: of the file; a JSON file beside it (the voucher) describes its content.
    """

    path: Path

    @abstractmethod
    def __len__(self) -> int:
        """Number of images that it is made from."""

    @property
    def memory_per_image(self) -> int:
        """Bytes of memory per image of the whole set, of a process that writes a shard."""
        return 0

    @abstractmethod
    def made_from(self) -> str:
        """A hash of everything that decides the file's bytes."""

    @abstractmethod
    def empty(self) -> dict[str, Any]:
        """The statistics of a file without records, among them 'records': 0; for JSON."""

    @abstractmethod
    def examples(self, seen: dict[str, Any]) -> Iterator[tuple[int, bytes]]:
        """Yields serialized records by index, and adds their statistics to `seen`."""

    def accepts(self, found: dict[str, Any]) -> bool:
        """Whether a file with these statistics, made from the same images, can be kept."""
        return True

    def write(self) -> dict[str, Any]:
        """Writes the file, unless it exists and was written from the same images.

        Returns:
          'bytes' and 'sha256' of the file, and its statistics.

        Raises:
          InputError: an image cannot be read; no file is left.
          OSError: the file cannot be written.
        """
        voucher = self.path.with_suffix(".json")
        made_from = self.made_from()
        found = _read_voucher(voucher, {"sha256", "made_from", *self.empty()})
        usable = found and found.pop("made_from") == made_from and self.accepts(found)
        if usable and found["sha256"] == sha256(self.path):
            return found
        seen = self.empty()
        with atomic_write(self.path) as partial:
            _write_records(partial, self.examples(seen))
            if len(array_record.ArrayRecordDataSource([str(partial)])) != seen["records"]:
                raise OSError(f"{partial} lost records while it was written")
            about = {"bytes": partial.stat().st_size, "sha256": sha256(partial), **seen}
        with atomic_write(voucher) as partial:
            partial.write_text(json.dumps({**about, "made_from": made_from}))
        return about


def _write_records(path: Path, examples: Iterable[tuple[int, bytes]]) -> None:
    try:
        tfds.core.ExampleWriter(file_format=tfds.core.FileFormat.ARRAY_RECORD).write(path, examples)
    except RuntimeError as error:  # array_record's error for a full disk, among others
        raise OSError(f"{path}: {error}") from error
    with path.open("rb") as file:
        os.fsync(file.fileno())  # or a power failure could leave a named file without its content


def _read_voucher(voucher: Path, fields: set[str]) -> dict[str, Any] | None:
    """What a voucher says of its file; None if it is missing, damaged or incomplete."""
    try:
        found = parse_json(voucher.read_text())
        is_complete = fields <= found.keys()
    except (OSError, ValueError, AttributeError):
        return None
    return found if is_complete else None
