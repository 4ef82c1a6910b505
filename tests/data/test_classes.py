"""Classes: matching by name, and lists of labels."""

import pytest

from rdm_jax.data.classes import Classes, matched, of_checkpoint, parse_labels, table
from rdm_jax.runtime.errors import InputError

AB = Classes(("a", "b"))
BY_TEXT = Classes(("1", "10", "11", "2"))  # folders of these names, as they were sorted once
THREE = Classes(("0", "1", "2"), by_number=True)  # of imported weights


@pytest.mark.parametrize(
    ("theirs", "ours", "numbers"),
    [
        (AB, AB, (0, 1)),
        (Classes(("b",)), AB, (1,)),
        (Classes(("b", "c")), AB, None),
        (Classes(), AB, ()),
        (AB, Classes(), None),
        (Classes(("0", "1")), AB, None),  # of a labels file without names: these are others
        (BY_TEXT, Classes(("1", "2", "10", "11")), (0, 2, 3, 1)),
        (Classes(("0", "1", "2", "3")), BY_TEXT, None),
        (THREE, Classes(("x", "y", "z")), (0, 1, 2)),
        (Classes(("x", "y", "z")), THREE, (0, 1, 2)),
        (Classes(("2", "0")), THREE, (2, 0)),
        (THREE, THREE, (0, 1, 2)),
        (THREE, AB, None),
        (AB, THREE, None),
        (THREE, Classes(("1", "2", "3")), None),  # 1 may be the first class or the second
        (Classes(("1", "2", "3")), THREE, None),
        (THREE, Classes(("2", "10", "x")), None),
        (Classes(("x", "0", "y")), THREE, None),
        (THREE, Classes(("2", "1", "0")), (2, 1, 0)),
        (THREE, Classes(("1", "10", "2")), None),  # 2 may be the second number or the last folder
        (Classes(("0", "1", "2")), Classes(("0", "1"), by_number=True), None),
    ],
)
def test_matched_by_name(theirs, ours, numbers):
    assert matched(theirs, ours) == numbers


def test_of_checkpoint_by_number():
    assert of_checkpoint({"classes": ["0", "1"], "imported": {"file": "x.pkl"}}) == Classes(
        ("0", "1"), by_number=True
    )
    assert of_checkpoint({"classes": ["0", "1"]}) == Classes(("0", "1"))


@pytest.mark.parametrize(
    ("text", "classes", "numbers"),
    [
        ("b", AB, (1,)),
        ("b, a,b", AB, (1, 0, 1)),
        ("1", AB, (1,)),
        ("0 - 1,b", AB, (0, 1, 1)),
        ("2", BY_TEXT, (3,)),
        ("10-11, 1", BY_TEXT, (1, 2, 0)),
        ("01-03", Classes(("01", "02", "03")), (0, 1, 2)),
        ("2,0-1", THREE, (2, 0, 1)),
        ("polar bear", Classes(("cat", "polar bear")), (1,)),
        ("a-b", Classes(("a-b", "c")), (0,)),
        ('["crane, bird", "1"]', Classes(("crane", "crane, bird")), (1, 1)),
    ],
)
def test_parse_labels_names_and_numbers(text, classes, numbers):
    assert parse_labels(text, classes, "labels") == numbers


@pytest.mark.parametrize(
    ("text", "classes", "says"),
    [
        (
            "c",
            AB,
            r"labels='c': there is no class 'c'. Use the names a, b \(2\), or indices from 0 to 1.",
        ),
        ("2", AB, "no class '2'"),
        ("1-0", AB, "no class '1-0'"),
        (
            "0",
            BY_TEXT,
            "labels='0' is ambiguous: .* no class called '0', .* index 0 is called '1'",
        ),
        (
            "1-3",
            BY_TEXT,
            "is ambiguous: .* no class called '3', .* index 3 is called '2'",
        ),
        ("7", BY_TEXT, "no class called '7'"),
        (
            "1",
            Classes(("01", "02")),
            "is ambiguous: .* no class called '1', .* index 1 is called '02'",
        ),
        ("polar baer", Classes(("cat", "polar bear")), "'polar bear', or another of the names"),
        ('["a"', AB, "is not a JSON list"),
        ("0", Classes(), "the data has none. Set labels='balanced'."),
    ],
)
def test_parse_labels_refuses_unknown_and_ambiguous(text, classes, says):
    with pytest.raises(InputError, match=says) as refusal:
        parse_labels(text, classes, "labels")
    assert str(refusal.value).endswith(".") and "\n" not in str(refusal.value)


def test_table_is_short():
    many = Classes(tuple(f"n{number}" for number in range(1000)))
    assert table(AB, (0, 1)) == "0 a, 1 b"
    assert (
        table(many, tuple(range(500))).endswith("9 n9, ... (500)")
        and str(many) == "n0, n1, n2, n3, n4, ... (1000)"
    )
