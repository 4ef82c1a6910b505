"""Reading untrusted .npz files: nothing in them is executed, and only what is asked for is read."""

import hashlib
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np

from rdm_jax.runtime.errors import InputError

CHUNK = 2**24  # bytes that are skipped at a time
HEADER_READERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


class Npz:
    """An open .npz file.

    Attributes:
      arrays: shape and dtype of each array, by name.

    Raises:
      InputError: it is not an .npz file, is damaged, or holds Python objects (which only executing
        could create).
    """

    def __init__(self, path: Path):
        self.path = path
        self.arrays: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
        # The array that is being read, and how far.
        self._member: IO[bytes] | None = None
        self._name = ""
        self._position = 0
        try:
            self._file = zipfile.ZipFile(path)
            for name in self._file.namelist():
                if name.endswith(".npy"):
                    with self._file.open(name) as member:
                        header = self._header(member, self._file.getinfo(name).file_size)
                    self.arrays[name.removesuffix(".npy")] = header
        # zipfile, its decompressors and NumPy's header parser each raise errors of their own.
        except Exception as error:
            message = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise self._refused(message) from error

    def __enter__(self) -> "Npz":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, name: str) -> np.ndarray:
        """Returns one array. Raises InputError if it is damaged or missing."""
        if name not in self.arrays:
            raise self._refused(f"it has no {name}, only {', '.join(self.arrays) or 'nothing'}")
        shape, dtype = self.arrays[name]
        data = self._bytes(name, 0, int(np.prod(shape)) * dtype.itemsize)
        return np.frombuffer(data, dtype).reshape(shape)

    def rows(self, name: str, first: int, count: int) -> np.ndarray:
        """Returns rows `first` to `first + count` of an array, without reading the others.

        Reading in ascending order is fastest. Raises InputError if the rows are damaged.
        """
        shape, dtype = self.arrays[name]
        size = int(np.prod(shape[1:])) * dtype.itemsize
        data = self._bytes(name, first * size, count * size)
        return np.frombuffer(data, dtype).reshape(count, *shape[1:])

    def identity(self) -> str:
        """Returns a hash of the names, sizes and checksums of all arrays."""
        members = sorted(
            (info.filename, info.file_size, info.CRC) for info in self._file.infolist()
        )
        return hashlib.sha256(repr(members).encode()).hexdigest()

    def _bytes(self, name: str, first: int, count: int) -> bytes:
        """Returns bytes of an array, counted from the end of its header.

        The member stays open, so that reading in order decompresses it once.
        """
        try:
            if self._member is None or self._name != name or self._position > first:
                self._member = self._file.open(f"{name}.npy")
                self._name = name
                self._position = 0
                self._header(self._member, self._file.getinfo(f"{name}.npy").file_size)
            while self._position < first:
                self._position += len(self._read(min(first - self._position, CHUNK)))
            data = self._read(count)
        except Exception as error:
            raise self._refused(f"{name} is damaged: {error}") from error
        self._position += len(data)
        return data

    def _read(self, count: int) -> bytes:
        assert self._member is not None
        data = self._member.read(count)
        if len(data) != count:
            raise ValueError("it ends before its last number")
        return data

    # `Any`: zipfile's members are `IO[bytes]` for a type checker, and not at run time.
    def _header(self, member: Any, size: int) -> tuple[tuple[int, ...], np.dtype]:
        version = np.lib.format.read_magic(member)
        if version not in HEADER_READERS:
            raise ValueError(f"version {version} of NumPy's format is not known")
        shape, fortran, dtype = HEADER_READERS[version](member)
        if dtype.hasobject:
            raise ValueError("it holds Python objects, which are never loaded")
        if min(shape, default=0) < 0:
            raise ValueError(f"an array in it has the shape {shape}")
        if fortran and len(shape) > 1:
            raise ValueError("an array in it is in Fortran order")
        if member.tell() + int(np.prod(shape, dtype=object)) * dtype.itemsize != size:
            raise ValueError("the size of an array in it does not match its shape")
        return shape, dtype

    def _refused(self, why: str) -> InputError:
        return InputError(
            f"{self.path} cannot be used ({why})", "Use a complete .npz file of plain arrays."
        )
