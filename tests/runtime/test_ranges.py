"""Lists given as text: of numbers, and of anything else."""

import pytest

from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.ranges import as_ranges, parse_list, parse_numbers, repetition


def test_parse_numbers():
    assert parse_numbers("0-3, 7", "config.sampling.seeds") == (0, 1, 2, 3, 7)
    assert parse_numbers("0 - 3 ,7", "config.sampling.seeds") == (0, 1, 2, 3, 7)
    for wrong in (
        "",
        "a",
        "3-1",
        "-1",
        "1-",
        "0-3,",
        "4294967296",
        "1.5",
        "²",
        "0-1-2",
    ):
        with pytest.raises(InputError, match="sampling.seeds") as refusal:
            parse_numbers(wrong, "config.sampling.seeds")
        assert refusal.value.fix == "Use ranges such as '0-99,200'."
    with pytest.raises(InputError, match="sampling.seeds='0-4000000000' has too many") as refusal:
        parse_numbers("0-4000000000", "config.sampling.seeds")
    assert refusal.value.fix == "Use at most 1000000 in each of several runs."


def test_parse_numbers_drops_repetitions():
    assert parse_numbers("7,0-5,5-9,7", "seeds") == (7, 0, 1, 2, 3, 4, 5, 6, 8, 9)
    assert repetition("0-9", "seeds") == ""
    assert (
        repetition("0-5,5-9,1", "seeds")
        == "seeds='0-5,5-9,1' repeats 2 numbers; each counts once (10 in all)"
    )


@pytest.mark.parametrize(
    ("numbers", "text"),
    [((0, 1, 2, 3, 7), "0-3,7"), ((5,), "5"), ((3, 2, 1, 2, 3), "3,2,1-3"), ((), "")],
)
def test_as_ranges_inverts_parse_numbers(numbers, text):
    assert as_ranges(numbers) == text
    assert not numbers or parse_numbers(text, "seeds") == tuple(dict.fromkeys(numbers))


def test_parse_list_reads_json():
    assert parse_list("samples, folder:/a b", "images") == ("samples", "folder:/a b")
    assert parse_list('["samples", "folder:/a, b"]', "images") == ("samples", "folder:/a, b")
    for wrong in ('["a"', "[1.5]", '{"a": 1}['[8:], "[" * 100_000):
        with pytest.raises(InputError, match="is not a JSON list"):
            parse_list(wrong, "images")
