"""Lists given as text: 'a, b' or JSON '["a", "b"]'; integers also as ranges, '0-3,7'."""

import json
from collections.abc import Iterable

from rdm_jax.runtime.errors import InputError

MAX_NUMBERS = 1_000_000  # the labels and features of so many images fit into memory
LARGEST = 2**32 - 1


def parse_list(text: str, field: str) -> tuple[str, ...]:
    """Splits a text at its commas and strips the parts; a JSON list may have commas in its parts.

    Raises:
      InputError: it begins with '[' and is not a JSON list of strings or integers.
    """
    if not text.lstrip().startswith("["):
        return tuple(part.strip() for part in text.split(","))
    try:
        parts = json.loads(text)
        if all(type(part) in (str, int) for part in parts):
            return tuple(map(str, parts))
    except (ValueError, RecursionError):
        pass
    raise InputError(f"{field}={text!r} is not a JSON list", """Use a list such as '["a", "b"]'.""")


def range_ends(part: str) -> tuple[str, str] | None:
    """Returns ('0', '3') for '0-3' or '0 - 3', ('7', '7') for '7', None for anything else.

    A range must not fall.
    """
    first, dash, last = (end.strip() for end in part.partition("-"))
    ends = (first, last if dash else first)
    if not all(end.isascii() and end.isdecimal() and len(end) < 20 for end in ends):
        return None
    return ends if int(ends[0]) <= int(ends[1]) else None


def parse_numbers(text: str, field: str) -> tuple[int, ...]:
    """Parses '0-3,7' as (0, 1, 2, 3, 7): unique, in the order of first mention.

    Raises:
      InputError: it is anything else, has numbers (seeds) above 2^32 - 1, or too many of them.
    """
    return tuple(dict.fromkeys(_every_number(text, field)))


def repetition(text: str, field: str) -> str:
    """Returns a sentence for the log if a list names numbers more than once, else ''."""
    unique = len(parse_numbers(text, field))
    repeated = len(_every_number(text, field)) - unique
    if not repeated:
        return ""
    return f"{field}={text!r} repeats {repeated} numbers; each counts once ({unique} in all)"


def _every_number(text: str, field: str) -> list[int]:
    found: list[int] = []
    for part in parse_list(text, field):
        ends = range_ends(part)
        if ends is None or int(ends[1]) > LARGEST:
            raise InputError(
                f"{field}={text!r} is not a list of numbers from 0 to {LARGEST}",
                "Use ranges such as '0-99,200'.",
            )
        numbers = range(int(ends[0]), int(ends[1]) + 1)
        if len(found) + len(numbers) > MAX_NUMBERS:
            raise InputError(
                f"{field}={text!r} has too many numbers",
                f"Use at most {MAX_NUMBERS} in each of several runs.",
            )
        found.extend(numbers)
    return found


def as_ranges(numbers: Iterable[int]) -> str:
    """The inverse of `parse_numbers`: (0, 1, 2, 3, 7) as '0-3,7', in that order."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
