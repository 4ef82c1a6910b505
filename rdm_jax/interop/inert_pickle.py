"""Reads a pickle as inert data: nothing in it is imported, called or run.

A pickle is a program. Unpickling with a list of allowed names still runs it: it calls what it
names, and sets items and attributes of the results. Here a name is a `Name`, a call makes one of
the records below or a plain value, and only lists, dicts and records of this module are written to.
Every check is made by exact type, so that no method of a foreign object runs.
"""

import io
import pickle
import pickletools
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from rdm_jax.interop.byte_reader import LINE_BYTES, ByteReader, Refused, Region, quoted


@dataclass(frozen=True, slots=True)
class Name:
    """The name of a class or function in a pickle; nothing else of it."""

    module: str
    name: str

    def __str__(self) -> str:
        return quoted(f"{self.module}.{self.name}")


@dataclass(frozen=True, slots=True, eq=False)
class Persistent:
    """A call of torch_utils.persistence on a dict, whose content is not checked yet."""

    meta: dict


@dataclass(slots=True, eq=False)
class ModuleDict:
    """A torch.nn.ModuleDict; its state is None until the pickle's BUILD."""

    state: dict | None = None


@dataclass(slots=True, eq=False)
class Namespace:
    """An argparse.Namespace; its state is None until the pickle's BUILD, and if it is empty."""

    state: dict | None = None


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """A tensor, with the arguments of the call; not checked yet."""

    storage: Any
    offset: Any
    size: Any
    stride: Any


@dataclass(frozen=True, slots=True, eq=False)
class Embedded:
    """A storage in a byte string, in torch's format before zip."""

    region: Region


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """A storage beside the pickle.

    Attributes:
      kind: name of its type.
      key: by which it is found.
      numel: number of elements, checked to be at least 0.
    """

    kind: str
    key: str
    numel: int


@dataclass(frozen=True, slots=True, eq=False)
class _DType:
    code: str


@dataclass(frozen=True, slots=True, eq=False)
class _Set:
    """A set, whose items are dropped: no set in a network matters, and no item is hashed."""


def _persistent(meta: Any) -> Persistent:
    if type(meta) is not dict:
        raise Refused("a persistent object is not made from a dict")
    return Persistent(meta)


def _parameter(tensor: Any, requires_grad: Any, hooks: Any) -> View:
    if type(tensor) is not View:
        raise Refused("a parameter is not made from a tensor")
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
    """Bytes, as protocol 2 writes them.

    A network only has those of a number; encoding a long text many times could fill the memory.
    """
    if (
        type(text) is not str
        or type(encoding) is not str
        or encoding != "latin1"
        or len(text) > LINE_BYTES
    ):
        raise Refused("it calls '_codecs.encode' with other than a short text and 'latin1'")
    return Region(io.BytesIO(text.encode("latin1")), 0, len(text))


_DTYPE_CODES = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1")


def _dtype(code: Any, align: Any, copy: Any) -> _DType:
    if type(code) is not str or code not in _DTYPE_CODES:
        shown = quoted(code) if type(code) is str else describe(code)
        raise Refused(f"it has a numpy.dtype {shown}")
    return _DType(code)


def _scalar(dtype: Any, raw: Any) -> int | float | bool:
    """The scalar as a Python number."""
    if type(dtype) is not _DType or type(raw) is not Region or raw.length != int(dtype.code[1]):
        raise Refused("it has a damaged numpy scalar")
    return np.frombuffer(raw.read(0, raw.length), f"<{dtype.code}")[0].item()


# What a pickle may call, and what is done instead.
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
# What a pickle may make an object of, without arguments, and what is made instead.
_MADE: dict[Name, type[ModuleDict] | type[Namespace]] = {
    Name("torch.nn.modules.container", "ModuleDict"): ModuleDict,
    Name("argparse", "Namespace"): Namespace,
}
_FLOAT_KINDS = ("Float", "Half", "Double", "BFloat16")
_INTEGER_KINDS = ("Long", "Int", "Short", "Char", "Byte", "Bool")
_STORAGES = tuple(Name("torch", f"{kind}Storage") for kind in (*_FLOAT_KINDS, *_INTEGER_KINDS))
_NAMES = {*_CALLS, *_MADE, *_STORAGES}


def describe(value: Any) -> str:
    """The kind of a value from the file, in words; does not show (and so traverse) it."""
    if type(value) is Stored:
        return "a storage of numbers"
    if type(value) is Name:
        return str(value)
    kind = type(value).__name__.strip("_")
    return f"{'an' if kind[0] in 'aeiouEIO' else 'a'} {kind}"


class _Opcodes(dict):
    """The method of each opcode; an opcode that is not listed is refused by name."""

    def __missing__(self, code: int):
        known = pickletools.code2op.get(chr(code))
        raise Refused(f"it has the pickle opcode {known.name if known else hex(code)}")


# Opcodes that do the same as in Python's unpickler: frames and names, the memo, numbers and text,
# containers.
_UNCHANGED = (pickle.PROTO, pickle.STOP, pickle.MARK, pickle.GLOBAL, pickle.STACK_GLOBAL)
_UNCHANGED += (pickle.BINPERSID, pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE, pickle.BINGET)
_UNCHANGED += (pickle.LONG_BINGET, pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BININT)
_UNCHANGED += (pickle.BININT1, pickle.BININT2, pickle.LONG1, pickle.BINFLOAT, pickle.BINUNICODE)
_UNCHANGED += (pickle.SHORT_BINUNICODE, pickle.BINUNICODE8, pickle.EMPTY_TUPLE, pickle.TUPLE)
_UNCHANGED += (pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.EMPTY_LIST, pickle.EMPTY_DICT)


class Unpickler(pickle._Unpickler):
    """Reads one pickle from a stream.

    It extends Python's unpickler in pure Python, although its name is private, and not the one in
    C: each opcode can be replaced or left out, and the memo is a dict, so that an index of 2^31
    allocates nothing.
    It only knows what the picklers of Python and torch write for a network, in protocols 2 to 5.

    Raises:
      Refused: it contains something unknown.
      Exception: of Python's unpickler, for damaged input.
    """

    dispatch = _Opcodes({code[0]: pickle._Unpickler.dispatch[code[0]] for code in _UNCHANGED})

    def __init__(self, stream: ByteReader):
        super().__init__(stream)
        self._stream = stream

    def find_class(self, module: str, name: str) -> Name:
        """A name, if it is an allowed one."""
        found = Name(module, name)
        if found not in _NAMES:
            raise Refused(f"it names {found}")
        return found

    def persistent_load(self, pid: Any) -> Stored:
        """A storage: ('storage', type, key, location, number of elements).

        The older format has also a view, which must be None.
        """
        wrong = "it has a persistent id that is not a storage"
        if type(pid) is not tuple or len(pid) not in (5, 6):
            raise Refused(wrong)
        if any(type(pid[i]) is not str for i in (0, 2, 3)):
            raise Refused(wrong)
        what, kind, key, _, numel, *view = pid
        is_storage = what == "storage" and type(kind) is Name and kind in _STORAGES
        if not is_storage or view not in ([], [None]):
            raise Refused(f"{wrong} but {quoted(what)} of {describe(kind)}")
        if type(numel) is not int or not 0 <= numel < 2**60:
            raise Refused(f"storage {quoted(key)} has an impossible number of elements")
        return Stored(kind.name, key, numel)

    def _frame(self):
        self._stream.read(8)  # frames only help to read ahead; their content means the same without

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
        is_known = type(made) is Name and made in _MADE
        if not is_known or type(arguments) is not tuple or arguments:
            raise Refused(f"it makes an object of {describe(made)}")
        self.stack[-1] = _MADE[made]()

    dispatch[pickle.NEWOBJ[0]] = _new

    def _build(self):
        state = self.stack.pop()
        target = self.stack[-1]
        is_made = type(target) is ModuleDict or type(target) is Namespace
        if is_made and type(state) is dict and target.state is None:
            target.state = state
            return
        if type(target) is _DType and type(state) is tuple and len(state) == 8:
            order = state[1]
            if type(order) is str:
                if order not in ("<", "|"):
                    raise Refused(f"it has a number of byte order {quoted(order)}")
                return
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
                # Plain keys only: hashing a deep tuple ends the process.
                if type(name) not in (str, int, float, bool, type(None)):
                    raise Refused(f"it has a dict with {describe(name)} as a key")
                target[name] = value

    def _set_item(self):
        value, name = self.stack.pop(), self.stack.pop()
        self._extend(dict, [name, value])

    dispatch[pickle.APPEND[0]] = lambda self: self._extend(list, [self.stack.pop()])
    dispatch[pickle.APPENDS[0]] = lambda self: self._extend(list, self.pop_mark())
    dispatch[pickle.SETITEM[0]] = _set_item
    dispatch[pickle.SETITEMS[0]] = lambda self: self._extend(dict, self.pop_mark())
    dispatch[pickle.ADDITEMS[0]] = lambda self: self._extend(_Set, self.pop_mark())
