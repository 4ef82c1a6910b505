"""Classes are known by name; a number is an index that is shown. Sets are matched by name, or
refused.

Imported weights alone know their classes by number only: nothing else may be matched by its place.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.ranges import parse_list, range_ends

SHOWN = 5  # names in a message
LABEL_RULES = ("balanced", "random")  # what sampling.labels may be besides a list


@dataclasses.dataclass(frozen=True)
class Classes:
    """The classes of a set of images or of a network.

    Attributes:
      names: in the order of their numbers; () for none.
      by_number: whether the numbers are all that is known, as of imported weights. The names are
        '0', '1', ... then.
    """

    names: tuple[str, ...] = ()
    by_number: bool = False

    def __len__(self) -> int:
        return len(self.names)

    def __str__(self) -> str:
        if not self.names:
            return "none"
        known = (
            f"{', '.join(self.names[:SHOWN])}{', ...' if len(self) > SHOWN else ''} ({len(self)})"
        )
        return f"{known}, known by number alone" if self.by_number else known


def of_checkpoint(about: Mapping[str, Any]) -> Classes:
    """The classes that a checkpoint's network was trained on, as the checkpoint says."""
    return Classes(tuple(about["classes"]), by_number="imported" in about)


def matched(theirs: Classes, ours: Classes) -> tuple[int, ...] | None:
    """For each of their classes its number among ours; None where they are not the same classes, or
    not some of them.

    Names decide. Where one side knows numbers alone, and there are as many of both, the order does;
    unless a name of the other side is a number, which would mean two things.
    """
    number = {name: place for place, name in enumerate(ours.names)}
    by_name = (
        tuple(number[name] for name in theirs.names) if number.keys() >= set(theirs.names) else None
    )
    if not (theirs.by_number or ours.by_number):
        return by_name
    if by_name is not None and (len(theirs) == len(ours) or not theirs.by_number):
        return by_name
    named = ours if theirs.by_number else theirs
    means_one_thing = not any(name.isdecimal() for name in named.names)
    return tuple(range(len(ours))) if len(theirs) == len(ours) and means_one_thing else None


def parse_labels(text: str, classes: Classes, field: str) -> tuple[int, ...]:
    """The numbers of the classes that a list names, '3', 'cat, dog' or '0,2-5', in its order, with
    repetition.

    A part that is the name of a class means that class. Any other number, or range of numbers,
    means the classes with these numbers, if no class is called by a number.

    Raises:
      InputError: a part is no class's name or number, or might be either.
    """
    number = {name: place for place, name in enumerate(classes.names)}
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
            f"{field}={text!r} names classes, and the data has none; 'balanced' would do."
        )
    close = difflib.get_close_matches(part, classes.names, n=1)
    names = f"{close[0]!r}, or another of the names {classes}" if close else f"the names {classes}"
    if not any(name.isdecimal() for name in classes.names):
        return InputError(
            f"{field}={text!r}: there is no class {part!r}; {names}, or numbers from 0 to {len(classes) - 1} would do."
        )
    if part.isdecimal() and int(part) < len(classes):
        other = f"there is no class called {part!r}, and class number {part} is called {classes.names[int(part)]!r}"
        return InputError(f"{field}={text!r} might mean two things: {other}; {names} would do.")
    return InputError(f"{field}={text!r}: there is no class called {part!r}; {names} would do.")


def table(classes: Classes, numbers: tuple[int, ...]) -> str:
    """The numbers of some classes with their names, for the log: '0 cat, 3 dog, ... (12)'."""
    known = ", ".join(f"{number} {classes.names[number]}" for number in numbers[: 2 * SHOWN])
    return f"{known}, ... ({len(numbers)})" if len(numbers) > 2 * SHOWN else known
