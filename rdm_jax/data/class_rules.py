"""Classes of images from their folders or file names, and the order of classes.

Classes are known by their names. The index of a class is its place in the order, and nothing else.
"""

import collections
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from rdm_jax.data.listing import NO_TEXT, is_meant_as_image
from rdm_jax.runtime.console import log
from rdm_jax.runtime.errors import BadImage, InputError

RULES = ("auto", "top", "leaf", "prefix", "none")
# Names of folders that are splits of one set and not classes, in lower case.
TRAINING = {"train", "training"}
OTHERS = {"val", "valid", "validation", "test", "testing", "dev", "eval"}
# What precedes the number in a file name: 'cat_01.png', 'cat-1.png', 'cat (1).png', 'cat.1.jpg'.
PREFIX = re.compile(r"(.*[^ _.\-(])[ _.\-]+\(?\d+\)?$")


class Labelled(NamedTuple):
    """Images and their classes.

    Attributes:
      class_names: in order; empty for images without classes.
      numbers: the class index of each usable image, by its name; empty without classes.
      skipped: what is left out, and why.
      lost: classes that a labels file names, and of which no image is left.
    """

    class_names: tuple[str, ...] = ()
    numbers: Mapping[str, int] = {}
    skipped: Mapping[str, BadImage] = {}
    lost: tuple[str, ...] = ()


def by_rule(images: Sequence[str], rule: str, spec: str) -> Labelled:
    """Derives classes from folders or from file names.

    Args:
      images: the names of all images.
      rule: one of RULES.
      spec: of the source, for the log and for errors.

    Raises:
      InputError: the classes are ambiguous.
    """
    if rule == "none" or not images:
        return Labelled()
    if rule == "prefix":
        reason = "has no number after a separator at the end of its name, as cat_01 has"
        return _named({name: _prefix(name) or "" for name in images}, reason, spec)
    folders = {name: name.rpartition("/")[0] for name in images}
    outer = _ignored_wrapper(folders.values(), rule, spec)
    folders = {name: folder[len(outer) :].removeprefix("/") for name, folder in folders.items()}
    if rule == "auto" and not any(folders.values()):
        _log_prefixes(images, spec)
        return Labelled()
    if rule == "auto":
        _refuse_split(folders.values(), spec, outer)
        _log_choice(folders.values(), spec)
    if rule == "leaf":
        _log_merged(folders.values(), spec)
    part = -1 if rule == "leaf" else 0
    return _named(
        {name: folder.split("/")[part] for name, folder in folders.items()},
        "is in no folder, whereas other images are",
        spec,
    )


def ordered(names: Iterable[str], where: str) -> tuple[str, ...]:
    """Class names in order: numerically if all are numbers, else by their characters.

    Args:
      where: the source or file, for errors.

    Raises:
      InputError: two names are the same number, such as '1' and '01'.
    """
    names = set(names)
    if not all(re.fullmatch("[0-9]+", name) for name in names):
        return tuple(sorted(names))
    by_number = collections.defaultdict(list)
    for name in sorted(names):
        by_number[name.lstrip("0")].append(name)
    for same in by_number.values():
        if len(same) > 1:
            raise InputError(
                f"{where} has the classes {' and '.join(map(repr, same))}, which are one number",
                "Rename one of them.",
            )
    return tuple(
        by_number[digits][0]
        for digits in sorted(by_number, key=lambda digits: (len(digits), digits))
    )


def kept_names(names: Sequence[str], spec: str) -> tuple[str, ...]:
    """The names as tensorflow-datasets keeps them: one per line, without surrounding spaces.

    Raises:
      InputError: a name cannot be kept, or two become the same.
    """
    kept = tuple(name.strip() for name in names)
    counts = collections.Counter(kept)
    for before, name in zip(names, kept, strict=True):
        wrong = ""
        if NO_TEXT.search(name) or len(name.splitlines()) > 1:
            wrong = "has a line break or another control character in its name"
        elif not name:
            wrong = "has an empty name"
        elif counts[name] > 1:
            wrong = "has the name of another class, except for spaces"
        if wrong:
            raise InputError(f"the class {before!r} of {spec} {wrong}", "Rename it.")
        if name != before:
            log.info(
                "data: the class %r of %s is called %r: surrounding spaces are removed",
                before,
                spec,
                name,
            )
    return kept


def _named(classes: Mapping[str, str], reason: str, spec: str) -> Labelled:
    """Images from the name of their class, which is '' for those without; these are left out.

    Args:
      classes: the name of each image's class, by the image's name.
      reason: why an image has no class.
      spec: of the source, for errors.
    """
    bad = BadImage(reason, "Set data.classes='none' for no classes, or move or rename it.")
    skipped = {name: bad for name, found in classes.items() if not found}
    class_names = ordered((found for found in classes.values() if found), spec)
    number = {name: i for i, name in enumerate(class_names)}
    numbers = {name: number[found] for name, found in classes.items() if found}
    return Labelled(class_names, numbers, skipped)


def wrapper(folders: Iterable[str]) -> str:
    """The folder that contains all others, as unpacking or zipping leaves it; '' for none."""
    folders = set(folders)
    if not all(folders):
        return ""
    return "/".join(os.path.commonprefix([folder.split("/") for folder in folders]))


def _ignored_wrapper(folders: Collection[str], rule: str, spec: str) -> str:
    """The folder that contains all others, and is not a class; '' for none."""
    outer = wrapper(folders)
    if outer and rule != "auto" and outer in folders:
        outer = outer.rpartition("/")[0]  # a user who asks for folders as classes means this one
    if outer:
        log.info(
            "data: the images of %s are all in the folder %r, which is ignored%s",
            spec,
            outer,
            "; they have no classes (data.classes='leaf' makes its name their class)"
            if outer in folders
            else "",
        )
    return outer


def _refuse_split(folders: Iterable[str], spec: str, outer: str) -> None:
    """Raises InputError if the top folders are splits (train, val, ...) instead of classes."""
    top = sorted({folder.split("/")[0] for folder in folders} - {""})
    kinds = [_kind_of_part(name) for name in top]
    if len(top) < 2 or not set(kinds) <= TRAINING | OTHERS or not TRAINING & set(kinds):
        return
    training = next(name for name, kind in zip(top, kinds, strict=True) if kind in TRAINING)
    kind, _, root = spec.partition(":")
    path = "/".join(filter(None, (root.rstrip("/"), outer, training)))
    raise InputError(
        f"{spec} has the folders {', '.join(top)}, which are splits of one set and not classes",
        f"Use {kind}:{path} for that split, or set data.classes='leaf' (classes are the folders "
        "with the images), 'top' or 'none' for all images together.",
    )


def _kind_of_part(folder: str) -> str:
    """The first word of a folder's name: 'train' of 'train2017', 'train_set', 'TrainSet' and
    'trainset'."""
    word = re.split(r"[\W_\d]|(?<=[a-z])(?=[A-Z])", folder)[0].lower()
    return re.sub("(?<=.)(set|data|images)$", "", word)


def _log_choice(folders: Iterable[str], spec: str) -> None:
    """Logs which folders of a nested tree are the classes."""
    folders = set(folders) - {""}
    top = {folder.split("/")[0] for folder in folders}
    leaves = {folder.rpartition("/")[2] for folder in folders}
    deepest = max(folder.count("/") for folder in folders)
    if deepest:
        log.info(
            "data: the classes of %s are its %s top folders (data.classes='top'); folders are up "
            "to %d deep: data.classes='leaf' uses the %s names of those that contain the images, "
            "'none' no classes",
            spec,
            f"{len(top):,}",
            deepest + 1,
            f"{len(leaves):,}",
        )


def _log_merged(folders: Iterable[str], spec: str) -> None:
    """Logs that folders of one name in several places are one class."""
    places = collections.defaultdict(set)
    for folder in folders:
        places[folder.rpartition("/")[2]].add(folder)
    merged = {name: sorted(found) for name, found in places.items() if len(found) > 1}
    if merged:
        name, found = next(iter(sorted(merged.items())))
        log.info(
            "data: %s names of folders of %s occur in several places and are one class each: "
            "%r is in %s",
            f"{len(merged):,}",
            spec,
            name,
            " and ".join(found[:2]),
        )


def _prefix(name: str) -> str | None:
    """What precedes the number in a file name; None if there is no number."""
    stem = os.path.splitext(name.rpartition("/")[2])[0]
    found = PREFIX.match(stem) if len(stem) < 256 else None  # an archive's may be of any length
    return found[1] if found else None


def _log_prefixes(images: Sequence[str], spec: str) -> None:
    """Logs a hint if the names of files seem to begin with a class."""
    counts = collections.Counter(map(_prefix, images))
    missing = counts.pop(None, 0)
    if len(counts) > 1 and 10 * missing <= len(images) and 2 * len(counts) <= len(images):
        log.info(
            "data: no classes for %s; file names have %d prefixes (%s), which are the classes with "
            "data.classes='prefix'",
            spec,
            len(counts),
            ", ".join(map(repr, sorted(counts)[:3])),
        )


def lost_classes(images: Sequence[str], skipped: Iterable[str], rule: str) -> tuple[str, ...]:
    """The classes of folders that are empty or contain unusable images only."""
    if rule in ("none", "prefix"):
        return ()
    left_out = [
        name for name in skipped if "/" in name and (name.endswith("/") or is_meant_as_image(name))
    ]
    outer = ""
    if rule != "leaf":
        outer = wrapper({name.rpartition("/")[0] for name in (*images, *left_out)})
    part = -2 if rule == "leaf" else 0

    def classes_of(names: Iterable[str]) -> set[str]:
        below = (name[len(outer) :].removeprefix("/") for name in names)
        return {path.split("/")[part] for path in below if "/" in path}

    found = classes_of(images)
    return tuple(sorted(classes_of(left_out) - found - {"", ".."})) if found else ()
