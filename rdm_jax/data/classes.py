"""Classes of image sets and networks, matched by name.

Only imported weights know their classes by index alone; nothing else is matched by index.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.ranges import parse_list, range_ends

SHOWN = 5  # names in a message
LABEL_RULES = ("balanced", "random")  # values of sampling.labels besides a list


@dataclasses.dataclass(frozen=True)
class Classes:
    """The classes of a set of images or of a network.

    Attributes:
      names: in the order of their indices; () for none.
      by_number: whether only the indices are known, as of imported weights. The names are then
        '0', '1', ...
    """

    names: tuple[str, ...] = ()
    by_number: bool = False

    def __len__(self) -> int:
        return len(self.names)

    def __str__(self) -> str:
        if not self.names:
            return "none"
        more = ", ..." if len(self) > SHOWN else ""
        known = f"{', '.join(self.names[:SHOWN])}{more} ({len(self)})"
        return f"{known}, known by index only" if self.by_number else known


def of_checkpoint(about: Mapping[str, Any]) -> Classes:
    """The classes that a checkpoint's network was trained on, from the checkpoint's metadata."""
    return Classes(tuple(about["classes"]), by_number="imported" in about)


def matched(theirs: Classes, ours: Classes) -> tuple[int, ...] | None:
    """For each of their classes its index among ours; None if theirs are not a subset of ours.

    Names decide. If one side knows indices only, and both have the same number of classes, the
    order decides; unless a name of the other side is a number, which is ambiguous.
    """
    number = {name: index for index, name in enumerate(ours.names)}
    by_name = None
    if number.keys() >= set(theirs.names):
        by_name = tuple(number[name] for name in theirs.names)
    if not (theirs.by_number or ours.by_number):
        return by_name
    if by_name is not None and (len(theirs) == len(ours) or not theirs.by_number):
        return by_name
    named = ours if theirs.by_number else theirs
    is_unambiguous = not any(name.isdecimal() for name in named.names)
    return tuple(range(len(ours))) if len(theirs) == len(ours) and is_unambiguous else None


def parse_labels(text: str, classes: Classes, field: str) -> tuple[int, ...]:
    """The indices of the classes that a list names, in its order, with repetition.

    A part that is the name of a class means that class. Any other number, or range of numbers,
    means the classes with these indices, if no class has a number as its name.

    Args:
      text: such as '3', 'cat, dog' or '0,2-5'.
      field: the field or flag, for errors.

    Raises:
      InputError: a part is neither the name nor the index of a class, or is ambiguous.
    """
    number = {name: index for index, name in enumerate(classes.names)}
    called_by_numbers = any(name.isdecimal() for name in classes.names)
    found: list[int] = []
    for part in parse_list(text, field):
        if part in number:
            found.append(number[part])
            continue
        ends = range_ends(part)
        if ends is None:
            raise _refused(text, part, classes, field)
        width = len(ends[0]) if len(ends[0]) == len(ends[1]) else 0  # '01-10'
        for wanted in range(int(ends[0]), int(ends[1]) + 1):
            name = f"{wanted:0{width}d}"
            if name in number:
                found.append(number[name])
            elif not called_by_numbers and wanted < len(classes):
                found.append(wanted)
            else:
                raise _refused(text, name, classes, field)
    return tuple(found)


def _refused(text: str, part: str, classes: Classes, field: str) -> InputError:
    if not classes.names:
        return InputError(
            f"{field}={text!r} names classes, but the data has none", f"Set {field}='balanced'."
        )
    close = difflib.get_close_matches(part, classes.names, n=1)
    names = f"{close[0]!r}, or another of the names {classes}" if close else f"the names {classes}"
    if not any(name.isdecimal() for name in classes.names):
        return InputError(
            f"{field}={text!r}: there is no class {part!r}",
            f"Use {names}, or indices from 0 to {len(classes) - 1}.",
        )
    if part.isdecimal() and int(part) < len(classes):
        return InputError(
            f"{field}={text!r} is ambiguous: there is no class called {part!r}, and the class with "
            f"index {part} is called {classes.names[int(part)]!r}",
            f"Use {names}.",
        )
    return InputError(f"{field}={text!r}: there is no class called {part!r}", f"Use {names}.")


def table(classes: Classes, numbers: tuple[int, ...]) -> str:
    """The indices of some classes with their names, for the log: '0 cat, 3 dog, ... (12)'."""
    known = ", ".join(f"{number} {classes.names[number]}" for number in numbers[: 2 * SHOWN])
    return f"{known}, ... ({len(numbers)})" if len(numbers) > 2 * SHOWN else known
