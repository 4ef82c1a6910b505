"""Labels from EDM's dataset.json, and from variants of it that have only one meaning."""

import collections
import functools
import posixpath
import re
import unicodedata
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from rdm_jax.data.class_rules import Labelled, ordered
from rdm_jax.data.listing import LABELS_FILE
from rdm_jax.runtime.errors import BadImage, InputError
from rdm_jax.runtime.files import parse_json

FORMAT = '{"labels": [["NAME", 0], ...]}'


class _Label(NamedTuple):
    """A label and the kind it was written as; labels of different kinds are never equal."""

    kind: str
    value: int | str
    length: int = 0  # of a one-hot list


def by_labels_file(
    content: bytes, images: Sequence[str], folder: str, places: Sequence[str]
) -> Labelled:
    """The classes of images from a labels file.

    The labels are pairs of a name and a label, in a list or a dict, alone or as "labels" beside
    "class_names" (the names of all classes, in order). A label is an integer, a name, true or
    false, or a one-hot list. Without "class_names" the name of a class is its number, so that
    numbers may begin anywhere and have gaps.

    Args:
      content: of the file.
      images: the names of all images.
      folder: of the file, to which names are relative; '' for the top.
      places: the paths of the source, with which absolute names begin.

    Raises:
      InputError: it is damaged or ambiguous; one error for the whole file.
    """
    pairs, class_names = _parse(content)
    if not pairs:
        return Labelled()

    # Find the image of each label.
    image_called = _resolver(images, folder, places)
    labels: dict[str, _Label] = {}
    missing: dict[str, _Label] = {}
    for name, label in pairs:
        image = image_called(name)
        if image is None:
            missing[name] = label
        elif labels.setdefault(image, label) != label:
            raise InputError(f"{LABELS_FILE} has two labels for {name!r}", "Keep one of them.")
    if images and not labels:
        raise InputError(
            f"{LABELS_FILE} names {next(iter(missing))!r} and no image that exists",
            f"Use names such as {images[0]!r}.",
        )

    # Leave out images without a usable label, and labels without an image.
    skipped = dict.fromkeys(
        missing, BadImage(f"is listed in {LABELS_FILE} but missing", "Add the file.")
    )
    skipped |= dict.fromkeys(
        (name for name in images if name not in labels),
        BadImage(f"has no label in {LABELS_FILE}", "Add one."),
    )
    skipped |= dict.fromkeys(
        (name for name, label in labels.items() if _is_negative(label)),
        BadImage(f"has a negative class number in {LABELS_FILE}", "Use 0 or more."),
    )

    # Name and number the classes of the others.
    known = frozenset(class_names)
    named = {
        name: _name(label, class_names, known)
        for name, label in labels.items()
        if name not in skipped
    }
    all_names = class_names or _one_hot_names(labels) or ordered(named.values(), LABELS_FILE)
    number = {name: i for i, name in enumerate(all_names)}
    unused = {label for label in missing.values() if not _is_negative(label)}
    lost = {_name(label, class_names, known) for label in unused} - set(named.values())
    numbers = {image: number[name] for image, name in named.items()}
    return Labelled(all_names, numbers, skipped, tuple(sorted(lost)))


def has_labels(content: bytes) -> bool:
    """Whether a labels file is meant to have labels; not if it has nothing but captions."""
    if b'"captions"' not in content:
        return True
    try:
        found = parse_json(content)
    except ValueError:
        return True  # `by_labels_file` says what is wrong
    captions_alone = isinstance(found, dict) and "captions" in found
    return not captions_alone or bool({"labels", "class_names"} & found.keys())


def _is_negative(label: _Label) -> bool:
    return isinstance(label.value, int) and label.value < 0


def _parse(content: bytes) -> tuple[list[tuple[str, _Label]], tuple[str, ...]]:
    """The names with their labels; and the names of the classes, () if the file has none."""
    try:
        found = parse_json(content)
        if not isinstance(found, dict) or not {"labels", "class_names"} & found.keys():
            found = {"labels": found or "nothing"}
        pairs = found["labels"]
        class_names = found.get("class_names") or []
        if not isinstance(pairs, list | dict | type(None)):
            raise ValueError("labels is not a list")
        are_names = isinstance(class_names, list) and all(
            isinstance(name, str) for name in class_names
        )
        if not are_names or len(set(class_names)) < len(class_names):
            raise ValueError("class_names is not a list of different names")
    except (ValueError, KeyError) as error:
        why = "it has no 'labels'" if isinstance(error, KeyError) else f"{error!s:.200}"
        raise InputError(f"{LABELS_FILE} cannot be read ({why})", f"Write {FORMAT}.") from error
    pairs = [list(pair) for pair in pairs.items()] if isinstance(pairs, dict) else pairs or []
    labels = [named for named in map(_named_label, pairs) if named is not None]
    kinds = {label.kind: f"{name!r} has {label.kind}" for name, label in labels}
    if len(kinds) > 1:
        raise InputError(
            f"{LABELS_FILE} has labels of several kinds ({', '.join(kinds.values())})",
            "Use one kind.",
        )
    return labels, tuple(class_names)


def _named_label(pair: Any) -> tuple[str, _Label] | None:
    """A name with its label; None for a name without. Anything after these two is ignored."""
    is_pair = isinstance(pair, list) and len(pair) > 1 and isinstance(pair[0], str)
    if pair is None or (is_pair and pair[1] is None):
        return None
    label = _label(pair[1]) if is_pair else None
    if label is None:
        raise InputError(
            f"{LABELS_FILE} has the label {str(pair)[:80]}",
            'Write ["NAME", 0], with the number or the name of a class.',
        )
    return pair[0], label


def _label(value: Any) -> _Label | None:
    """The meaning of a label; None if it is ambiguous."""
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
            return _Label(f"a list of {len(value)}", value.index(1), len(value))
    return None


def _resolver(
    images: Sequence[str], folder: str, places: Sequence[str]
) -> Callable[[str], str | None]:
    """A function from a name, however written, to its image; to None for none or several."""
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
    """Equal for names that differ only in case or in Unicode's normal form."""
    return unicodedata.normalize("NFC", name).casefold()


def _name(label: _Label, class_names: Sequence[str], known: Collection[str]) -> str:
    """The name of a label's class; `known` is the set of `class_names`."""
    value = label.value
    if not class_names or value in known:
        return str(value)
    if isinstance(value, str) and re.fullmatch("[0-9]{1,9}", value):
        value = int(value)
    if isinstance(value, int) and value < len(class_names):
        return class_names[value]
    raise InputError(
        f"{LABELS_FILE} has the class {label.value!r}",
        f"Use one of its {len(class_names)} class_names, or a number below that.",
    )


def _one_hot_names(labels: Mapping[str, _Label]) -> tuple[str, ...]:
    """The classes of one-hot lists, by their length; () for labels of another kind."""
    length = next(iter(labels.values())).length if labels else 0
    return tuple(map(str, range(length)))
