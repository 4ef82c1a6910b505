"""The published weight files as settings and tensors: EDM's snapshots (.pkl) and RDM's training states (.pt)."""

import io
import math
import os
import stat
import struct
import zipfile
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np

from rdm_jax.errors import InputError
from rdm_jax.interop.inert_pickle import (
    BUDGET,
    Embedded,
    ModuleDict,
    Persistent,
    Refused,
    Region,
    Stored,
    Stream,
    Unpickler,
    View,
    describe,
    quoted,
)

# Far more than any published network has; the objects in a file may be shared, so that a small file can spell a huge network.
MAX_PARTS = 20_000  # modules and tensors, or values among the settings
MAX_DEPTH = 32
MAX_NAME = 100
MAX_DIMS = 8
MAX_ELEMENTS = 2**40

# torch's format before zip: these two numbers, then a dict, the storage as a persistent id, a list of its key, its elements.
_MAGIC, _PROTOCOL, _HEADER_BUDGET = 0x1950A86A20F9469CFC6C, 1001, 2**14

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
class _Storage:
    """Numbers one after the other in the file: `read(start, count)` gives bytes; `place` is the same for no other storage."""

    place: Hashable
    dtype: np.dtype
    numel: int
    read: Callable[[int, int], bytes]


@dataclass(frozen=True, eq=False)
class Tensor:
    """A tensor that is still in the file; whether it fits there has been checked.

    Attributes:
      shape, dtype: as stored.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    _stride: tuple[int, ...] = field(repr=False)  # in elements
    _start: int = field(repr=False)
    _count: int = field(repr=False)  # elements of the storage from the tensor's first to its last
    _storage: _Storage = field(repr=False)
    _file: io.BufferedIOBase = field(repr=False)
    _path: str = field(repr=False)

    def read(self) -> np.ndarray:
        """The numbers, read now: a new C-contiguous array of `shape` and `dtype`.

        Raises:
          InputError: the file cannot be read, or its checksum says that it is damaged.
          ValueError: `open_torch` has been left already.
        """
        if self._file.closed:
            raise ValueError("a tensor can be read only while its file is open, inside of `with open_torch(...)`")
        size = self.dtype.itemsize
        try:
            data = self._storage.read(self._start * size, self._count * size)
        except MemoryError:  # of this machine's memory: that the numbers are in the file has been checked
            raise
        except Exception as error:
            raise _input_error(self._path, error) from error
        # A byte other than 0 and 1 would be no bool to numpy.
        flat = np.frombuffer(data, np.uint8) != 0 if self.dtype == np.bool_ else np.frombuffer(data, self.dtype)
        strides = [stride * size for stride in self._stride]
        return np.array(np.lib.stride_tricks.as_strided(flat, self.shape, strides, writeable=False), order="C")


@dataclass(frozen=True, eq=False)
class Original:
    """What a file says of one network.

    Attributes:
      class_name: of the outermost module, such as 'EDMPrecond'.
      settings: the keyword arguments that it was made with, as Python's own dicts, lists, tuples, strings and numbers.
      tensors: all parameters and buffers by full name, such as 'model.enc.64x64_conv.weight'.
    """

    class_name: str
    settings: dict[str, Any]
    tensors: dict[str, Tensor]


@contextmanager
def open_torch(path: str | os.PathLike, key: str = "ema") -> Iterator[Original]:
    """Opens a published file, told apart by its content, for as long as its tensors are to be read.

    Nothing in the file is run or imported (`rdm_jax.interop.inert_pickle`), and no tensor's numbers are loaded before its
    `read`; that all of them are there, and lie apart, is checked at once.

    Args:
      path: an EDM snapshot, which is a pickle, or an RDM training state in torch's zip format.
      key: which network of the file; 'ema' is in both formats, 'net' in training states.

    Raises:
      InputError: the file cannot be read, is damaged, or has anything in it that a network does not have.
    """
    with ExitStack() as opened:
        try:
            original = _open(os.fspath(path), key, opened)
        except Exception as error:
            raise _input_error(os.fspath(path), error) from error
        yield original


def _input_error(path: str, error: Exception) -> InputError:
    would_do = "a snapshot of EDM (.pkl) or a training state of RDM (.pt), as published,"
    if isinstance(error, Refused):
        why, would_do = str(error), error.would_do or would_do
    elif isinstance(error, OSError) and error.strerror:
        why = error.strerror
    else:
        why = f"it is damaged: {type(error).__name__} {quoted(str(error))}"
    return InputError(f"{path} cannot be used ({why}); {would_do} would do.")


def _open(path: str, key: str, opened: ExitStack) -> Original:
    if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for ever
        raise Refused("it is no file" if not os.path.isdir(path) else "it is a directory")
    file = opened.enter_context(open(path, "rb"))  # noqa: SIM115
    magic = file.read(4)
    if magic == b"PK\x03\x04":
        graph, find = _open_zip(file, opened)
    elif magic[:1] == b"\x80":
        graph = Unpickler(Stream(Region(file, 0, os.fstat(file.fileno()).st_size))).load()
        find = _embedded_storage
    else:
        raise Refused("it is neither a pickle nor a zip file")
    if type(graph) is not dict:
        raise Refused(f"it holds {describe(graph)} and no dict of networks")
    if key not in graph:
        names = ", ".join(quoted(name) for name in [name for name in graph if type(name) is str][:20])
        raise Refused(f"it has no {key!r}, only {names or 'nothing'}", f"a file with it, or one of these for {key!r},")
    network = graph[key]
    if type(network) is not Persistent:
        raise Refused(f"its {key!r} is {describe(network)} and no network")
    class_name, state = _class_and_state(network, key)
    arguments, settings = state.get("_init_args"), state.get("_init_kwargs")
    if type(arguments) not in (tuple, list) or arguments or type(settings) is not dict:
        raise Refused(f"its {key!r} does not name all the settings that it was made with")
    return Original(class_name, _Plain()(settings), _tensors(network, find, file, path))


def _embedded_storage(storage: Any) -> _Storage:
    """The storage in a byte string of a snapshot, in torch's format before zip."""
    if type(storage) is not Embedded:
        raise Refused(f"its storage is {describe(storage)} and no embedded one")
    stream = Stream(storage.region, _HEADER_BUDGET)
    magic, protocol, system, stored, keys = [Unpickler(stream).load() for _ in range(5)]
    if type(magic) is not int or magic != _MAGIC or type(protocol) is not int or protocol != _PROTOCOL:
        raise Refused("its storage is not in torch's format 1001")
    if type(system) is not dict or system.get("little_endian") is not True:
        raise Refused("its storage is not little-endian")
    if type(stored) is not Stored or type(keys) is not list or [*map(type, keys)] != [str] or keys[0] != stored.key:
        raise Refused("its storage is not a single one")
    numel, dtype = int.from_bytes(stream.read(8), "little", signed=True), _DTYPES[stored.kind]
    numbers = stream.rest()
    if numel != stored.numel or numbers.length != numel * dtype.itemsize:
        raise Refused(f"its storage has {numbers.length} bytes for {stored.numel} numbers of {dtype}")
    return _Storage((id(numbers.file), numbers.start), dtype, numel, numbers.read)


def _open_zip(file: io.BufferedIOBase, opened: ExitStack) -> tuple[Any, Callable[[Any], _Storage]]:
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
    graph = Unpickler(Stream(Region(io.BytesIO(archive.read(pickles[0])), 0, size))).load()

    def find(storage: Any) -> _Storage:
        if type(storage) is not Stored:
            raise Refused(f"its storage is {describe(storage)} and no member of the zip file")
        member, dtype = members.get(f"{root}data/{storage.key}"), _DTYPES[storage.kind]
        if member is None:
            raise Refused(f"the zip file has no member 'data/*' named {quoted(storage.key)}")
        if member.file_size != storage.numel * dtype.itemsize:
            raise Refused(f"its storage has {member.file_size} bytes for {storage.numel} numbers of {dtype}")

        def read(first: int, count: int) -> bytes:
            return archive.read(member)[first : first + count]  # all of it is read, as its checksum is of all

        return _Storage(member.filename, dtype, storage.numel, read)

    return graph, find


def _members(archive: zipfile.ZipFile, file: io.BufferedIOBase) -> dict[str, zipfile.ZipInfo]:
    """The members by name, when each is plain, there as a whole, and shares no byte with another."""
    members: dict[str, zipfile.ZipInfo] = {}
    end, last = 0, "the zip file's beginning"
    for member in sorted(archive.infolist(), key=lambda member: member.header_offset):
        name = quoted(member.filename)
        if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
            raise Refused(f"its member {name} is compressed")
        if member.flag_bits & ~(0x8 | 0x800):  # sizes after the data, names in UTF-8; the others encrypt or patch
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
        if file.read(lengths[0]) != member.orig_filename.encode("utf-8" if member.flag_bits & 0x800 else "cp437"):
            raise Refused(f"its member {name} has another name in its header")
        end, last = member.header_offset + 30 + sum(lengths) + member.file_size, name
        if end > archive.start_dir:
            raise Refused(f"its member {name} ends beyond the file's data")
        members[member.filename] = member
    return members


def _class_and_state(module: Any, name: str) -> tuple[str, dict[Any, Any]]:
    if type(module) is ModuleDict and type(module.state) is dict:
        return "ModuleDict", module.state
    meta = module.meta if type(module) is Persistent else {}
    kind, class_name, state = meta.get("type"), meta.get("class_name"), meta.get("state")
    if type(kind) is not str or kind != "class" or type(class_name) is not str or type(state) is not dict:
        raise Refused(f"its module {quoted(name)} is {describe(module)} and not a module as torch_utils.persistence writes it")
    return class_name, state


def _tensors(network: Any, find: Callable[[Any], _Storage], file: io.BufferedIOBase, path: str) -> dict[str, Tensor]:
    """All tensors of a network by full name; the modules are walked without recursion and each only once."""
    tensors: dict[str, Tensor] = {}
    used: dict[Hashable, list[tuple[int, int, str]]] = {}
    waiting, met, parts = [("", network, 0)], set(), 0
    while waiting:
        prefix, module, depth = waiting.pop()
        if id(module) in met:  # cycles end here, and so do small files that spell exponentially many modules
            raise Refused(f"its module {quoted(prefix[:-1])} is in it twice")
        met.add(id(module))
        _, state = _class_and_state(module, prefix[:-1])
        found = {part: _children(state, part, prefix) for part in ("_parameters", "_buffers", "_modules")}
        parts += 1 + sum(len(state[part]) for part in found)  # with those that are None
        if parts > MAX_PARTS or depth > MAX_DEPTH:
            raise Refused(f"it has more than {MAX_PARTS} modules and tensors, or more than {MAX_DEPTH} one in the other")
        for name, view in [*found["_parameters"].items(), *found["_buffers"].items()]:
            full = prefix + name
            if full in tensors:
                raise Refused(f"it has two tensors {quoted(full)}")
            try:
                tensors[full] = tensor = _tensor(view, find, file, path)
            except Exception as error:
                why = str(error) if isinstance(error, Refused) else f"{type(error).__name__} {quoted(str(error))}"
                raise Refused(f"tensor {quoted(full)} is damaged: {why}") from error
            if tensor._count:
                used.setdefault(tensor._storage.place, []).append((tensor._start, tensor._start + tensor._count, full))
        waiting.extend((f"{prefix}{name}.", child, depth + 1) for name, child in reversed(found["_modules"].items()))
    for places in used.values():
        places.sort()
        for (_, end, one), (start, _, other) in zip(places, places[1:], strict=False):
            if start < end:
                raise Refused(f"its tensors {quoted(one)} and {quoted(other)} overlap in one storage")
    return tensors


def _children(state: dict[Any, Any], part: str, prefix: str) -> dict[str, Any]:
    """Parameters, buffers or modules by name, without those that are None."""
    children = state.get(part)
    if type(children) is not dict:
        raise Refused(f"its module {quoted(prefix[:-1])} has no {part}")
    for name in children:
        if type(name) is not str or not 0 < len(name) <= MAX_NAME or "." in name:
            named = quoted(name) if type(name) is str else describe(name)
            raise Refused(f"its module {quoted(prefix[:-1])} has {named} as a name in {part}")
    return {name: child for name, child in children.items() if child is not None}


def _tensor(view: Any, find: Callable[[Any], _Storage], file: io.BufferedIOBase, path: str) -> Tensor:
    if type(view) is not View:
        raise Refused(f"it is {describe(view)}")
    start, shape, stride = view.offset, view.size, view.stride
    if type(shape) is not tuple or type(stride) is not tuple or not len(shape) == len(stride) <= MAX_DIMS:
        raise Refused("its sizes and strides are not two tuples of one length up to 8")
    if any(type(number) is not int or not 0 <= number <= MAX_ELEMENTS for number in (start, *shape, *stride)):
        raise Refused("its sizes, strides and offset are not all numbers from 0 to 2^40")
    if math.prod(max(size, 1) for size in shape) > MAX_ELEMENTS:
        raise Refused("it has more than 2^40 elements")
    storage = find(view.storage)
    count = 0 if 0 in shape else 1
    for step, size in sorted(zip(stride, shape, strict=True)):
        if count and size > 1:
            if step < count:  # else a small storage could be repeated to any size
                raise Refused("its elements lie over each other")
            count += step * (size - 1)
    if start + count > storage.numel:
        raise Refused(f"its elements {start} to {start + count} are beyond its storage of {storage.numel}")
    # The stride along a side of length 1 means nothing, and may be anything.
    strides = tuple(step if size > 1 else 0 for step, size in zip(stride, shape, strict=True))
    return Tensor(shape, storage.dtype, strides, start, count, storage, file, path)


class _Plain:
    """Copies settings, refusing what is none and counting what is copied: values may be shared, and hold themselves."""

    def __init__(self):
        self._left = MAX_PARTS

    def __call__(self, value: Any, depth: int = 0) -> Any:
        self._left -= 1
        if self._left < 0 or depth > MAX_DEPTH:
            raise Refused(f"it has more than {MAX_PARTS} settings, or more than {MAX_DEPTH} one in the other")
        if type(value) in (list, tuple):
            return type(value)([self(item, depth + 1) for item in value])
        if type(value) is dict:
            if any(type(name) is not str for name in value):
                raise Refused("it has settings with other names than strings")
            return {name: self(item, depth + 1) for name, item in value.items()}
        if type(value) not in (str, int, float, bool, type(None)):
            raise Refused(f"it has {describe(value)} among its settings")
        return value
