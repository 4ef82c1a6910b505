"""EDM's dataset.json, and what others write in its place: as much of it as can mean one thing
only."""

import collections
import functools
import posixpath
import re
import unicodedata
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from rdm_jax.data.class_rules import Labelled, ordered
from rdm_jax.data.left_out import NO_FILE
from rdm_jax.data.listing import LABELS_FILE
from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.files import parse_json

FORMAT = '{"labels": [["NAME", 0], ...]}'


class _Label(NamedTuple):
    """A label, and as what it was written: labels of different kinds cannot be told to mean the
    same."""

    kind: str
    value: int | str


def by_labels_file(
    content: bytes, images: Sequence[str], folder: str, places: Sequence[str]
) -> Labelled:
    """The classes of images by a labels file.

    The labels are pairs of a name and a label, in a list or a dict, alone or as "labels" beside
    "class_names" (the names of all classes, by number). A label is a whole number, a name, true or
    false, or a one-hot list. Without "class_names" a class is called by its number, so that numbers
    may begin anywhere and have gaps.

    Args:
      content: of the file.
      images: the names of all.
      folder: the one of the file, in which names begin; '' for the top.
      places: the paths of the source, with which absolute names begin.

    Raises:
      InputError: it is damaged, or it cannot be told what is meant; one message for the whole file.
    """
    pairs, class_names = _parse(content)
    if not pairs:
        return Labelled()
    image_called, labels, missing = _resolver(images, folder, places), {}, {}
    for name, label in pairs:
        image = image_called(name)
        if image is None:
            missing[name] = label
        elif labels.setdefault(image, label) != label:
            raise InputError(f"{LABELS_FILE} has two labels for {name!r}; one would do.")
    if images and not labels:
        raise InputError(
            f"{LABELS_FILE} names {next(iter(missing))!r} and no image that is there; names such as {images[0]!r} would do."
        )
    skipped = {
        name: f"{NO_FILE} {LABELS_FILE} and is not there; the file would do." for name in missing
    }
    skipped |= {
        name: f"has no label in {LABELS_FILE}; one would do."
        for name in images
        if name not in labels
    }
    negative = [
        name for name, label in labels.items() if isinstance(label.value, int) and label.value < 0
    ]
    skipped |= dict.fromkeys(
        negative, f"has a negative class number in {LABELS_FILE}; 0 or more would do."
    )
    known = frozenset(class_names)
    named = {
        name: _name(label, class_names, known)
        for name, label in labels.items()
        if name not in skipped
    }
    all_names = class_names or _one_hot_names(labels) or ordered(named.values(), LABELS_FILE)
    number = {name: i for i, name in enumerate(all_names)}
    unused = {
        label for label in missing.values() if not isinstance(label.value, int) or label.value >= 0
    }
    lost = {_name(label, class_names, known) for label in unused} - set(named.values())
    return Labelled(
        all_names,
        {image: number[name] for image, name in named.items()},
        skipped,
        tuple(sorted(lost)),
    )


def _parse(content: bytes) -> tuple[list[tuple[str, _Label]], tuple[str, ...]]:
    """The names that have a label, with it; and the names of the classes if they are there."""
    try:
        found = parse_json(content)
        if not isinstance(found, dict) or not {"labels", "class_names"} & found.keys():
            found = {"labels": found or "nothing"}
        pairs, class_names = found["labels"], found.get("class_names") or []
        if not isinstance(pairs, list | dict | type(None)):
            raise ValueError("no list of labels")
        are_names = isinstance(class_names, list) and all(
            isinstance(name, str) for name in class_names
        )
        if not are_names or len(set(class_names)) < len(class_names):
            raise ValueError("class_names is no list of different names")
    except (ValueError, KeyError) as error:
        why = "it has no 'labels'" if isinstance(error, KeyError) else f"{error!s:.200}"
        raise InputError(f"{LABELS_FILE} cannot be read ({why}); {FORMAT} would do.") from error
    pairs = [list(pair) for pair in pairs.items()] if isinstance(pairs, dict) else pairs or []
    labels = [named for named in map(_named_label, pairs) if named is not None]
    kinds = {label.kind: f"{name!r} has {label.kind}" for name, label in labels}
    if len(kinds) > 1:
        raise InputError(
            f"{LABELS_FILE} has labels of several kinds ({', '.join(kinds.values())}); one kind would do."
        )
    return labels, tuple(class_names)


def _named_label(pair: Any) -> tuple[str, _Label] | None:
    """A name with its label; None for a name that has none. Whatever comes after these is not
    looked at."""
    is_pair = isinstance(pair, list) and len(pair) > 1 and isinstance(pair[0], str)
    if pair is None or (is_pair and pair[1] is None):
        return None
    label = _label(pair[1]) if is_pair else None
    if label is None:
        would_do = '["NAME", 0], with the number or the name of a class,'
        raise InputError(f"{LABELS_FILE} has the label {str(pair)[:80]}; {would_do} would do.")
    return pair[0], label


def _label(value: Any) -> _Label | None:
    """What a label means; None where that is not plain."""
    match value:
        case bool():
            return _Label("true or false", int(value))
        case int():
            return _Label("a number", value)
        case float() if value.is_integer() and abs(value) < 2**53:
            return _Label("a number", int(value))
        case str() if value.strip():
            return _Label("a name", value)
        case list() if (
            value
            and all(type(v) in (int, float) for v in value)
            and sorted(value) == [0] * (len(value) - 1) + [1]
        ):
            return _Label(f"a list of {len(value)}", value.index(1))
    return None


def _resolver(
    images: Sequence[str], folder: str, places: Sequence[str]
) -> Callable[[str], str | None]:
    """A function that finds the image that a name means, however its path is written; None where
    there is none, or several."""
    known = set(images)

    @functools.cache
    def alike() -> dict[str, list[str]]:
        found = collections.defaultdict(list)
        for image in images:
            found[_alike(image)].append(image)
        return found

    def image_called(name: str) -> str | None:
        if (written := posixpath.join(folder, name)) in known:  # as nearly all are
            return written
        plain = posixpath.normpath(name.replace("\\", "/"))
        for place in places:
            plain = plain.removeprefix(f"{place}/")
        paths = [posixpath.join(folder, plain), plain]
        exact = next((path for path in paths if path in known), None)
        found = next((alike()[_alike(path)] for path in paths if _alike(path) in alike()), [])
        return exact or (found[0] if len(found) == 1 else None)

    return image_called


def _alike(name: str) -> str:
    """Equal for names that differ in upper and lower case or in Unicode's normal form."""
    return unicodedata.normalize("NFC", name).casefold()


def _name(label: _Label, class_names: Sequence[str], known: Collection[str]) -> str:
    """What the class of a label is called; `known` is the set of class_names."""
    value = label.value
    if not class_names or value in known:
        return str(value)
    if isinstance(value, str) and re.fullmatch("[0-9]{1,9}", value):
        value = int(value)
    if isinstance(value, int) and value < len(class_names):
        return class_names[value]
    would_do = f"one of its {len(class_names)} class_names, or a number below that,"
    raise InputError(f"{LABELS_FILE} has the class {label.value!r}; {would_do} would do.")


def _one_hot_names(labels: Mapping[str, _Label]) -> tuple[str, ...]:
    """The classes that one-hot lists have room for."""
    found = re.fullmatch("a list of ([0-9]+)", next(iter(labels.values())).kind) if labels else None
    return tuple(map(str, range(int(found[1])))) if found else ()
