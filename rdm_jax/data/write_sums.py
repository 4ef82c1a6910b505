"""Adds the sums of cells (`cell_sums`) to a prepared set, from its own records."""

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from rdm_jax.data.cell_sums import (
    VERSION,
    cells_in,
    dtype_of,
    encoded,
    folder_of,
    read_manifest,
    sums_of,
)
from rdm_jax.data.manifest import MANIFEST
from rdm_jax.data.records import RecordReader
from rdm_jax.data.shards import Shard, versions
from rdm_jax.data.staging import PARTS, staging_folder
from rdm_jax.data.write_shards import write_shards
from rdm_jax.runtime.console import log
from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.files import atomic_write, link_or_copy


@dataclasses.dataclass(frozen=True)
class SumShard(Shard):
    """The sums of one file of images.

    Attributes:
      directory: of the images.
      index: of their file, from 0.
      images: their number in it.
      identity: of the images (`RecordReader.identity`).
      cell: the side of a cell, in pixels.
    """

    directory: Path
    index: int
    images: int
    identity: str
    cell: int

    def __len__(self) -> int:
        return self.images

    def made_from(self) -> str:  # noqa: D102
        everything = [versions(), VERSION, self.identity, self.index, self.cell]
        return hashlib.sha256(json.dumps(everything).encode()).hexdigest()

    def empty(self) -> dict[str, Any]:  # noqa: D102
        return {"records": 0}

    def examples(self, seen: dict[str, Any]) -> Iterator[tuple[int, bytes]]:
        """Yields serialized records by index. Raises InputError if a record is damaged."""
        reader = RecordReader(self.directory, self.index)
        for index in range(self.images):
            pixels, label = reader[index]
            seen["records"] += 1
            yield index, encoded(sums_of(pixels[None], self.cell)[0], label)


def add_sums(directory: Path, cells: Iterable[int], check_stop: Callable[[], None]) -> None:
    """Writes the sums that a prepared set lacks, each published by one rename.

    A run that is interrupted is resumed by the next one, with the same result, bit for bit.

    Args:
      directory: of the prepared set.
      cells: sides of cells, in pixels; they divide the size of the images.
      check_stop: called after every shard; an exception ends the work.

    Raises:
      InputError: another process prepares the set, or a record is damaged.
      OSError: a file cannot be written.
    """
    if missing(directory, cells):
        with staging_folder(directory) as staging:
            write_sums(directory, missing(directory, cells), staging, check_stop)


def missing(directory: Path, cells: Iterable[int]) -> list[int]:
    """The cells whose sums a prepared set lacks, or that are of other images."""
    content = RecordReader(directory).content() if cells_in(directory) else ""
    return [cell for cell in sorted(set(cells)) if not _is_written(directory, cell, content)]


def _is_written(directory: Path, cell: int, content: str) -> bool:
    try:
        return read_manifest(folder_of(directory, cell))["of"] == content
    except InputError:
        return False


def write_sums(
    directory: Path, cells: Iterable[int], staging: Path, check_stop: Callable[[], None]
) -> None:
    """Writes sums into a set, within its staging folder. Raises as `add_sums`."""
    for cell in cells:
        parts, made = staging / f"{PARTS}_{cell}x{cell}", staging / f"sums_{cell}x{cell}"
        _publish(_assembled(directory, cell, parts, made, check_stop), folder_of(directory, cell))
        shutil.rmtree(parts)
        log.info("data: %s has the sums of %d x %d pixels", directory.name, cell, cell)


def _assembled(
    directory: Path, cell: int, parts: Path, made: Path, check_stop: Callable[[], None]
) -> Path:
    """Makes a folder of sums with its manifest; returns `made`."""
    reader = RecordReader(directory)
    lengths, (h, w, c) = reader.shard_lengths, reader.image_shape
    identity, content = reader.identity(), reader.content()
    names = [f"sums-{i:05d}-of-{len(lengths):05d}" for i in range(len(lengths))]
    parts.mkdir(exist_ok=True)
    shards = [
        SumShard(parts / f"{name}.array_record", directory, index, count, identity, cell)
        for index, (name, count) in enumerate(zip(names, lengths, strict=True))
    ]
    written = write_shards(shards, f"sums of {cell} x {cell} pixels", check_stop)
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir()
    for shard in shards:
        link_or_copy(shard.path, made / shard.path.name)
    manifest = {
        "version": VERSION,
        "cell": cell,
        "shape": [h // cell, w // cell, c],
        "dtype": dtype_of(cell).name,
        "of": content,
        "made_by": versions(),
        "shards": [
            {"file": shard.path.name, **{key: about[key] for key in ("records", "bytes", "sha256")}}
            for shard, about in zip(shards, written, strict=True)
        ],
    }
    with atomic_write(made / MANIFEST) as partial:
        partial.write_text(json.dumps(manifest, indent=1))
    return made


def _publish(made: Path, folder: Path) -> None:
    """Renames a finished folder to its place; what cannot be used there is removed."""
    if folder.exists():
        shutil.rmtree(folder)
    os.rename(made, folder)
