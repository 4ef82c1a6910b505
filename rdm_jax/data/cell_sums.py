"""Sums of the cells of prepared images: records that hold what a stage before the last one sees.

Such a stage sees the means of p x p cells of the images. Sums of uint8 are exact, so that they give
the same means, to the bit, for a p^2-th of the values and without an image codec. They lie beside
the images, in the same order, one file for each of theirs.

A record is the class index (int32, -1 for none), then the sums (h / p, w / p, c) as `dtype_of(p)`,
all little-endian.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from rdm_jax.data.manifest import MANIFEST, check_sizes, read_addition
from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.lazy import lazy_import

array_record = lazy_import("array_record.python.array_record_data_source", "data")

VERSION = 1
FIELDS = {"cell": int, "shape": list, "of": str, "shards": list}
LABEL = np.dtype("<i4")
CHUNK = 256  # images whose sums are taken at a time


def dtype_of(cell: int) -> np.dtype:
    """The smallest unsigned dtype that holds the sum of cell x cell pixels: uint16 for 2 to 16."""
    return np.min_scalar_type(255 * cell**2)


def sums_of(images: UInt8[np.ndarray, "n h w c"], cell: int) -> np.ndarray:
    """The exact sums (n, h / cell, w / cell, c) of cell x cell pixels, as `dtype_of(cell)`."""
    n, h, w, c = images.shape
    sums = np.empty((n, h // cell, w // cell, c), dtype_of(cell))
    for first in range(0, n, CHUNK):
        part = images[first : first + CHUNK]
        rows = part[:, ::cell].astype(sums.dtype)
        for i in range(1, cell):
            rows += part[:, i::cell]
        sums[first : first + CHUNK] = rows[:, :, ::cell]
        for j in range(1, cell):
            sums[first : first + CHUNK] += rows[:, :, j::cell]
    return sums


def encoded(sums: np.ndarray, label: int) -> bytes:
    """The record of one image."""
    return np.array(label, LABEL).tobytes() + sums.astype(sums.dtype.newbyteorder("<")).tobytes()


def folder_of(directory: Path, cell: int) -> Path:
    """Where the sums of a prepared set are."""
    return directory / f"sums_{cell}x{cell}"


def cells_in(directory: Path) -> list[int]:
    """The sizes of cells whose sums a prepared set has."""
    found = (path.parent.name.rpartition("x")[2] for path in directory.glob(f"sums_*x*/{MANIFEST}"))
    return sorted(int(cell) for cell in found if cell.isdecimal())


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of sums: 'cell', 'shape' of an image's sums, 'of' which images, and 'shards'.

    Raises:
      InputError: it is missing or damaged, or a newer version wrote it.
    """
    return read_addition(folder, VERSION, FIELDS, fix_of(folder))


def fix_of(folder: Path) -> str:
    """What to do about damaged sums: they are made of the images beside them."""
    return f"Delete {folder} and run --mode=prepare."


class SumReader(Sequence):
    """Random access to the sums of a prepared set; can be pickled.

    Args:
      folder: that holds them.

    Attributes:
      cell: the side of a cell, in pixels.
      image_shape: (h, w, c) of the sums of an image.
      of: the content of the images (`RecordReader.content`).

    Raises:
      InputError: a file is missing or of another size than its manifest says.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        manifest = read_manifest(folder)
        check_sizes(folder, manifest["shards"], fix_of(folder))
        self.cell, self.of = manifest["cell"], manifest["of"]
        self.image_shape = tuple(manifest["shape"])
        self._dtype = dtype_of(self.cell).newbyteorder("<")
        try:
            self._records = array_record.ArrayRecordDataSource(
                [str(folder / shard["file"]) for shard in manifest["shards"]]
            )
            count = len(self._records)
        except Exception as error:  # array_record raises its own errors for damaged files
            raise InputError(f"{folder} is damaged ({error})", fix_of(folder)) from error
        declared = sum(shard["records"] for shard in manifest["shards"])
        if count != declared:
            raise InputError(f"{folder} holds {count} of {declared} records", fix_of(folder))

    def __getstate__(self) -> Path:
        return self._folder

    def __setstate__(self, folder: Path):
        self.__init__(folder)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        """The sums of an image (h, w, c), and its class index, -1 for none.

        Raises:
          InputError: the record is damaged.
        """
        try:
            record = self._records[index]
            label = np.frombuffer(record, LABEL, count=1)
            sums = np.frombuffer(record, self._dtype, offset=LABEL.itemsize)
            return sums.reshape(self.image_shape), int(label[0])
        except Exception as error:  # array_record and numpy each raise their own errors
            raise InputError(
                f"record {index} of {self._folder} is damaged ({error})", fix_of(self._folder)
            ) from error

    def identity(self) -> str:
        """Changes when a record does: the manifest, which has a hash of every file."""
        return (self._folder / MANIFEST).read_text()
