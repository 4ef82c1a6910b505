"""EDM's dataset.json and variants: unambiguous ones are read, others refused."""

import json

import numpy as np
import pytest

from rdm_jax.data.left_out import check_left_out, reasons
from rdm_jax.data.sources import open_source
from rdm_jax.runtime.errors import InputError
from tests.support.archive_members import classes, png, pngs, values, write_folder, write_zip

EDM = pngs(*(f"{i // 2:05d}/img{i:08d}.png" for i in range(5)))
LABELS = [[name, i % 3] for i, name in enumerate(EDM)]
NAMED = next(iter(EDM))


def with_labels(labels, members=EDM, **more):
    return {**members, "dataset.json": json.dumps({"labels": labels, **more})}


def relabelled(change):
    return [[name, change(label)] for name, label in LABELS]


def test_edm_layout_with_labels(written):
    source = open_source(written(with_labels(LABELS[::-1])))
    assert values(source) == [0, 1, 2, 3, 4] and source.class_names == ("0", "1", "2")
    assert [source.label(i) for i in range(5)] == [0, 1, 2, 0, 1]


@pytest.mark.parametrize("labels", [None, [], {}, [None], [[name, None] for name in EDM]])
def test_edm_layout_without_labels(written, labels):
    source = open_source(written(with_labels(labels)))
    assert values(source) == [0, 1, 2, 3, 4] and source.class_names == ()


PLAIN = {name: str(i % 3) for i, name in enumerate(EDM)}
READ = {
    "a dict": (dict(LABELS), PLAIN),
    "whole floats": (relabelled(float), PLAIN),
    "digits in a text": (relabelled(str), PLAIN),
    "one-hot": (relabelled(lambda label: [float(label == i) for i in range(3)]), PLAIN),
    "a third entry": ([[*pair, {"caption": "x"}] for pair in LABELS], PLAIN),
    "empty items": ([None, *LABELS, None], PLAIN),
    "the same label twice": ([*LABELS, LABELS[0]], PLAIN),
    "from 1": (
        relabelled(lambda label: label + 1),
        {name: str(i % 3 + 1) for i, name in enumerate(EDM)},
    ),
    "with gaps": (
        relabelled(lambda label: 9 * label + 2),
        {name: str(9 * (i % 3) + 2) for i, name in enumerate(EDM)},
    ),
    "true and false": (relabelled(bool), {name: str(int(i % 3 > 0)) for i, name in enumerate(EDM)}),
    "names": (
        relabelled(["ant", "bee", "cow"].__getitem__),
        {n: ("ant", "bee", "cow")[i % 3] for i, n in enumerate(EDM)},
    ),
    "./": ([[f"./{name}", label] for name, label in LABELS], PLAIN),
    "backslashes": ([[name.replace("/", "\\"), label] for name, label in LABELS], PLAIN),
    "another case": ([[name.upper(), label] for name, label in LABELS], PLAIN),
}


@pytest.mark.parametrize("labels, wanted", READ.values(), ids=READ)
def test_unambiguous_variants_are_read(tmp_path, labels, wanted):
    source = open_source(write_folder(tmp_path / "set", with_labels(labels)))
    assert classes(source) == wanted and not source.skipped


def test_labels_file_in_upper_case(written):
    labels = json.dumps({"labels": LABELS})
    assert classes(open_source(written({**EDM, "Dataset.JSON": labels}))) == PLAIN


def test_exact_spelling_of_the_labels_file_wins(tmp_path):
    members = {
        **with_labels(LABELS),
        "Dataset.json": json.dumps({"labels": [[name, 9] for name, _ in LABELS]}),
    }
    assert classes(open_source(write_zip(tmp_path / "set.zip", members))) == PLAIN


def test_check_left_out_counts_labels_without_a_file(tmp_path, caplog):
    labels = [*LABELS, *([f"gone{i}.png", 0] for i in range(5))]
    source = open_source(write_folder(tmp_path / "set", with_labels(labels)), skip_bad=True)
    with pytest.raises(
        InputError,
        match="5 of 10 entries of set are unusable .*Set data.max_left_out=0.5.",
    ):
        check_left_out(reasons(source.skipped), len(source), source.lost, 0.1, "set")
    assert "5 of 10 entries of set are left out" in caplog.text


@pytest.mark.parametrize("count, remedy", [(29, "0.29"), (83, "0.83"), (100, "1"), (57, "0.57")])
def test_check_left_out_names_the_least_share(count, remedy):
    skipped = {str(number): "is damaged" for number in range(count)}
    with pytest.raises(InputError, match=f"Set data.max_left_out={remedy}[.,]"):
        check_left_out(skipped, 100 - count, (), 0.1, "set")
    check_left_out(skipped, 100 - count, (), float(remedy), "set")


@pytest.mark.parametrize("bare", [LABELS, dict(LABELS)])
def test_labels_alone(tmp_path, bare):
    source = open_source(write_folder(tmp_path / "set", {**EDM, "dataset.json": json.dumps(bare)}))
    assert classes(source) == PLAIN


def test_order_of_numeric_classes(tmp_path):
    labels = [[name, label] for name, label in zip(EDM, ["11", "2", "1", "10", "2"], strict=True)]
    assert open_source(write_folder(tmp_path / "set", with_labels(labels))).class_names == (
        "1",
        "2",
        "10",
        "11",
    )


def test_absolute_paths(tmp_path):
    labels = [[str(tmp_path / "set" / name), label] for name, label in LABELS]
    assert classes(open_source(write_folder(tmp_path / "set", with_labels(labels)))) == PLAIN


def test_other_normal_forms_must_be_unique(tmp_path):
    composed, decomposed = "caf\u00e9.png", "cafe\u0301.png"
    members = with_labels([[decomposed, 0], ["b.png", 1]], pngs(composed, "b.png"))
    assert classes(open_source(write_folder(tmp_path / "one", members))) == {
        composed: "0",
        "b.png": "1",
    }
    members = with_labels([["A.PNG", 0], ["b.png", 1]], pngs("a.png", "A.png", "b.png"))
    with pytest.raises(
        InputError,
        match="'A.PNG' .* is listed in dataset.json but missing .*2 unusable for other reasons",
    ):
        open_source(write_folder(tmp_path / "two", members))


NAMES = ["ant", "bee", "cow", "dog"]


@pytest.mark.parametrize("change", [int, str, NAMES.__getitem__, float])
def test_class_names_name_all_classes(written, change):
    source = open_source(written(with_labels(relabelled(change), class_names=NAMES)))
    assert source.class_names == tuple(NAMES)
    assert classes(source) == {name: NAMES[label] for name, label in LABELS}


@pytest.mark.parametrize("wrapper", ["mine/", "my/set/"])
def test_labels_file_below_a_wrapper(written, wrapper):
    members = {wrapper + name: content for name, content in with_labels(LABELS).items()}
    assert classes(open_source(written(members))) == {
        wrapper + name: label for name, label in PLAIN.items()
    }


def test_own_samples_are_read_from_a_zip(tmp_path):
    """Index folders are not classes, and nothing is skipped."""
    members = {f"images/00000/img{i:08d}.png": png(i) for i in range(3)}
    labels = {
        "labels": [[f"00000/img{i:08d}.png", 3] for i in range(3)],
        "class_names": ["a", "b", "c", "d"],
    }
    source = open_source(
        write_zip(tmp_path / "images.zip", {**members, "images/dataset.json": json.dumps(labels)})
    )
    assert (
        source.class_names == ("a", "b", "c", "d")
        and set(classes(source).values()) == {"d"}
        and not source.skipped
    )


def test_partial_labels_file_is_refused(written):
    members = {
        **pngs("a/1.png", "b/2.png"),
        "a/dataset.json": json.dumps({"labels": [["1.png", 0]]}),
    }
    spec = written(members)
    with pytest.raises(InputError, match="a/dataset.json .*'a' only.*folder:.*/a "):
        open_source(spec, skip_bad=True)
    assert open_source(spec, classes="top").class_names == ("a", "b")


SLIPS = {
    "a label for a file that is not there": ([*LABELS, ["gone.png", 0]], "gone.png"),
    "a file without a label": (LABELS[1:], NAMED),
    "a label of null": ([[NAMED, None], *LABELS[1:]], NAMED),
    "a negative class number": ([[NAMED, -1], *LABELS[1:]], NAMED),
}
REFUSED = {
    "two labels for a file": ([*LABELS, [NAMED, 1]], NAMED),
    "two labels for a file that is written in two ways": (
        [*LABELS, [NAMED.upper(), 1]],
        NAMED.upper(),
    ),
    "several ones": ([[NAMED, [1, 1, 0]], *LABELS[1:]], NAMED),
    "a soft label": ([[NAMED, [0.5, 0.5]], *LABELS[1:]], NAMED),
    "a fraction": ([[NAMED, 0.5], *LABELS[1:]], NAMED),
    "no number": ([[NAMED, np.nan], *LABELS[1:]], NAMED),
    "an empty name": ([[NAMED, " "], *LABELS[1:]], NAMED),
    "a name that is no text": (
        [[NAMED, "\ud800"], *([name, "b"] for name, _ in LABELS[1:])],
        "control character",
    ),
    "no name": ([[0, 0], *LABELS[1:]], r"\[0, 0\]"),
    "labels alone": ([0, 1, 2, 0, 1], "the label 0"),
    "truth and numbers": ([[NAMED, True], *LABELS[1:]], "several kinds .*true or false.*a number"),
    "names and numbers": ([[NAMED, "ant"], *LABELS[1:]], "several kinds .*a name.*a number"),
    "lists of two lengths": (
        [[NAMED, [1, 0]], *([name, [0, 1, 0]] for name, _ in LABELS[1:])],
        "several kinds",
    ),
    "names that are one number": (
        [[NAMED, "01"], *([name, "1"] for name, _ in LABELS[1:])],
        "'01' and '1', which are one number",
    ),
    "other files": (
        [[f"elsewhere/{name}", label] for name, label in LABELS],
        "names 'elsewhere.*no image that exists",
    ),
    "a number": (7, "dataset.json"),
    "a text": ("ant", "dataset.json"),
}


@pytest.mark.parametrize(
    "labels, named", [*SLIPS.values(), *REFUSED.values()], ids=[*SLIPS, *REFUSED]
)
def test_bad_labels_are_refused(tmp_path, labels, named):
    with pytest.raises(InputError, match=named) as caught:
        open_source(write_folder(tmp_path / "set", with_labels(labels)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("labels, named", SLIPS.values(), ids=SLIPS)
def test_bad_labels_are_skipped_on_request(written, labels, named):
    source = open_source(written(with_labels(labels)), skip_bad=True)
    assert list(source.skipped) == [named]
    assert source.class_names == ("0", "1", "2") and len(source) == (
        5 if named == "gone.png" else 4
    )


@pytest.mark.parametrize(
    "labels",
    [
        relabelled(int),
        relabelled(NAMES.__getitem__),
        relabelled(lambda i: [i == j for j in range(3)]),
    ],
)
def test_lost_classes(written, labels):
    """Without the class, later classes would have other indices."""
    labels = [
        [name, [float(v) for v in label] if isinstance(label, list) else label]
        for name, label in labels
    ]
    present = {
        name: content for name, content in EDM.items() if name not in (labels[1][0], labels[4][0])
    }
    source = open_source(written(with_labels(labels, present)), skip_bad=True)
    assert source.lost == ("bee" if "bee" in labels[1] else "1",) and len(source) == 3
    with pytest.raises(InputError, match="the whole class '(bee|1)'"):
        check_left_out(reasons(source.skipped), len(source), source.lost, 0.9, "folder:set")
    some = {name: content for name, content in EDM.items() if name != labels[4][0]}
    assert open_source(written(with_labels(labels, some)), skip_bad=True).lost == ()


@pytest.mark.parametrize(
    "more, named",
    [
        ({"class_names": ["ant", "bee"]}, "the class 2. Use one of its 2 class_names"),
        ({"class_names": ["ant", "ant", "bee"]}, "different names"),
        ({"class_names": {"0": "ant"}}, "different names"),
        ({"class_names": [0, 1, 2]}, "different names"),
    ],
)
def test_bad_class_names_are_refused(tmp_path, more, named):
    with pytest.raises(InputError, match=named):
        open_source(write_folder(tmp_path / "set", with_labels(LABELS, **more)))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"labels"', "null", '{"label": []}', "[" * 100_000, "\udcff"]
)
def test_damaged_labels_files_are_refused(written, text):
    with pytest.raises(InputError, match="dataset.json"):
        open_source(written({**EDM, "dataset.json": text.encode("utf8", "surrogateescape")}))
