"""Dataclasses as nested dicts and back: unions by a field `kind`, types checked, unknown fields refused."""

import dataclasses
import difflib
import types
import typing
from typing import Any

from rdm_jax.runtime.errors import InputError

EXAMPLES = {int: "a whole number", float: "a number", str: "a text", bool: "True or False"}


def to_plain(value: Any) -> Any:
    """A dataclass as a nested dict, whose unions have a field `kind`; tuples and single values as they are."""
    if dataclasses.is_dataclass(value):
        hints = typing.get_type_hints(type(value))
        plain = {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        plain = {k: float(v) if hints[k] is float else v for k, v in plain.items()}
        plain.update(
            {
                k: {"kind": kind_of(type(getattr(value, k))), **plain[k]}
                for k in plain
                if choices(hints[k])
            }
        )
        return plain
    return tuple(map(to_plain, value)) if isinstance(value, (tuple, list)) else value


def choices(hint: Any) -> tuple[type, ...]:
    """The dataclasses of a union, () for any other type."""
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else ()


def kind_of(cls: type) -> str:
    """What a config calls a process or a sampler in its field `kind`."""
    return cls.__name__.lower()


def from_plain(hint: Any, value: Any, path: str) -> Any:
    """The inverse of `to_plain`: `value` as the type `hint`; `path` names it in errors."""
    if dataclasses.is_dataclass(value):
        return value
    if kinds := {kind_of(c): c for c in choices(hint)}:
        value = dict(value)
        kind = value.pop("kind", None)
        if kind not in kinds:
            raise InputError(
                f"{path}.kind={kind!r} is not known; {' or '.join(map(repr, kinds))} would do."
            )
        return from_plain(kinds[kind], value, path)
    if dataclasses.is_dataclass(hint):
        return _dataclassfrom_plain(hint, value, path)
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, (tuple, list)):
            value = (value,)
        item = typing.get_args(hint)[0]
        return tuple(from_plain(item, v, f"{path}[{i}]") for i, v in enumerate(value))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, float) and value.is_integer():  # 1e3 in JSON
        return int(value)
    if type(value) is not hint:
        raise InputError(f"{path}={value!r} is no {hint.__name__}; {EXAMPLES[hint]} would do.")
    return value


def _dataclassfrom_plain(cls: type, value: Any, path: str) -> Any:
    fields = {f.name: typing.get_type_hints(cls)[f.name] for f in dataclasses.fields(cls)}
    if not isinstance(value, dict):
        raise InputError(
            f"{path}={value!r} is a single value; the fields {', '.join(fields)} would do."
        )
    for name in value:
        if name not in fields:
            close = difflib.get_close_matches(name, fields, n=1) or sorted(fields)
            raise InputError(
                f"{path}.{name}={value[name]!r} is not a field of the config; {' or '.join(close)} would do."
            )
    missing = [name for name in fields if name not in value]
    if missing:
        raise InputError(
            f"{path} has no field {missing[0]!r}; adding it, as in configs/default.py, would do."
        )
    kwargs = {k: from_plain(fields[k], v, f"{path}.{k}") for k, v in value.items()}
    return cls(**kwargs)
