"""Files in the formats of torch 2.13 and Python's pickler, written without torch.

For what a good file never has there are parts: `View` and `Storage` (a tensor with any claims),
`Module`, `ModuleDict` and `Named` (any global), and `dump_pkl`, `dump_pt` and `dump_legacy`, which
write any objects in one of the formats. Files of good networks: `tests.support.published_files`.
"""

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

SOURCE = (
    '"""Stands in for the source of networks.py, which the original runs."""\nimport torch\n' * 20
)
KINDS = {
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "float64": "DoubleStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
    "int32": "IntStorage",
    "int16": "ShortStorage",
    "int8": "CharStorage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
}
HOOKS = ("_backward_pre_hooks", "_backward_hooks", "_forward_hooks", "_forward_pre_hooks")
HOOKS += ("_state_dict_hooks",)


@dataclass(frozen=True)
class Named:
    """A global, written by its name and never looked up."""

    module: str
    name: str

    def __call__(self, *_):
        raise AssertionError("only a name")


@dataclass(eq=False)
class Call:
    """A call (REDUCE) of anything, with anything."""

    function: Any
    arguments: Any
    state: Any = None


@dataclass(eq=False)
class Storage:
    """Numbers in memory order; `numel` is their number according to the file."""

    array: np.ndarray
    numel: Any = None
    key: Any = None

    def __post_init__(self):
        self.array = np.ascontiguousarray(self.array).reshape(-1)
        self.numel = self.array.size if self.numel is None else self.numel

    @property
    def kind(self) -> Named:
        return Named("torch", KINDS[self.array.dtype.name])

    @property
    def data(self) -> memoryview:
        return self.array.view(np.uint8).data


@dataclass(eq=False)
class View:
    """A tensor."""

    storage: Any
    offset: Any
    size: Any
    stride: Any
    parameter: bool = True

    @classmethod
    def of(cls, array: np.ndarray, parameter: bool = True) -> "View":
        """A transposed array becomes a transposed tensor; other strided arrays are copied."""
        order = sorted(range(array.ndim), key=lambda axis: -array.strides[axis])
        if not array.transpose(order).flags.c_contiguous:
            array, order = np.ascontiguousarray(array), list(range(array.ndim))
        strides = tuple(stride // array.itemsize for stride in array.strides)
        return cls(Storage(array.transpose(order)), 0, array.shape, strides, parameter)


@dataclass(eq=False)
class Module:
    """A module as torch_utils.persistence writes it."""

    class_name: Any
    state: Any
    source: str = SOURCE
    meta: dict = field(default_factory=dict)

    def __post_init__(self):
        self.meta = {
            "type": "class",
            "version": 6,
            "module_src": self.source,
            "class_name": self.class_name,
            "state": self.state,
        }


@dataclass(eq=False)
class ModuleDict:
    """torch's container of modules."""

    state: Any


def state_of(parameters: dict, buffers: dict, modules: dict, **more) -> dict:
    """A module's __dict__."""
    hooks = {name: OrderedDict() for name in HOOKS}
    state = {
        "training": False,
        "_parameters": parameters,
        "_buffers": buffers,
        "_non_persistent_buffers_set": set(),
    }
    return state | hooks | {"_modules": modules, "_is_full_backward_hook": None} | more


class _Pickler(pickle._Pickler):
    """Python's pickler for the objects above; subclasses write storages."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_named(self, named: Named):
        if self.proto >= 4:
            self.save(named.module)
            self.save(named.name)
            self.write(pickle.STACK_GLOBAL)
        else:
            self.write(pickle.GLOBAL + f"{named.module}\n{named.name}\n".encode())
        self.memoize(named)

    def save_call(self, call: Call):
        self.save(call.function)
        self.save(call.arguments)
        self.write(pickle.REDUCE)
        self.memoize(call)
        if call.state is not None:
            self.save(call.state)
            self.write(pickle.BUILD)

    def save_module(self, module: Module):
        self.save_reduce(
            Named("torch_utils.persistence", "_reconstruct_persistent_obj"),
            (module.meta,),
            obj=module,
        )

    def save_module_dict(self, module: ModuleDict):
        self.save(Named("torch.nn.modules.container", "ModuleDict"))
        self.save(())
        self.write(pickle.NEWOBJ)
        self.memoize(module)
        self.save(module.state)
        self.write(pickle.BUILD)

    def save_view(self, view: View):
        arguments = (view.storage, view.offset, view.size, view.stride, False, OrderedDict())
        if not view.parameter:
            return self.save_reduce(
                Named("torch._utils", "_rebuild_tensor_v2"), arguments, obj=view
            )
        tensor = Call(Named("torch._utils", "_rebuild_tensor_v2"), arguments)
        self.save_reduce(
            Named("torch._utils", "_rebuild_parameter"), (tensor, False, OrderedDict()), obj=view
        )

    dispatch |= {
        Named: save_named,
        Call: save_call,
        Module: save_module,
        ModuleDict: save_module_dict,
        View: save_view,
    }

    def memoize(self, obj: Any):
        if id(obj) not in self.memo:  # equal names are one object, like functions
            super().memoize(obj)

    def save(self, obj: Any, save_persistent_id: bool = True):
        super().save(
            _NAMES.setdefault(obj, obj) if isinstance(obj, Named) else obj, save_persistent_id
        )


_NAMES: dict[Named, Named] = {}


@dataclass(eq=False)
class Bytes:
    """A long byte string in parts, written without a copy and outside of frames."""

    parts: list


class _PicklePickler(_Pickler):
    """Writes every storage as bytes in torch's format before zip."""

    dispatch = dict(_Pickler.dispatch)

    def save_storage(self, storage: Storage):
        self.save_reduce(
            Named("torch.storage", "_load_from_bytes"),
            (Bytes([legacy_header(storage), storage.data]),),
            obj=storage,
        )

    def save_bytes_in_parts(self, data: Bytes):
        length = sum(len(part) for part in data.parts)
        if length < 2**16:
            start = (
                pickle.SHORT_BINBYTES + bytes([length])
                if length < 256
                else pickle.BINBYTES + struct.pack("<I", length)
            )
            self.write(start + b"".join(data.parts))
        else:
            short = length < 2**32
            start = (
                pickle.BINBYTES + struct.pack("<I", length)
                if short
                else pickle.BINBYTES8 + struct.pack("<Q", length)
            )
            for part in (start, *data.parts):
                self._write_large_bytes(b"", part)
        self.memoize(data)

    dispatch |= {Storage: save_storage, Bytes: save_bytes_in_parts}


class _ZipPickler(_Pickler):
    """Writes every storage as a persistent id, and collects it."""

    def __init__(
        self,
        file,
        view_metadata: tuple = (),
        kinds: Callable[[Storage], Any] = lambda storage: storage.kind,
    ):
        super().__init__(file, 2)
        self.storages, self.view_metadata, self.kinds = [], view_metadata, kinds

    def persistent_id(self, obj: Any):
        if not isinstance(obj, Storage):
            return None
        if not any(obj is storage for storage in self.storages):
            self.storages.append(obj)
            obj.key = str(len(self.storages) - 1) if obj.key is None else obj.key
        return ("storage", self.kinds(obj), obj.key, "cpu", obj.numel, *self.view_metadata)


_BEFORE_LEGACY = (
    0x1950A86A20F9469CFC6C,
    1001,
    {
        "protocol_version": 1001,
        "little_endian": True,
        "type_sizes": {"short": 2, "int": 4, "long": 4},
    },
)


def legacy_header(storage: Storage) -> bytes:
    """What precedes the numbers in torch's format before zip."""
    storage.key = storage.key or "93884253521904"
    stream = io.BytesIO()
    _ZipPickler(stream, view_metadata=(None,)).dump(storage)
    before = b"".join(pickle.dumps(value, 2) for value in _BEFORE_LEGACY)
    return (
        before
        + stream.getvalue()
        + pickle.dumps([storage.key], 2)
        + struct.pack("<q", storage.array.size)
    )


def dump_legacy(path: Path, objects: Any, changed: dict[int, bytes] | None = None) -> None:
    """Any objects in torch's format before zip; `changed` replaces some of its five pickles."""
    stream = io.BytesIO()
    pickler = _ZipPickler(stream, view_metadata=(None,))
    pickler.dump(objects)
    storages = sorted(pickler.storages, key=lambda storage: storage.key)
    keys = pickle.dumps([storage.key for storage in storages], 2)
    pickles = [pickle.dumps(value, 2) for value in _BEFORE_LEGACY] + [stream.getvalue(), keys]
    with open(path, "wb") as file:
        file.write(
            b"".join((changed or {}).get(number, pickled) for number, pickled in enumerate(pickles))
        )
        for storage in storages:
            file.write(struct.pack("<q", storage.array.size))
            file.write(storage.data)


def state_dict(tensors: dict[str, np.ndarray]) -> OrderedDict:
    """The `state_dict()` of a module."""
    state = OrderedDict((name, View.of(array, parameter=False)) for name, array in tensors.items())
    state._metadata = OrderedDict({"": {"version": 1}, "conv": {"version": 2}})
    return state


def dump_pkl(path: Path, objects: Any, protocol: int = 4) -> None:
    """Any objects as a pickle with embedded storages."""
    with open(path, "wb") as file:
        _PicklePickler(file, protocol).dump(objects)


def dump_pt(path: Path, objects: Any, pickled: bytes | None = None, root: str = "archive") -> None:
    """Any objects in torch's zip format; `pickled` replaces their pickle."""
    stream = io.BytesIO()
    pickler = _ZipPickler(stream)
    pickler.dump(objects)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{root}/data.pkl", stream.getvalue() if pickled is None else pickled)
        archive.writestr(f"{root}/byteorder", "little")
        for storage in pickler.storages:
            member = zipfile.ZipInfo(f"{root}/data/{storage.key}")
            with archive.open(member, "w", force_zip64=storage.array.nbytes > 2**31) as file:
                file.write(storage.data)
        archive.writestr(f"{root}/version", "3\n")
