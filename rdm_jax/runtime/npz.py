"""Reading .npz files of strangers: nothing in them is executed, and only what was asked for is
read."""

import hashlib
import zipfile
from pathlib import Path

import numpy as np

from rdm_jax.runtime.errors import InputError


class Npz:
    """An open .npz file.

    Attributes:
      arrays: shape and dtype of each array, by name.

    Raises:
      InputError: it is no .npz file, damaged, or has objects (which only executing could make) in
        it.
    """

    def __init__(self, path: Path):
        self.path, self.arrays = path, {}
        self._member, self._name, self._at = None, "", 0
        try:
            self._file = zipfile.ZipFile(path)
            for name in self._file.namelist():
                if name.endswith(".npy"):
                    with self._file.open(name) as member:
                        self.arrays[name.removesuffix(".npy")] = self._header(
                            member, self._file.getinfo(name).file_size
                        )
        except (
            Exception
        ) as error:  # zipfile, its decompressors and NumPy's parser of headers each have their own
            raise self._refused(
                getattr(error, "strerror", None) or str(error) or type(error).__name__
            ) from error

    def __enter__(self) -> "Npz":
        return self

    def __exit__(self, *_) -> None:
        self._file.close()

    def read(self, name: str) -> np.ndarray:
        """One array. Raises InputError when it is damaged, or not there."""
        if name not in self.arrays:
            raise self._refused(f"it has no {name}, only {', '.join(self.arrays) or 'nothing'}")
        shape, dtype = self.arrays[name]
        flat = np.frombuffer(self._bytes(name, 0, int(np.prod(shape)) * dtype.itemsize), dtype)
        return flat.reshape(shape)

    def rows(self, name: str, first: int, count: int) -> np.ndarray:
        """A few rows of an array, read without the others; the fastest in order. Raises InputError
        when they are damaged."""
        shape, dtype = self.arrays[name]
        size = int(np.prod(shape[1:])) * dtype.itemsize
        return np.frombuffer(self._bytes(name, first * size, count * size), dtype).reshape(
            count, *shape[1:]
        )

    def identity(self) -> str:
        """A hash of the names, sizes and checksums of all arrays."""
        members = sorted(
            (info.filename, info.file_size, info.CRC) for info in self._file.infolist()
        )
        return hashlib.sha256(repr(members).encode()).hexdigest()

    def _bytes(self, name: str, first: int, count: int) -> bytes:
        """Bytes of an array after its header; the member stays open, so that what is read in order
        is unpacked once."""
        try:
            if self._member is None or self._name != name or self._at > first:
                self._member, self._name, self._at = self._file.open(f"{name}.npy"), name, 0
                self._header(self._member, self._file.getinfo(f"{name}.npy").file_size)
            while self._at < first:
                self._at += len(self._read(min(first - self._at, 2**24)))
            data = self._read(count)
        except Exception as error:
            raise self._refused(f"{name} is damaged: {error}") from error
        self._at += len(data)
        return data

    def _read(self, count: int) -> bytes:
        data = self._member.read(count)
        if len(data) != count:
            raise ValueError("it ends before its last number")
        return data

    def _header(self, member, size: int) -> tuple[tuple[int, ...], np.dtype]:
        version = np.lib.format.read_magic(member)
        reader = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }.get(version)
        if reader is None:
            raise ValueError(f"version {version} of NumPy's format is not known")
        shape, fortran, dtype = reader(member)
        if dtype.hasobject:
            raise ValueError("it holds Python objects, which are never loaded")
        if min(shape, default=0) < 0:
            raise ValueError(f"an array in it has the shape {shape}")
        if fortran and len(shape) > 1:
            raise ValueError("an array in it is in Fortran's order")
        if member.tell() + int(np.prod(shape, dtype=object)) * dtype.itemsize != size:
            raise ValueError("an array in it has more or less numbers than its shape says")
        return shape, dtype

    def _refused(self, why: str) -> InputError:
        return InputError(
            f"{self.path} cannot be used ({why}); a whole .npz file of plain arrays would do."
        )
