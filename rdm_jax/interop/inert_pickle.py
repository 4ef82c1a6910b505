"""A pickle read as inert data: nothing in it is imported, called or run.

A pickle is a program. Unpickling with a list of allowed names still runs it: it calls what it
named, and sets items and attributes of what came out. Here a name is a `Name`, a call makes one of
the records below or a plain value, and only our own lists, dicts and records are ever written to.
Every check is made by exact type, so no method of anything foreign runs.
"""

import io
import pickle
import pickletools
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

# What a pickle may cost in all, where a read costs its bytes and READ_COST, as one byte (an empty
# dict) can take a hundred bytes of memory. That is room for four million reads, or as many bytes of
# module_src; a training state needs less than a million.
BUDGET = 2**27
READ_COST = 32
LINE_BYTES = 256  # a GLOBAL's module or name


class Refused(Exception):
    """What is wrong in a file, and what would do instead; `rdm_jax.interop.torch_files` makes it an
    InputError."""

    def __init__(self, why: str, would_do: str = ""):
        super().__init__(why)
        self.would_do = would_do


@dataclass(frozen=True, slots=True)
class Name:
    """A class or function that a pickle names; nothing but its name."""

    module: str
    name: str

    def __str__(self) -> str:
        return quoted(f"{self.module}.{self.name}")


@dataclass(frozen=True, slots=True, eq=False)
class Region:
    """A byte string that is left in the file: where it starts, and its length, which is within the
    file."""

    file: io.BufferedIOBase
    start: int
    length: int

    def read(self, start: int, count: int) -> bytes:
        """Some of its bytes. Raises Refused, before anything is allocated, if they are not all in
        it."""
        if not 0 <= count <= self.length - start:
            raise Refused("it ends early")
        self.file.seek(self.start + start)  # as others read the same file in between
        data = self.file.read(count)
        if len(data) != count:
            raise Refused("it ends early")
        return data


@dataclass(frozen=True, slots=True, eq=False)
class Persistent:
    """A call of torch_utils.persistence on a dict; what the dict holds is not checked yet."""

    meta: dict


@dataclass(slots=True, eq=False)
class ModuleDict:
    """A torch.nn.ModuleDict; its state is None until the pickle's BUILD."""

    state: dict | None = None


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """A tensor, as whatever stood in the call; nothing of it is checked yet."""

    storage: Any
    offset: Any
    size: Any
    stride: Any


@dataclass(frozen=True, slots=True, eq=False)
class Embedded:
    """A storage as a byte string: torch's format before zip."""

    region: Region


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """A storage beside the pickle: the name of its type, its key, its number of elements (checked:
    none negative)."""

    kind: str
    key: str
    numel: int


@dataclass(frozen=True, slots=True, eq=False)
class _DType:
    code: str


@dataclass(frozen=True, slots=True, eq=False)
class _Set:
    """A set, of which nothing is kept: no set in a network matters, and keeping none means hashing
    nothing."""


def quoted(text: str) -> str:
    """A text from the file as it can stand in a message: escaped, and cut where it is long."""
    return repr(text if len(text) <= 80 else f"{text[:80]}...")


class ByteReader:
    """A region read in order.

    Raises:
      Refused: for a read beyond the region's end or beyond the budget, before anything is
        allocated.
    """

    def __init__(self, region: Region, budget: int = BUDGET):
        self._region, self._position, self._budget = region, 0, budget

    def read(self, count: int) -> bytes:
        """The next `count` bytes."""
        self._budget -= count + READ_COST
        if self._budget < 0 and count <= self._region.length - self._position:
            raise Refused("it has too much beside its tensors")
        data = self._region.read(self._position, count)
        self._position += count
        return data

    def readline(self) -> bytes:
        """The next line, of LINE_BYTES at most."""
        line = b""
        while not line.endswith(b"\n"):
            if len(line) == LINE_BYTES:
                raise Refused(f"it has a name of more than {LINE_BYTES} bytes")
            line += self.read(1)
        return line

    def skip(self, count: int) -> Region:
        """Where the next `count` bytes are, which are not read."""
        if not 0 <= count <= self._region.length - self._position:
            raise Refused("it ends early")
        self._position += count
        return Region(self._region.file, self._region.start + self._position - count, count)

    def rest(self) -> Region:
        """Where all that was not read yet is."""
        return self.skip(self._region.length - self._position)


def _persistent(meta: Any) -> Persistent:
    if type(meta) is not dict:
        raise Refused("a persistent object is made from something other than a dict")
    return Persistent(meta)


def _parameter(tensor: Any, requires_grad: Any, hooks: Any) -> View:
    if type(tensor) is not View:
        raise Refused("a parameter is made from something other than a tensor")
    return tensor


def _view(
    storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any, hooks: Any
) -> View:
    return View(storage, offset, size, stride)


def _embedded(data: Any) -> Embedded:
    if type(data) is not Region:
        raise Refused(f"a storage is made from {describe(data)}")
    return Embedded(data)


def _ordered_dict() -> dict:
    return {}


def _set(items: Any) -> _Set:
    return _Set()


def _encode(text: Any, encoding: Any) -> Region:
    """How protocol 2 writes bytes; a network has only a number's, and encoding one long text many
    times would fill the memory."""
    if (
        type(text) is not str
        or type(encoding) is not str
        or encoding != "latin1"
        or len(text) > LINE_BYTES
    ):
        raise Refused("it calls '_codecs.encode' on other than a short text and 'latin1'")
    return Region(io.BytesIO(text.encode("latin1")), 0, len(text))


def _dtype(code: Any, align: Any, copy: Any) -> _DType:
    if type(code) is not str or code not in (
        "f2",
        "f4",
        "f8",
        "i1",
        "i2",
        "i4",
        "i8",
        "u1",
        "u2",
        "u4",
        "u8",
        "b1",
    ):
        raise Refused(
            f"it has a numpy.dtype {quoted(code) if type(code) is str else describe(code)}"
        )
    return _DType(code)


def _scalar(dtype: Any, raw: Any) -> int | float | bool:
    """The number as Python's own."""
    if type(dtype) is not _DType or type(raw) is not Region or raw.length != int(dtype.code[1]):
        raise Refused("it has a damaged numpy scalar")
    return np.frombuffer(raw.read(0, raw.length), f"<{dtype.code}")[0].item()


# What may be called, and what is done instead.
_CALLS: dict[Name, Callable] = {
    Name("torch_utils.persistence", "_reconstruct_persistent_obj"): _persistent,
    Name("torch._utils", "_rebuild_parameter"): _parameter,
    Name("torch._utils", "_rebuild_tensor_v2"): _view,
    Name("torch.storage", "_load_from_bytes"): _embedded,
    Name("collections", "OrderedDict"): _ordered_dict,
    Name("numpy", "dtype"): _dtype,
    Name("numpy.core.multiarray", "scalar"): _scalar,
    Name("numpy._core.multiarray", "scalar"): _scalar,
    Name("__builtin__", "set"): _set,
    Name("builtins", "set"): _set,
    Name("_codecs", "encode"): _encode,
}
_MODULE_DICT = Name("torch.nn.modules.container", "ModuleDict")
_STORAGES = tuple(
    Name("torch", f"{kind}Storage")
    for kind in (
        "Float",
        "Half",
        "Double",
        "BFloat16",
        "Long",
        "Int",
        "Short",
        "Char",
        "Byte",
        "Bool",
    )
)
_NAMES = {*_CALLS, _MODULE_DICT, *_STORAGES}


def describe(value: Any) -> str:
    """What a value from the file is, without showing (and so walking) it."""
    kind = type(value).__name__.strip("_")
    if type(value) is Stored:
        return "a storage of numbers"
    return str(value) if type(value) is Name else f"{'an' if kind[0] in 'aeiouEIO' else 'a'} {kind}"


class _Opcodes(dict):
    """What is done for each opcode; one that is not listed is refused by name."""

    def __missing__(self, code: int):
        known = pickletools.code2op.get(chr(code))
        raise Refused(f"it has the pickle opcode {known.name if known else hex(code)}")


class Unpickler(pickle._Unpickler):
    """Reads one pickle from a stream.

    It extends Python's own unpickler in pure Python rather than the one in C, although its name is
    private: there each opcode can be replaced or left out, and the memo is a dict, so that an index
      of 2^31 allocates nothing.
    Only what the picklers of Python and torch write for a network, in protocols 2 to 5, is known.

    Raises:
      Refused: something unknown is in it.
      Exception: whatever Python's unpickler raises for damaged input.
    """

    _SAME = (
        *(
            pickle.PROTO,
            pickle.STOP,
            pickle.MARK,
            pickle.GLOBAL,
            pickle.STACK_GLOBAL,
            pickle.BINPERSID,
        ),
        *(pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE, pickle.BINGET, pickle.LONG_BINGET),
        *(
            pickle.NONE,
            pickle.NEWTRUE,
            pickle.NEWFALSE,
            pickle.BININT,
            pickle.BININT1,
            pickle.BININT2,
            pickle.LONG1,
        ),
        *(pickle.BINFLOAT, pickle.BINUNICODE, pickle.SHORT_BINUNICODE, pickle.BINUNICODE8),
        *(
            pickle.EMPTY_TUPLE,
            pickle.TUPLE,
            pickle.TUPLE1,
            pickle.TUPLE2,
            pickle.TUPLE3,
            pickle.EMPTY_LIST,
            pickle.EMPTY_DICT,
        ),
    )
    dispatch = _Opcodes({code[0]: pickle._Unpickler.dispatch[code[0]] for code in _SAME})

    def __init__(self, stream: ByteReader):
        super().__init__(stream)
        self._stream = stream

    def find_class(self, module: str, name: str) -> Name:
        """A name, if it is on the list."""
        found = Name(module, name)
        if found not in _NAMES:
            raise Refused(f"it names {found}")
        return found

    def persistent_load(self, pid: Any) -> Stored:
        """A storage: ('storage', its type, key, location, elements), in the older format also a
        view, which must be None."""
        if (
            type(pid) is not tuple
            or len(pid) not in (5, 6)
            or any(type(pid[i]) is not str for i in (0, 2, 3))
        ):
            raise Refused("it has a persistent id that is no storage")
        what, kind, key, _, numel, *view = pid
        if (
            what != "storage"
            or type(kind) is not Name
            or kind not in _STORAGES
            or view not in ([], [None])
        ):
            raise Refused(
                f"it has a persistent id that is no storage but {quoted(what)} of {describe(kind)}"
            )
        if type(numel) is not int or not 0 <= numel < 2**60:
            raise Refused(f"storage {quoted(key)} has an absurd number of elements")
        return Stored(kind.name, key, numel)

    def _frame(self):
        self._stream.read(
            8
        )  # frames only help to read ahead; what is in them means the same without them

    dispatch[pickle.FRAME[0]] = _frame

    def _bytes(self, count: int):
        self.append(self._stream.skip(count))

    dispatch[pickle.SHORT_BINBYTES[0]] = lambda self: self._bytes(*self.read(1))
    dispatch[pickle.BINBYTES[0]] = lambda self: self._bytes(*struct.unpack("<I", self.read(4)))
    dispatch[pickle.BINBYTES8[0]] = lambda self: self._bytes(*struct.unpack("<Q", self.read(8)))
    dispatch[pickle.EMPTY_SET[0]] = lambda self: self.append(_Set())

    def _reduce(self):
        arguments = self.stack.pop()
        called = self.stack[-1]
        if type(called) is not Name or called not in _CALLS or type(arguments) is not tuple:
            raise Refused(f"it calls {describe(called)}")
        self.stack[-1] = _CALLS[called](*arguments)

    dispatch[pickle.REDUCE[0]] = _reduce

    def _new(self):
        arguments = self.stack.pop()
        made = self.stack[-1]
        if (
            type(made) is not Name
            or made != _MODULE_DICT
            or type(arguments) is not tuple
            or arguments
        ):
            raise Refused(f"it makes an object of {describe(made)}")
        self.stack[-1] = ModuleDict()

    dispatch[pickle.NEWOBJ[0]] = _new

    def _build(self):
        state = self.stack.pop()
        target = self.stack[-1]
        if type(target) is ModuleDict and type(state) is dict and target.state is None:
            target.state = state
        elif (
            type(target) is _DType
            and type(state) is tuple
            and len(state) == 8
            and type(state[1]) is str
        ):
            if state[1] not in ("<", "|"):
                raise Refused(f"it has a number of byte order {quoted(state[1])}")
        else:
            raise Refused(f"it sets the state of {describe(target)} from {describe(state)}")

    dispatch[pickle.BUILD[0]] = _build

    def _extend(self, kind: type, items: list):
        target = self.stack[-1]
        if type(target) is not kind:
            raise Refused(f"it puts items into {describe(target)}")
        if kind is list:
            target.extend(items)
        elif kind is dict:
            for name, value in zip(items[::2], items[1::2], strict=True):
                if type(name) not in (
                    str,
                    int,
                    float,
                    bool,
                    type(None),
                ):  # hashing a deep tuple ends the process
                    raise Refused(f"it has a dict with {describe(name)} as a key")
                target[name] = value

    dispatch[pickle.APPEND[0]] = lambda self: self._extend(list, [self.stack.pop()])
    dispatch[pickle.APPENDS[0]] = lambda self: self._extend(list, self.pop_mark())
    dispatch[pickle.SETITEM[0]] = lambda self: self._extend(
        dict, [self.stack.pop(), self.stack.pop()][::-1]
    )
    dispatch[pickle.SETITEMS[0]] = lambda self: self._extend(dict, self.pop_mark())
    dispatch[pickle.ADDITEMS[0]] = lambda self: self._extend(_Set, self.pop_mark())
