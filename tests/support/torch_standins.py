"""Files like the published ones, written without torch: names, calls and bytes as torch 2.13 and
Python's pickler write them.

`write_pkl` and `write_pt` write a network from its tensors' full names. For what a good file never
has there are the parts: `network` (the modules as objects that can be changed), `View` and
  `Storage` (a tensor that says whatever it is told to), `Named`
(any global), and `dump_pkl`, `dump_pt` and `dump_legacy` (any objects into one of the formats).
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
BUFFERS = ("resample_filter", "freqs", "u", "num_batches_tracked")
HOOKS = (
    "_backward_pre_hooks",
    "_backward_hooks",
    "_forward_hooks",
    "_forward_pre_hooks",
    "_state_dict_hooks",
)
ADAM = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0, "amsgrad": False}


@dataclass(frozen=True)
class Named:
    """A global: written by its name, never looked up."""

    module: str
    name: str

    def __call__(self, *_):
        raise AssertionError("only a name")


@dataclass(eq=False)
class Call:
    """A call (REDUCE) of whatever, with whatever."""

    function: Any
    arguments: Any
    state: Any = None


@dataclass(eq=False)
class Storage:
    """Numbers in the order of memory; `numel` is what the file says of their number."""

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
        """A transposed array becomes a transposed tensor; what is no whole array in another order
        is copied."""
        order = sorted(range(array.ndim), key=lambda axis: -array.strides[axis])
        if not array.transpose(order).flags.c_contiguous:
            array, order = np.ascontiguousarray(array), list(range(array.ndim))
        strides = tuple(stride // array.itemsize for stride in array.strides)
        return cls(Storage(array.transpose(order)), 0, array.shape, strides, parameter)


@dataclass(eq=False)
class Module:
    """What torch_utils.persistence writes."""

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
    """torch's own container."""

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


def network(
    class_name: str, settings: dict, tensors: dict[str, np.ndarray], module_src: str = SOURCE
) -> Module:
    """Modules nested as the names say; `enc` and `dec` are torch's ModuleDict, and missing weights
    and biases are None."""
    tree: dict = {}
    for name, array in tensors.items():
        *path, last = name.split(".")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[last] = array

    def build(node: dict, name: str, **more) -> Module | ModuleDict:
        leaves = {key: array for key, array in node.items() if not isinstance(array, dict)}
        parameters = {key: View.of(array) for key, array in leaves.items() if key not in BUFFERS}
        buffers = {key: View.of(array, False) for key, array in leaves.items() if key in BUFFERS}
        if leaves:
            parameters = {"weight": None, "bias": None} | parameters
            buffers = {"resample_filter": None} | buffers
        children = {
            key: build(child, key) for key, child in node.items() if isinstance(child, dict)
        }
        if name in ("enc", "dec"):
            return ModuleDict(state_of({}, {}, children))
        # As the original's blocks keep it: numpy's numbers among the settings of modules inside.
        own = {
            "_init_args": (8, 8),
            "_init_kwargs": {
                "init": {"init_mode": "kaiming_uniform", "init_weight": np.sqrt(1 / 3)}
            },
        }
        title = (
            settings.get("model_type", "DhariwalUNet")
            if name == "model"
            else "UNetBlock"
            if children
            else "Conv2d"
        )
        return Module(
            more.pop("title", title),
            state_of(parameters, buffers, children, **(own | more)),
            module_src,
        )

    return build(tree, "", title=class_name, _init_args=(), _init_kwargs=settings)


class _Pickler(pickle._Pickler):
    """Python's pickler for the objects above; how a storage is written, the formats say."""

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
        if id(obj) not in self.memo:  # equal Nameds are one object here, as functions are
            super().memoize(obj)

    def save(self, obj: Any, save_persistent_id: bool = True):
        super().save(
            _NAMES.setdefault(obj, obj) if isinstance(obj, Named) else obj, save_persistent_id
        )


_NAMES: dict[Named, Named] = {}


@dataclass(eq=False)
class Bytes:
    """A long byte string in parts, which goes to the file without a copy, outside of frames, as
    Python's pickler does it."""

    parts: list


class _PicklePickler(_Pickler):
    """With every storage as bytes in torch's format before zip."""

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
    """With every storage as a persistent id, and collected."""

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
    """Any objects in torch's format before zip; `changed` are bytes in place of some of its five
    pickles, by number."""
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
    """What a module's `state_dict()` is."""
    state = OrderedDict((name, View.of(array, parameter=False)) for name, array in tensors.items())
    state._metadata = OrderedDict({"": {"version": 1}, "conv": {"version": 2}})
    return state


def dump_pkl(path: Path, objects: Any, protocol: int = 4) -> None:
    """Any objects as a pickle with embedded storages."""
    with open(path, "wb") as file:
        _PicklePickler(file, protocol).dump(objects)


def dump_pt(path: Path, objects: Any, pickled: bytes | None = None, root: str = "archive") -> None:
    """Any objects in torch's zip format; `pickled` is written in place of their pickle."""
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


def write_pkl(
    path: Path,
    class_name: str,
    settings: dict,
    tensors: dict[str, np.ndarray],
    *,
    protocol: int = 4,
    module_src: str = SOURCE,
    key: str = "ema",
    **extra,
) -> None:
    """A snapshot as EDM's training writes it; `extra` are more entries of its dict."""
    loss = Module(
        "EDMLoss",
        {"P_mean": -1.2, "P_std": 1.2, "sigma_data": 0.5, "_init_args": (), "_init_kwargs": {}},
        module_src,
    )
    objects = {
        key: network(class_name, settings, tensors, module_src),
        "loss_fn": loss,
        "augment_pipe": None,
    }
    dump_pkl(
        path,
        objects | {"dataset_kwargs": {"path": "data.zip", "use_labels": True}} | extra,
        protocol,
    )


def write_pt(
    path: Path,
    class_name: str,
    settings: dict,
    tensors: dict[str, np.ndarray],
    *,
    module_src: str = SOURCE,
    key: str = "ema",
    dump: Callable[[Path, Any], None] = dump_pt,
    **extra,
) -> None:
    """A training state as RDM's training writes it; `extra` are more entries of its dict, such as
    `net` (`network`).

    With `dump=dump_legacy` as an old torch, or `_use_new_zipfile_serialization=False`, writes it.
    """
    adam = {
        0: {
            "step": View.of(np.float32(5), False),
            "exp_avg": View.of(np.zeros(4, np.float32), False),
        }
    }
    optimizer = {"state": adam, "param_groups": [ADAM | {"params": [0]}]}
    dump(
        path,
        {
            key: network(class_name, settings, tensors, module_src),
            "optimizer_state": optimizer,
            "step": 5,
        }
        | extra,
    )


FOUR = np.arange(4, dtype=np.float32)
SETTINGS = {
    "img_resolution": 64,
    "label_dim": 1000,
    "model_type": "DhariwalUNet",
    "sigma_max": float("inf"),
    "sigma_data": np.float64(0.5),
    "levels": np.int64(-3),
    "fast": np.bool_(True),
    "attn_resolutions": [32, 16, 8],
    "nested": {"a": (1, None, True, 2.5), "b": []},
}
WRITERS = {"pkl": write_pkl, "pt": write_pt}
DUMPS = {"pkl": dump_pkl, "pt": dump_pt}
