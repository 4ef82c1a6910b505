"""Tensors in a file of torch, in either of its formats: where their numbers are; reading them."""

import io
import math
import os
import pickle
import stat
import struct
import zipfile
from collections.abc import Callable, Hashable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np

from rdm_jax.interop.byte_reader import BUDGET, ByteReader, Refused, Region, quoted
from rdm_jax.interop.inert_pickle import Embedded, Stored, Unpickler, View, describe
from rdm_jax.runtime.errors import InputError

MAX_DIMS = 8
MAX_ELEMENTS = 2**40

# torch's format before zip: these two numbers, a dict, the object with its storages as persistent
# ids, a list of their keys, and then for each key the number of its elements, and the elements.
MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_EMBEDDED_BUDGET = 2**14

_DTYPES = {
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "DoubleStorage": np.dtype(np.float64),
    "BFloat16Storage": np.dtype(jnp.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}


@dataclass(frozen=True, eq=False)
class Storage:
    """Contiguous numbers in the file.

    Attributes:
      place: identifies the storage.
      numel: number of elements.
      read: (start, count) to bytes.
    """

    place: Hashable
    dtype: np.dtype
    numel: int
    read: Callable[[int, int], bytes]


@dataclass(frozen=True, eq=False)
class OpenFile:
    """An open file; `fix` is the remedy for a refusal that has none of its own."""

    path: str
    fix: str
    file: io.BufferedIOBase


def open_file(path: str, opened: ExitStack) -> io.BufferedIOBase:
    """Opens a file until `opened` is closed. Raises Refused or OSError."""
    if os.path.isdir(path):
        raise Refused("it is a directory")
    if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe waits forever
        raise Refused("it is not a plain file")
    return opened.enter_context(open(path, "rb"))


def input_error(path: str, fix: str, error: Exception) -> InputError:
    """The InputError for an error in a file; `fix` is the default remedy."""
    if isinstance(error, Refused):
        return InputError(f"{path} cannot be used ({error.problem})", error.fix or fix)
    if isinstance(error, OSError) and error.strerror:
        return InputError(f"{path} cannot be used ({error.strerror})", fix)
    why = f"it is damaged: {type(error).__name__} {quoted(str(error))}"
    return InputError(f"{path} cannot be used ({why})", fix)


@dataclass(frozen=True, eq=False)
class Tensor:
    """A tensor in the file, not read yet; its bounds have been checked.

    Attributes:
      shape, dtype: as stored.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    _stride: tuple[int, ...] = field(repr=False)  # in elements
    _start: int = field(repr=False)
    _count: int = field(repr=False)  # storage elements from the tensor's first to its last
    _storage: Storage = field(repr=False)
    _source: OpenFile = field(repr=False)

    def read(self) -> np.ndarray:
        """Reads the numbers: a new C-contiguous array of `shape` and `dtype`.

        Raises:
          InputError: the file cannot be read, or its checksum shows that it is damaged.
          ValueError: the context that opened the file has ended.
        """
        if self._source.file.closed:
            raise ValueError(
                "a tensor can only be read while its file is open, "
                "inside `with open_torch(...)` or `with open_state_dict(...)`"
            )
        size = self.dtype.itemsize
        try:
            data = self._storage.read(self._start * size, self._count * size)
        except MemoryError:  # the machine has too little: the numbers are in the file
            raise
        except Exception as error:
            raise input_error(self._source.path, self._source.fix, error) from error
        if self.dtype == np.bool_:  # numpy's bools must be 0 or 1
            flat = np.frombuffer(data, np.uint8) != 0
        else:
            flat = np.frombuffer(data, self.dtype)
        strides = [stride * size for stride in self._stride]
        view = np.lib.stride_tricks.as_strided(flat, self.shape, strides, writeable=False)
        return np.array(view, order="C")

    @property
    def nbytes(self) -> int:
        """The bytes of what `read` returns."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def span(self) -> tuple[Hashable, int, int]:
        """The place of its storage, its first element there and the one after its last."""
        return self._storage.place, self._start, self._start + self._count


def named_tensor(name: str, view: Any, find: Callable[[Any], Storage], source: OpenFile) -> Tensor:
    """A tensor from its call in the pickle.

    Args:
      find: the storage of a value from the pickle.

    Raises:
      Refused: it is not a tensor, or not entirely in the file; names it.
    """
    try:
        return _tensor(view, find, source)
    except Exception as error:
        why = f"{type(error).__name__} {quoted(str(error))}"
        if isinstance(error, Refused):
            why = error.problem
        raise Refused(f"tensor {quoted(name)} is damaged: {why}") from error


def _tensor(view: Any, find: Callable[[Any], Storage], source: OpenFile) -> Tensor:
    if type(view) is not View:
        raise Refused(f"it is {describe(view)}")
    start, shape, stride = view.offset, view.size, view.stride
    are_tuples = type(shape) is tuple and type(stride) is tuple
    if not are_tuples or not len(shape) == len(stride) <= MAX_DIMS:
        raise Refused("its sizes and strides are not two tuples of the same length up to 8")
    for number in (start, *shape, *stride):
        if type(number) is not int or not 0 <= number <= MAX_ELEMENTS:
            raise Refused("its sizes, strides and offset are not all numbers from 0 to 2^40")
    if math.prod(max(size, 1) for size in shape) > MAX_ELEMENTS:
        raise Refused("it has more than 2^40 elements")
    storage = find(view.storage)
    count = 0 if 0 in shape else 1
    for step, size in sorted(zip(stride, shape, strict=True)):
        if count and size > 1:
            if step < count:  # a small storage could be repeated to any size
                raise Refused("its elements overlap")
            count += step * (size - 1)
    if start + count > storage.numel:
        raise Refused(
            f"its elements {start} to {start + count} are beyond its storage of {storage.numel}"
        )
    # The stride along an axis of length 1 is meaningless, and may have any value.
    strides = tuple(step if size > 1 else 0 for step, size in zip(stride, shape, strict=True))
    return Tensor(shape, storage.dtype, strides, start, count, storage, source)


class StateDictUnpickler(Unpickler):
    """Reads a pickle that torch wrote as a separate file; drops the `_metadata` of a state_dict.

    Attributes:
      stored: the storages that the pickle names, by key.
    """

    dispatch = type(Unpickler.dispatch)(Unpickler.dispatch)

    def __init__(self, stream: ByteReader):
        super().__init__(stream)
        self.stored: dict[str, Stored] = {}

    def persistent_load(self, pid: Any) -> Stored:
        """A storage; the same one for the same key."""
        found = super().persistent_load(pid)
        known = self.stored.setdefault(found.key, found)
        if (known.kind, known.numel) != (found.kind, found.numel):
            raise Refused(f"it has two storages {quoted(found.key)}")
        return known

    def _build(self):
        state = self.stack[-1]
        if type(self.stack[-2]) is dict and type(state) is dict and [*state] == ["_metadata"]:
            self.stack.pop()  # versions of modules, as attributes of the OrderedDict
        else:
            super()._build()

    dispatch[pickle.BUILD[0]] = _build


def open_sequential(region: Region, budget: int = BUDGET) -> tuple[Any, Callable[[Any], Storage]]:
    """Opens a file of torch's format before zip: its object, and a function that finds storages.

    Raises:
      Refused: it is damaged, or has anything unknown in it.
      Exception: as `Unpickler`.
    """
    stream = ByteReader(region, budget)
    magic, protocol, system = [Unpickler(stream).load() for _ in range(3)]
    are_numbers = type(magic) is int and type(protocol) is int
    if not are_numbers or magic != MAGIC or protocol != _PROTOCOL:
        raise Refused("it is not in torch's format 1001")
    if type(system) is not dict or system.get("little_endian") is not True:
        raise Refused("it is not little-endian")
    reader = StateDictUnpickler(stream)
    graph = reader.load()
    keys = Unpickler(stream).load()
    are_names = type(keys) is list and all(type(key) is str for key in keys)
    if not are_names or sorted(keys) != sorted(reader.stored):
        raise Refused("its list of storages does not have each one that it names exactly once")
    storages = {}
    for key in keys:
        numel = int.from_bytes(stream.read(8), "little", signed=True)
        stored = reader.stored[key]
        dtype = _DTYPES[stored.kind]
        numbers = stream.rest() if key == keys[-1] else stream.skip(stored.numel * dtype.itemsize)
        if numel != stored.numel or numbers.length != numel * dtype.itemsize:
            raise Refused(
                f"its storage has {numbers.length} bytes for {stored.numel} numbers of {dtype}"
            )
        storages[key] = Storage((id(numbers.file), numbers.start), dtype, numel, numbers.read)

    def find(storage: Any) -> Storage:
        if type(storage) is not Stored:
            raise Refused(f"its storage is {describe(storage)}, not one of the file")
        return storages[storage.key]

    return graph, find


def embedded_storage(storage: Any) -> Storage:
    """The storage in a byte string of a snapshot: a file of torch's format before zip."""
    if type(storage) is not Embedded:
        raise Refused(f"its storage is {describe(storage)}, not an embedded one")
    graph, find = open_sequential(storage.region, _EMBEDDED_BUDGET)
    return find(graph)


def open_zip(file: io.BufferedIOBase, opened: ExitStack) -> tuple[Any, Callable[[Any], Storage]]:
    """Opens a file of torch's zip format: its object, and a function that finds storages.

    Raises:
      Refused: it is damaged, or has anything unknown in it.
      Exception: as zipfile.
    """
    archive = opened.enter_context(zipfile.ZipFile(file))
    members = _members(archive, file)
    pickles = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise Refused(f"it is a zip file with {len(pickles)} members '*/data.pkl'")
    root = pickles[0].removesuffix("data.pkl")
    order = members.get(f"{root}byteorder")
    if order is not None and (order.file_size != 6 or archive.read(order) != b"little"):
        raise Refused("its byteorder is not 'little'")
    size = members[pickles[0]].file_size
    if size > BUDGET:
        raise Refused(f"its data.pkl has {size} bytes")
    pickled = Region(io.BytesIO(archive.read(pickles[0])), 0, size)
    graph = StateDictUnpickler(ByteReader(pickled)).load()

    def find(storage: Any) -> Storage:
        if type(storage) is not Stored:
            raise Refused(f"its storage is {describe(storage)}, not a member of the zip file")
        member, dtype = members.get(f"{root}data/{storage.key}"), _DTYPES[storage.kind]
        if member is None:
            raise Refused(f"the zip file has no member 'data/*' named {quoted(storage.key)}")
        if member.file_size != storage.numel * dtype.itemsize:
            raise Refused(
                f"its storage has {member.file_size} bytes for {storage.numel} numbers of {dtype}"
            )

        def read(first: int, count: int) -> bytes:
            whole = archive.read(member)  # the checksum is of the whole member
            return whole[first : first + count]

        return Storage(member.filename, dtype, storage.numel, read)

    return graph, find


def _members(archive: zipfile.ZipFile, file: io.BufferedIOBase) -> dict[str, zipfile.ZipInfo]:
    """The members by name.

    Raises:
      Refused: a member is not plain, not entirely in the file, or shares bytes with another.
    """
    members: dict[str, zipfile.ZipInfo] = {}
    end = 0
    last = "the zip file's beginning"
    for member in sorted(archive.infolist(), key=lambda member: member.header_offset):
        name = quoted(member.filename)
        if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
            raise Refused(f"its member {name} is compressed")
        # Allowed flags: sizes after the data, names in UTF-8. Others mean encryption or patches.
        if member.flag_bits & ~(0x8 | 0x800):
            raise Refused(f"its member {name} is encrypted, or has unknown flags")
        if member.filename in members:
            raise Refused(f"it has two members {name}")
        if member.header_offset < end:
            raise Refused(f"its members {last} and {name} overlap")
        file.seek(member.header_offset)
        header = file.read(30)
        if len(header) != 30 or header[:4] != b"PK\x03\x04":
            raise Refused(f"its member {name} has no header")
        lengths = struct.unpack("<HH", header[26:])
        encoding = "utf-8" if member.flag_bits & 0x800 else "cp437"
        if file.read(lengths[0]) != member.orig_filename.encode(encoding):
            raise Refused(f"its member {name} has another name in its header")
        end = member.header_offset + 30 + sum(lengths) + member.file_size
        last = name
        if end > archive.start_dir:
            raise Refused(f"its member {name} ends beyond the file's data")
        members[member.filename] = member
    return members
