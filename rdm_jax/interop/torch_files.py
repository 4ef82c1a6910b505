"""Settings and tensors from PyTorch's files, which are not trusted.

These are EDM's snapshots (.pkl), the training states of RDM (.pt) and JiT (.pth), and state_dicts.
"""

import io
import os
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from rdm_jax.interop.byte_reader import ByteReader, Refused, Region, quoted
from rdm_jax.interop.inert_pickle import ModuleDict, Namespace, Persistent, Unpickler, describe
from rdm_jax.interop.torch_tensors import (
    MAGIC,
    OpenFile,
    Storage,
    Tensor,
    embedded_storage,
    input_error,
    named_tensor,
    open_file,
    open_sequential,
    open_zip,
)

# Far more than any published network has. Objects in a file may be shared, so that a small file can
# describe a huge network.
MAX_PARTS = 20_000  # modules and tensors, or values among the settings
MAX_DEPTH = 32
MAX_NAME = 100

# Of JiT's networks: the class whose `state_dict()` a training state has. The file does not name it.
DENOISER = "Denoiser"


@dataclass(frozen=True, eq=False)
class Original:
    """One network of a file.

    Attributes:
      class_name: of the outermost module, such as 'EDMPrecond' or 'Denoiser'.
      settings: the keyword arguments of its constructor, for JiT the arguments of the training
        command, as plain dicts, lists, tuples, strings and numbers.
      tensors: all parameters and buffers by full name, such as 'model.enc.64x64_conv.weight'.
    """

    class_name: str
    settings: dict[str, Any]
    tensors: dict[str, Tensor]


@contextmanager
def open_torch(path: str | os.PathLike, key: str | None = None) -> Iterator[Original]:
    """Opens a published file; its kind is recognised by content.

    Nothing in the file is run or imported (`rdm_jax.interop.inert_pickle`). Numbers are loaded by
    `Tensor.read` only, while the context is open; that all of them exist and do not overlap is
    checked at once.

    Args:
      path: an EDM snapshot, which is a pickle, or a training state of RDM or JiT in torch's zip
        format or the one before it.
      key: of the network in the file; None for 'ema', or for 'model_ema1' in JiT's. RDM's training
        states also have 'net', JiT's 'model_ema2' and 'model'.

    Raises:
      InputError: the file cannot be read, is damaged, or contains anything that a network does not.
    """
    fix = "Use EDM's snapshot (.pkl), or RDM's or JiT's training state (.pt, .pth), as published."
    with _opened(path, fix, lambda source, opened: _network(source, opened, key)) as original:
        yield original


@contextmanager
def open_state_dict(path: str | os.PathLike) -> Iterator[dict[str, Tensor]]:
    """Opens a file of named tensors and nothing else, with the same care as `open_torch`.

    Tensors may share numbers here, like tied weights, if all together are not larger than the file.

    Args:
      path: a state_dict as `torch.save` writes it, in torch's zip format or the one before it.

    Raises:
      InputError: the file cannot be read, is damaged, or contains anything that a state_dict does
        not.
    """
    with _opened(path, "Use a state_dict as torch.save writes it.", _state_dict) as tensors:
        yield tensors


@contextmanager
def _opened(
    path: str | os.PathLike, fix: str, parse: Callable[[OpenFile, ExitStack], Any]
) -> Iterator[Any]:
    path = os.fspath(path)
    with ExitStack() as opened:
        try:
            found = parse(OpenFile(path, fix, open_file(path, opened)), opened)
        except Exception as error:
            raise input_error(path, fix, error) from error
        yield found


def _whole(file: io.BufferedIOBase) -> Region:
    return Region(file, 0, os.fstat(file.fileno()).st_size)


def _is_zip(file: io.BufferedIOBase) -> bool:
    """Whether it is a zip file; otherwise it begins like a pickle. Raises Refused for any other."""
    magic = file.read(4)
    if magic != b"PK\x03\x04" and magic[:1] != b"\x80":
        raise Refused("it is neither a pickle nor a zip file")
    return magic == b"PK\x03\x04"


def _network(source: OpenFile, opened: ExitStack, key: str | None) -> Original:
    if _is_zip(source.file):
        graph, find = open_zip(source.file, opened)
    else:
        graph = Unpickler(ByteReader(_whole(source.file))).load()
        find = embedded_storage
        if type(graph) is int and graph == MAGIC:
            graph, find = open_sequential(_whole(source.file))
    if type(graph) is not dict:
        raise Refused(f"it holds {describe(graph)} instead of a dict of networks")
    if type(graph.get("args")) is Namespace:
        return _denoiser(graph, key or "model_ema1", find, source)
    key = key or "ema"
    network = _entry(graph, key)
    if type(network) is not Persistent:
        raise Refused(f"its {key!r} is {describe(network)} instead of a network")
    class_name, state = _class_and_state(network, key)
    arguments, settings = state.get("_init_args"), state.get("_init_kwargs")
    if type(arguments) not in (tuple, list) or arguments or type(settings) is not dict:
        raise Refused(f"its {key!r} does not have all its settings as keyword arguments")
    return Original(class_name, _Plain()(settings), _tensors(network, find, source))


def _entry(graph: dict, key: str) -> Any:
    """One of the networks. Raises Refused, which lists the entries that there are."""
    if key not in graph:
        names = [quoted(name) for name in graph if type(name) is str][:20]
        raise Refused(
            f"it has no {key!r}, only {', '.join(names) or 'nothing'}",
            "Use a file with it, or one of these as --weights_key.",
        )
    return graph[key]


def _denoiser(graph: dict, key: str, find: Callable[[Any], Storage], source: OpenFile) -> Original:
    """A state_dict of JiT's training state, with the arguments of the training command."""
    state = _entry(graph, key)
    if type(state) is not dict:
        raise Refused(f"its {key!r} is {describe(state)} instead of a state_dict")
    settings = _Plain()(graph["args"].state or {})
    return Original(DENOISER, settings, _named_tensors(state, find, source))


def _state_dict(source: OpenFile, opened: ExitStack) -> dict[str, Tensor]:
    if _is_zip(source.file):
        graph, find = open_zip(source.file, opened)
    else:
        graph, find = open_sequential(_whole(source.file))
    return _named_tensors(graph, find, source)


def _named_tensors(
    graph: Any, find: Callable[[Any], Storage], source: OpenFile
) -> dict[str, Tensor]:
    """The tensors of a state_dict, which all together must not be larger than the file."""
    size = _whole(source.file).length
    if type(graph) is not dict or len(graph) > MAX_PARTS:
        raise Refused(f"it holds {describe(graph)}, not a dict of up to {MAX_PARTS} tensors")
    for name in graph:
        if type(name) is not str:
            raise Refused(f"it has a tensor with {describe(name)} as its name")
    tensors = {name: named_tensor(name, view, find, source) for name, view in graph.items()}
    total = sum(tensor.nbytes for tensor in tensors.values())
    if total > size:
        raise Refused(f"its tensors have {total} bytes in all, in a file of {size} bytes")
    return tensors


def _class_and_state(module: Any, name: str) -> tuple[str, dict[Any, Any]]:
    if type(module) is ModuleDict and type(module.state) is dict:
        return "ModuleDict", module.state
    meta = module.meta if type(module) is Persistent else {}
    kind, class_name, state = meta.get("type"), meta.get("class_name"), meta.get("state")
    is_class = type(kind) is str and kind == "class" and type(class_name) is str
    if not is_class or type(state) is not dict:
        raise Refused(
            f"its module {quoted(name)} is {describe(module)}, not a module as "
            "torch_utils.persistence writes it"
        )
    return class_name, state


def _tensors(network: Any, find: Callable[[Any], Storage], source: OpenFile) -> dict[str, Tensor]:
    """All tensors of a network by full name, without recursion; each module must occur once."""
    tensors: dict[str, Tensor] = {}
    used: dict[Hashable, list[tuple[int, int, str]]] = {}
    waiting: list[tuple[str, Any, int]] = [("", network, 0)]
    met: set[int] = set()
    parts = 0
    while waiting:
        prefix, module, depth = waiting.pop()
        # This ends cycles, and small files that describe exponentially many modules.
        if id(module) in met:
            raise Refused(f"its module {quoted(prefix[:-1])} is in it twice")
        met.add(id(module))
        _, state = _class_and_state(module, prefix[:-1])
        found = {
            part: _children(state, part, prefix) for part in ("_parameters", "_buffers", "_modules")
        }
        parts += 1 + sum(len(state[part]) for part in found)  # those that are None included
        if parts > MAX_PARTS or depth > MAX_DEPTH:
            raise Refused(
                f"it has more than {MAX_PARTS} modules and tensors, or more than {MAX_DEPTH} "
                "nested ones"
            )
        for name, view in [*found["_parameters"].items(), *found["_buffers"].items()]:
            full = prefix + name
            if full in tensors:
                raise Refused(f"it has two tensors {quoted(full)}")
            tensors[full] = tensor = named_tensor(full, view, find, source)
            place, start, end = tensor.span
            if start < end:
                used.setdefault(place, []).append((start, end, full))
        waiting.extend(
            (f"{prefix}{name}.", child, depth + 1)
            for name, child in reversed(found["_modules"].items())
        )
    _check_overlap(used)
    return tensors


def _check_overlap(used: dict[Hashable, list[tuple[int, int, str]]]) -> None:
    """Raises Refused if two tensors share elements; `used` has (start, end, name) by storage."""
    for spans in used.values():
        spans.sort()
        for (_, end, one), (start, _, other) in zip(spans, spans[1:], strict=False):
            if start < end:
                raise Refused(
                    f"its tensors {quoted(one)} and {quoted(other)} overlap in one storage"
                )


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


class _Plain:
    """Copies settings; refuses foreign values, and too many.

    The number is bounded, as values may be shared or contain themselves.
    """

    def __init__(self):
        self._left = MAX_PARTS

    def __call__(self, value: Any, depth: int = 0) -> Any:
        self._left -= 1
        if self._left < 0 or depth > MAX_DEPTH:
            raise Refused(
                f"it has more than {MAX_PARTS} settings, or more than {MAX_DEPTH} nested ones"
            )
        if type(value) in (list, tuple):
            return type(value)([self(item, depth + 1) for item in value])
        if type(value) is dict:
            if any(type(name) is not str for name in value):
                raise Refused("it has settings with names that are not strings")
            return {name: self(item, depth + 1) for name, item in value.items()}
        if type(value) not in (str, int, float, bool, type(None)):
            raise Refused(f"it has {describe(value)} among its settings")
        return value
