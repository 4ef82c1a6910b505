"""Lists that a setting gives as text: 'a, b', or as JSON '["a", "b"]'; of numbers also '0-3,7'."""

import json
from collections.abc import Iterable

from rdm_jax.runtime.errors import InputError

MAX_NUMBERS = 1_000_000  # images whose labels and features are in memory at once
LARGEST = 2**32 - 1


def parse_list(text: str, field: str) -> tuple[str, ...]:
    """The parts of a text between commas, without spaces about them; or of a JSON list, whose parts
    may have commas in them.

    Raises:
      InputError: it begins with '[' and is no JSON list of texts or whole numbers.
    """
    if not text.lstrip().startswith("["):
        return tuple(part.strip() for part in text.split(","))
    try:
        parts = json.loads(text)
        if all(type(part) in (str, int) for part in parts):
            return tuple(map(str, parts))
    except (ValueError, RecursionError):
        pass
    raise InputError(f"""{field}={text!r} is no JSON list; one such as '["a", "b"]' would do.""")


def range_ends(part: str) -> tuple[str, str] | None:
    """('0', '3') of '0-3' or '0 - 3', ('7', '7') of '7'; None for what is no number and no range of
    numbers that rises."""
    first, found, last = (end.strip() for end in part.partition("-"))
    ends = (first, last if found else first)
    fine = all(end.isascii() and end.isdecimal() and len(end) < 20 for end in ends) and int(
        ends[0]
    ) <= int(ends[1])
    return ends if fine else None


def parse_numbers(text: str, field: str) -> tuple[int, ...]:
    """'0-3,7' as (0, 1, 2, 3, 7): a set, in the order in which its numbers are first named, each
    once.

    Raises:
      InputError: it is anything else, or has numbers (seeds) beyond 2^32 - 1, or too many.
    """
    return tuple(dict.fromkeys(_every_number(text, field)))


def repetition(text: str, field: str) -> str:
    """What to say where a list names numbers more than once; '' where it does not."""
    numbers, every = parse_numbers(text, field), len(_every_number(text, field))
    again = every - len(numbers)
    return (
        f"{field}={text!r} names {again} numbers again; each counts once ({len(numbers)} in all)"
        if again
        else ""
    )


def _every_number(text: str, field: str) -> list[int]:
    found: list[int] = []
    for part in parse_list(text, field):
        ends = range_ends(part)
        if ends is None or int(ends[1]) > LARGEST:
            would_do = f"ranges of numbers from 0 to {LARGEST}, such as '0-99,200',"
            raise InputError(f"{field}={text!r} cannot be used; {would_do} would do.")
        several = range(int(ends[0]), int(ends[1]) + 1)
        if len(found) + len(several) > MAX_NUMBERS:
            raise InputError(
                f"{field}={text!r} has too many numbers; at most {MAX_NUMBERS}, in several runs, would do."
            )
        found.extend(several)
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
