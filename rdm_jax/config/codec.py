"""Dataclasses as nested dicts and back.

Unions have a field `kind`, types are checked, unknown fields refused.
"""

import dataclasses
import difflib
import functools
import operator
import re
import types
import typing
from collections.abc import Callable
from typing import Any

from rdm_jax.runtime.errors import InputError

TEXT_OR_NUMBER = str | float  # a text in configs, where a number may stand for its text
TYPES = {int: "a whole number", float: "a number", str: "a text", bool: "True or False"}


def to_plain(value: Any) -> Any:
    """A dataclass as a nested dict; tuples of plain values, and single values as they are.

    Where a field is of a union type, its dict has the field `kind`.
    """
    if isinstance(value, tuple | list):
        return tuple(map(to_plain, value))
    if not dataclasses.is_dataclass(value):
        return value
    plain: dict[str, Any] = {}
    for name, hint in field_types(type(value)).items():
        part = getattr(value, name)
        plain[name] = to_plain(part)
        if hint is float:
            plain[name] = float(part)
        if hint == TEXT_OR_NUMBER:
            plain[name] = str(part)
        if choices(hint):
            plain[name] = _with_kind(part)
        elif choices(item_type(hint)):
            plain[name] = tuple(map(_with_kind, part))
    return plain


def _with_kind(value: Any) -> dict[str, Any]:
    return {"kind": kind_of(type(value)), **to_plain(value)}


def choices(hint: Any) -> tuple[type, ...]:
    """The dataclasses of a union; () for any other type."""
    if hint == TEXT_OR_NUMBER or not isinstance(hint, types.UnionType):
        return ()
    return typing.get_args(hint)


def item_type(hint: Any) -> Any:
    """The type of the items of `tuple[item, ...]`; None for any other type."""
    return typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else None


def kind_of(cls: type) -> str:
    """A class's `kind` in configs: its name in lower case, without its generic suffix.

    `RelayProcess` is 'relay', `EDMPreconditioning` 'edm', `RelayHeun` 'relayheun'.
    """
    return re.sub("(process|preconditioning)$", "", cls.__name__.lower())


def kinds(
    *classes: type,
    default: Any,
    listed: type | None = None,
    shorthand: Callable[[Any], Any] | None = None,
) -> Any:
    """A dataclass field that holds an instance of one of these dataclasses, by their `kind`.

    Args:
      classes: the dataclasses.
      default: of the field.
      listed: the protocol of the items if the field holds a tuple of any number of them.
      shorthand: from a short form of a value, as users write it, to the full one; any other value
        stays as it is.
    """
    metadata = {"kinds": list(classes), "listed": listed, "shorthand": shorthand}
    return dataclasses.field(default=default, metadata=metadata)


def add_kind(owner: type, field: str, cls: type) -> None:
    """Adds a dataclass to those of a `kinds` field.

    A class of the same module and name is replaced: it is the same definition, executed again, as
    when a config file is loaded twice or a notebook's cell is run again.

    Raises:
      ValueError: the field has no kinds, `cls` is not a dataclass or lacks a method of the field's
        protocol, or its kind is taken.
    """
    fields = {each.name: each for each in dataclasses.fields(owner)}
    known = fields[field].metadata.get("kinds") if field in fields else None
    if known is None or not dataclasses.is_dataclass(cls):
        raise ValueError(f"{owner.__name__}.{field} cannot be extended with {cls!r}")
    earlier = next((each for each in known if kind_of(each) == kind_of(cls)), None)
    if earlier and (earlier.__module__, earlier.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ValueError(f"{owner.__name__}.{field} already has the kind {kind_of(cls)!r}")
    protocol = fields[field].metadata["listed"] or typing.get_type_hints(owner)[field]
    missing = [name for name in vars(protocol) if name[0] != "_" and not hasattr(cls, name)]
    if missing:
        raise ValueError(f"{cls.__name__} has no {', '.join(missing)}, as {protocol.__name__} does")
    known[:] = [each for each in known if each is not earlier] + [cls]


def field_types(cls: type) -> dict[str, Any]:
    """The types of a dataclass's fields, by their names; of `kinds` fields the union, or a tuple of
    it."""
    hints = _hints(cls)
    types_by_name = {}
    for field in dataclasses.fields(cls):
        union = field.metadata.get("kinds")
        hint: Any = hints[field.name]
        if union:
            either: Any = functools.reduce(operator.or_, union)
            hint = tuple[either, ...] if field.metadata["listed"] else either
        types_by_name[field.name] = hint
    return types_by_name


# A config is read many times, and evaluating annotations takes most of the time.
_hints = functools.cache(typing.get_type_hints)


def from_plain(hint: Any, value: Any, path: str) -> Any:
    """The inverse of `to_plain`: `value` as the type `hint`; `path` names it in errors.

    Raises:
      InputError: a field is missing, unknown or of the wrong type, or a kind is unknown.
    """
    if dataclasses.is_dataclass(value):
        return value
    if kinds := {kind_of(cls): cls for cls in choices(hint)}:
        return _union_from_plain(kinds, value, path)
    if dataclasses.is_dataclass(hint):
        return _dataclass_from_plain(hint, value, path)
    if typing.get_origin(hint) is tuple:
        items = value if isinstance(value, tuple | list) else (value,)
        item = item_type(hint)
        if choices(item):
            items = [_with_defaults(choices(item), v) for v in items]
        return tuple(from_plain(item, v, f"{path}[{i}]") for i, v in enumerate(items))
    if hint == TEXT_OR_NUMBER:
        hint, value = str, str(value) if type(value) in (int, float) else value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, float) and value.is_integer():  # 1e3 in JSON
        return int(value)
    if type(value) is not hint:
        example = f", such as {str(value)!r}" if hint is str else ""
        raise InputError(f"{path}={value!r} is not {TYPES[hint]}", f"Use {TYPES[hint]}{example}.")
    return value


def _with_defaults(classes: tuple[type, ...], value: Any) -> Any:
    """An item of a list, which no section has complete, with the defaults of missing fields."""
    cls = next(
        (c for c in classes if isinstance(value, dict) and value.get("kind") == kind_of(c)), None
    )
    return value if cls is None else {**to_plain(cls()), **value}


def _union_from_plain(kinds: dict[str, type], value: Any, path: str) -> Any:
    if not isinstance(value, dict):
        raise InputError(
            f"{path}={value!r} is a single value",
            f"Use a dict of fields with the kind {' or '.join(map(repr, kinds))}.",
        )
    fields = dict(value)
    kind = fields.pop("kind", None)
    if kind not in kinds:
        raise InputError(
            f"{path}.kind={kind!r} is not known",
            f"Use {' or '.join(map(repr, kinds))}, or import the module that adds the kind with "
            "rdm_jax.config.extend (for a command: pass this file as --config).",
        )
    return from_plain(kinds[kind], fields, path)


def _dataclass_from_plain(cls: Any, value: Any, path: str) -> Any:
    hints = field_types(cls)
    if not isinstance(value, dict):
        raise InputError(
            f"{path}={value!r} is a single value", f"Use a dict of the fields {', '.join(hints)}."
        )
    for name in value:
        if name not in hints:
            close = difflib.get_close_matches(name, hints, n=1) or sorted(hints)
            raise InputError(
                f"{path}.{name}={value[name]!r} is not a field of the config",
                f"Use {' or '.join(close)}.",
            )
    missing = [name for name in hints if name not in value]
    if missing:
        raise InputError(
            f"{path} has no field {missing[0]!r}", "Add the field, as in configs/default.py."
        )
    for field in dataclasses.fields(cls):
        if shorthand := field.metadata.get("shorthand"):
            value = {**value, field.name: shorthand(value[field.name])}
    return cls(**{name: from_plain(hints[name], v, f"{path}.{name}") for name, v in value.items()})
