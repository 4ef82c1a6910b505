"""Classes from folders and file names: rules, order, and log."""

import pytest

from rdm_jax.data.class_rules import ordered
from rdm_jax.data.sources import open_source
from rdm_jax.runtime.errors import InputError
from tests.support.archive_members import classes, pngs, values, write_folder

NESTED = pngs("a/1.png", "a/x/2.png", "b/x/3.png", "b/y/z/4.png")


@pytest.fixture
def said(caplog, monkeypatch):
    """Returns a function that returns the log so far."""
    monkeypatch.setattr("rdm_jax.runtime.console.log.propagate", True)
    caplog.set_level("INFO")
    return lambda: "\n".join(record.getMessage() for record in caplog.records)


def test_auto_uses_top_folders_and_logs_it(written, said):
    source = open_source(written(NESTED))
    assert values(source) == [0, 1, 2, 3] and not source.skipped
    assert classes(source) == {
        "a/1.png": "a",
        "a/x/2.png": "a",
        "b/x/3.png": "b",
        "b/y/z/4.png": "b",
    }
    assert (
        "2 top folders (data.classes='top'); folders are up to 3 deep" in said()
        and "data.classes='leaf' uses the 3 names" in said()
    )


RULES = {
    "top": ["a", "a", "b", "b"],
    "leaf": ["a", "x", "x", "z"],
    "none": [],
}


@pytest.mark.parametrize("rule, wanted", RULES.items())
def test_rules_choose_the_folder(written, said, rule, wanted):
    source = open_source(written(NESTED), classes=rule)
    assert list(classes(source).values()) == wanted and values(source) == [0, 1, 2, 3]
    assert ("'x' is in a/x and b/x" in said()) == (rule == "leaf")


@pytest.mark.parametrize("wrapper", ["photos/", "my/photos/"])
def test_wrapper_is_ignored(written, said, wrapper):
    source = open_source(written(pngs(f"{wrapper}a/1.png", f"{wrapper}b/2.png")))
    assert source.class_names == ("a", "b") and values(source) == [0, 1]
    assert f"all in the folder {wrapper[:-1]!r}, which is ignored" in said()


def test_single_folder_is_a_class_on_request(written, said):
    spec = written(pngs("photos/1.png", "photos/2.png"))
    assert (
        open_source(spec).class_names == ()
        and "they have no classes (data.classes='leaf' makes its name their class)" in said()
    )
    assert (
        open_source(spec, classes="top").class_names
        == open_source(spec, classes="leaf").class_names
        == ("photos",)
    )


@pytest.mark.parametrize(
    "parts",
    [
        ("train", "val"),
        ("Training", "valid", "test"),
        ("train", "validation"),
        ("train2017", "val2017"),
        ("test_set", "training_set"),
        ("TestSet", "TrainSet"),
        ("testset", "trainset"),
        ("TestData2", "trainingImages"),
        ("mine/train", "mine/test"),
    ],
)
def test_splits_are_refused(written, parts):
    spec = written(
        pngs(*(f"{part}/{name}/{part[-3:]}.png" for part in parts for name in ("cat", "dog")))
    )
    with pytest.raises(
        InputError,
        match=f"splits of one set and not classes. Use \\w+:.*/({'|'.join(parts)}) for .*"
        "data.classes='leaf'",
    ) as caught:
        open_source(spec)
    assert "\n" not in str(caught.value)
    assert open_source(f"{spec}/{parts[0]}").class_names == ("cat", "dog")  # also in an archive
    assert open_source(spec, classes="leaf").class_names == ("cat", "dog")
    assert open_source(spec, classes="top").class_names == tuple(
        sorted(part.rpartition("/")[2] for part in parts)
    )


def test_training_split_alone_is_a_wrapper(written):
    assert open_source(written(pngs("train/cat/1.png", "train/dog/2.png"))).class_names == (
        "cat",
        "dog",
    )


def test_classes_named_like_splits_are_kept(written):
    assert open_source(written(pngs("train/1.png", "test/2.png", "plane/3.png"))).class_names == (
        "plane",
        "test",
        "train",
    )


def test_images_beside_class_folders_are_refused(written):
    spec = written(pngs("0.png", "cat/1.png", "dog/2.png"))
    with pytest.raises(InputError, match="'0.png' .* is in no folder, .*Set data.classes='none'"):
        open_source(spec)
    assert values(open_source(spec, classes="none")) == [0, 1, 2]
    assert list(open_source(spec, skip_bad=True).skipped) == ["0.png"]


def test_order_of_numeric_folders(written):
    source = open_source(written(pngs("1/a.png", "10/b.png", "2/c.png")))
    assert source.class_names == ("1", "2", "10") and classes(source) == {
        "1/a.png": "1",
        "10/b.png": "10",
        "2/c.png": "2",
    }


def test_ordered():
    assert ordered(["b", "10", "9"], "set") == ("10", "9", "b")
    assert ordered(["007", "10", "09"], "set") == ("007", "09", "10")
    assert ordered(["0", "9" * 5000], "set") == ("0", "9" * 5000)
    for same in (["1", "01"], ["0", "00", "1"]):
        with pytest.raises(InputError, match="which are one number"):
            ordered(same, "set")


PREFIXED = pngs(
    "cat_01.png", "cat_02.png", "dog-1.png", "big dog (1).png", "big dog (2).png", "dog.12.png"
)


def test_prefixes_are_logged_and_used_on_request(written, said):
    spec = written(PREFIXED)
    assert open_source(spec).class_names == ()
    assert (
        "file names have 3 prefixes ('big dog', 'cat', 'dog'), which are the classes with "
        "data.classes='prefix'" in said()
    )
    assert classes(open_source(spec, classes="prefix")) == {
        "big dog (1).png": "big dog",
        "big dog (2).png": "big dog",
        "cat_01.png": "cat",
        "cat_02.png": "cat",
        "dog-1.png": "dog",
        "dog.12.png": "dog",
    }


@pytest.mark.parametrize(
    "names",
    [
        ("img_01.png", "img_02.png"),
        ("0.png", "1.png"),
        ("a_1.png", "b_2.png", "c_3.png"),
        ("cat.png", "dog.png"),
    ],
)
def test_prefixes_are_not_logged_for_plain_names(written, said, names):
    assert open_source(written(pngs(*names))).class_names == ()
    assert "prefix" not in said()


def test_prefix_needs_a_number(written):
    spec = written({**PREFIXED, **pngs("logo.png")})
    with pytest.raises(InputError, match="'logo.png' .* has no number after a separator"):
        open_source(spec, classes="prefix")


def test_kept_names_strips_spaces(written, said):
    source = open_source(written(pngs("cat /1.png", "dog/2.png")))
    assert source.class_names == ("cat", "dog") and "'cat ' of" in said()


@pytest.mark.parametrize(
    "name, other, wrong",
    [
        ("cat ", "cat", "of another class, except"),
        (" ", "dog", "empty"),
        ("a\u2028b", "c", "line break"),
    ],
)
def test_kept_names_refuses_ambiguous_names(tmp_path, name, other, wrong):
    with pytest.raises(InputError, match=wrong):
        open_source(write_folder(tmp_path, pngs(f"{name}/1.png", f"{other}/2.png")))


@pytest.mark.parametrize(
    "spec, rule", [("digits", "top"), ("emoji:x", "leaf"), ("folder:x", "deepest")]
)
def test_rules_unsupported_by_the_source_are_refused(spec, rule):
    with pytest.raises(InputError, match=f"classes={rule!r} is not supported .* {spec!r}. Use"):
        open_source(spec, classes=rule, skin_tones="drop" if "emoji" in spec else "")


def test_classes_none_fits_any_source(tmp_path):
    spec = write_folder(tmp_path, pngs("1f44d.png", "1f44d-1f3fb.png")).replace("folder", "emoji")
    assert open_source(spec, skin_tones="mark").class_names
    source = open_source(spec, skin_tones="mark", classes="none")
    assert source.class_names == () and source.label(1) == -1
