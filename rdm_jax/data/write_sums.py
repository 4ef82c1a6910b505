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
      identity: a hash that changes when an image does.
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
    if _missing(directory, cells):
        with staging_folder(directory) as staging:
            for cell in _missing(directory, cells):
                write_sums(directory, cell, staging, check_stop)
                shutil.rmtree(_parts(staging, cell))


def _missing(directory: Path, cells: Iterable[int]) -> list[int]:
    """The cells whose sums a prepared set lacks, or that are of other images."""
    content = RecordReader(directory).content() if cells_in(directory) else ""
    return [cell for cell in sorted(set(cells)) if not _is_written(directory, cell, content)]


def _is_written(directory: Path, cell: int, content: str) -> bool:
    try:
        return read_manifest(folder_of(directory, cell))["of"] == content
    except InputError:
        return False


def write_sums(directory: Path, cell: int, staging: Path, check_stop: Callable[[], None]) -> None:
    """Writes sums into a set; its staging folder keeps the shards. Raises as `add_sums`."""
    made, folder = staging / f"sums_{cell}x{cell}", folder_of(directory, cell)
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir()
    _assemble(directory, cell, _parts(staging, cell), made, check_stop)
    if folder.exists():  # but it cannot be used
        shutil.rmtree(folder)
    os.rename(made, folder)
    log.info("data: %s has the sums of %d x %d pixels", directory.name, cell, cell)


def _parts(staging: Path, cell: int) -> Path:
    return staging / f"{PARTS}_{cell}x{cell}"


def _assemble(
    directory: Path, cell: int, parts: Path, made: Path, check_stop: Callable[[], None]
) -> None:
    """Fills a folder with sums and their manifest."""
    reader = RecordReader(directory)
    lengths, (h, w, c) = reader.shard_lengths, reader.image_shape
    identity = hashlib.sha256(reader.identity().encode()).hexdigest()
    names = [f"sums-{i:05d}-of-{len(lengths):05d}" for i in range(len(lengths))]
    parts.mkdir(exist_ok=True)
    shards = [
        SumShard(parts / f"{name}.array_record", directory, index, count, identity, cell)
        for index, (name, count) in enumerate(zip(names, lengths, strict=True))
    ]
    written = write_shards(shards, f"sums of {cell} x {cell} pixels", check_stop)
    for shard in shards:
        link_or_copy(shard.path, made / shard.path.name)
    manifest = {
        "version": VERSION,
        "cell": cell,
        "shape": [h // cell, w // cell, c],
        "dtype": dtype_of(cell).name,
        "of": reader.content(),
        "made_by": versions(),
        "shards": [
            {"file": shard.path.name, **{key: about[key] for key in ("records", "bytes", "sha256")}}
            for shard, about in zip(shards, written, strict=True)
        ],
    }
    with atomic_write(made / MANIFEST) as partial:
        partial.write_text(json.dumps(manifest, indent=1))
