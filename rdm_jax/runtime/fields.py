"""Bounds of dataclass fields: declared at the field, checked and documented from there.

    @dataclasses.dataclass(frozen=True)
    class Training:
        batch_size: int = at_least(1, default=256)

`check_bounds` refuses values outside of the bounds, `bounds_of` returns them for documentation.
"""

import dataclasses
import math
from collections.abc import Callable, Collection
from typing import Any

from rdm_jax.runtime.errors import InputError


@dataclasses.dataclass(frozen=True)
class Bounds:
    """The values that a field may have.

    Attributes:
      text: the values in words, such as 'at least 1'; also `str(bounds)`.
      allows: whether a value is one of them.
    """

    text: str
    allows: Callable[[Any], bool]

    def __str__(self) -> str:
        return self.text


def bounded(bounds: Bounds, default: Any) -> Any:
    """A dataclass field with bounds."""
    return dataclasses.field(default=default, metadata={"bounds": bounds})


def positive(*, default: Any) -> Any:
    """A field above 0, and finite."""
    return bounded(Bounds("a positive number", lambda value: 0 < value < math.inf), default)


def at_least(least: float | int, *, default: Any) -> Any:
    """A field of `least` or more, and finite."""
    return bounded(Bounds(f"{least:g} or more", lambda value: least <= value < math.inf), default)


def between(least: float | int, most: float | int, *, default: Any) -> Any:
    """A field from `least` to `most`, both included."""
    bounds = Bounds(f"a number from {least:.10g} to {most:.10g}", lambda v: least <= v <= most)
    return bounded(bounds, default)


def below(most: float | int, *, least: float | int = 0, default: Any) -> Any:
    """A field from `least`, included, to `most`, excluded."""
    bounds = Bounds(f"a number from {least:g} to below {most:g}", lambda v: least <= v < most)
    return bounded(bounds, default)


def inside(least: float | int, most: float | int, *, default: Any) -> Any:
    """A field between `least` and `most`, both excluded."""
    bounds = Bounds(f"a number above {least:g} and below {most:g}", lambda v: least < v < most)
    return bounded(bounds, default)


def one_of(*values: Any, default: Any) -> Any:
    """A field with one of these values."""
    return bounded(Bounds(" or ".join(map(repr, values)), lambda v: v in values), default)


def all_positive(*, default: tuple[int, ...]) -> Any:
    """A tuple of one or more positive numbers."""
    bounds = Bounds("one or more positive numbers", lambda v: len(v) > 0 and min(v) > 0)
    return bounded(bounds, default)


def bounds_of(cls: type) -> dict[str, Bounds]:
    """The bounds of a dataclass's fields, by their names; fields without bounds are left out."""
    return {
        field.name: field.metadata["bounds"]
        for field in dataclasses.fields(cls)
        if "bounds" in field.metadata
    }


def check_bounds(value: Any, path: str, *, skip: Collection[str] = ()) -> None:
    """Checks all fields of a dataclass, and of the dataclasses in it, against their bounds.

    Args:
      value: an instance of a dataclass.
      path: of `value` in the config, such as 'config.stage1.training'; names the field in errors.
      skip: names of fields of `value` that are not checked.

    Raises:
      InputError: a field has a value outside of its bounds.
    """
    for field in dataclasses.fields(value):
        name, bounds = field.name, field.metadata.get("bounds")
        if name in skip:
            continue
        part = getattr(value, name)
        if bounds is not None and not bounds.allows(part):
            raise InputError(f"{path}.{name}={part!r} cannot be used", f"Use {bounds}.")
        if dataclasses.is_dataclass(part):
            check_bounds(part, f"{path}.{name}")
        for i, item in enumerate(part if isinstance(part, tuple) else ()):
            if dataclasses.is_dataclass(item):
                check_bounds(item, f"{path}.{name}[{i}]")
