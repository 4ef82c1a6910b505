"""Which class an image is of, by the folder it lies in or by the name of its file, and the order of
classes.

Classes are known by their names. The number of a class is its place in the order, and nothing else.
"""

import collections
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from rdm_jax.data.listing import NO_TEXT
from rdm_jax.runtime.console import log
from rdm_jax.runtime.errors import InputError

RULES = ("auto", "top", "leaf", "prefix", "none")
# Folders that are parts of one set and no classes, in lower case.
TRAINING, OTHERS = (
    {"train", "training"},
    {"val", "valid", "validation", "test", "testing", "dev", "eval"},
)
# What is before the number of a file: 'cat_01.png', 'cat-1.png', 'cat (1).png', 'cat.1.jpg'.
PREFIX = re.compile(r"(.*[^ _.\-(])[ _.\-]+\(?\d+\)?$")


class Labelled(NamedTuple):
    """Images and their classes.

    Attributes:
      class_names: in order; empty when the images have none.
      numbers: the class number of each image that can be used, by its name; empty when there are no
        classes.
      skipped: what was left out, and why.
      lost: classes that a labels file names, and of which no image is left.
    """

    class_names: tuple[str, ...] = ()
    numbers: Mapping[str, int] = {}
    skipped: Mapping[str, str] = {}
    lost: tuple[str, ...] = ()


def by_rule(images: Sequence[str], rule: str, spec: str) -> Labelled:
    """Makes classes of the folders or of the names of files.

    Args:
      images: the names of all.
      rule: one of RULES.
      spec: of the source, for the log and for errors.

    Raises:
      InputError: it cannot be told what is meant.
    """
    if rule == "none" or not images:
        return Labelled()
    if rule == "prefix":
        reason = "has no number after a separator at its end, as cat_01 has"
        return _named({name: _prefix(name) or "" for name in images}, reason, spec)
    folders = {name: name.rpartition("/")[0] for name in images}
    about = _looked_through(folders.values(), rule, spec)
    folders = {name: folder[len(about) :].removeprefix("/") for name, folder in folders.items()}
    if rule == "auto" and not any(folders.values()):
        _log_prefixes(images, spec)
        return Labelled()
    if rule == "auto":
        _refuse_split(folders.values(), spec, about)
        _log_choice(folders.values(), spec)
    if rule == "leaf":
        _log_merged(folders.values(), spec)
    part = -1 if rule == "leaf" else 0
    return _named(
        {name: folder.split("/")[part] for name, folder in folders.items()},
        "is in no folder, as others are",
        spec,
    )


def ordered(names: Iterable[str], where: str) -> tuple[str, ...]:
    """Class names in order: as numbers where all are numbers, else by their characters. Raises
    InputError for '1' and '01'."""
    names = set(names)
    if not all(re.fullmatch("[0-9]+", name) for name in names):
        return tuple(sorted(names))
    by_number = collections.defaultdict(list)
    for name in sorted(names):
        by_number[name.lstrip("0")].append(name)
    for same in by_number.values():
        if len(same) > 1:
            raise InputError(
                f"{where} has the classes {' and '.join(map(repr, same))}, which are one number; another name for one would do."
            )
    return tuple(
        by_number[digits][0]
        for digits in sorted(by_number, key=lambda digits: (len(digits), digits))
    )


def kept_names(names: Sequence[str], spec: str) -> tuple[str, ...]:
    """The names as tensorflow-datasets keeps them: a line each, without spaces about it.

    Raises:
      InputError: a name would not be kept, or two would be the same.
    """
    kept = tuple(name.strip() for name in names)
    counts = collections.Counter(kept)
    for before, name in zip(names, kept, strict=True):
        wrong = "has an empty name" * (not name) or "is called like another but for spaces" * (
            counts[name] > 1
        )
        if NO_TEXT.search(name) or len(name.splitlines()) > 1:
            wrong = "has a line break or another character that is no text in its name"
        if wrong:
            raise InputError(f"the class {before!r} of {spec} {wrong}; another name would do.")
        if name != before:
            log.info(
                "data: the class %r of %s is called %r, for names are kept without spaces about them",
                before,
                spec,
                name,
            )
    return kept


def _named(classes: Mapping[str, str], reason: str, spec: str) -> Labelled:
    """Images by the name of their class; '' for those that have none, with the reason."""
    would_do = "data.classes='none' for no classes, or moving or renaming it,"
    skipped = {
        name: f"{reason}; {would_do} would do." for name, found in classes.items() if not found
    }
    class_names = ordered((found for found in classes.values() if found), spec)
    number = {name: i for i, name in enumerate(class_names)}
    return Labelled(
        class_names, {name: number[found] for name, found in classes.items() if found}, skipped
    )


def wrapper(folders: Iterable[str]) -> str:
    """The folder about all others, as unpacking or zipping leaves it; '' for none."""
    folders = set(folders)
    return (
        "/".join(os.path.commonprefix([folder.split("/") for folder in folders]))
        if all(folders)
        else ""
    )


def _looked_through(folders: Collection[str], rule: str, spec: str) -> str:
    """The folder about all others, which is no class."""
    about = wrapper(folders)
    if about and rule != "auto" and about in folders:
        about = about.rpartition("/")[0]  # who asks for folders as classes means this one
    if about:
        single = (
            "; they have no classes (data.classes='leaf' makes its name their class)"
            if about in folders
            else ""
        )
        log.info(
            "data: the images of %s are all in the folder %r, which is looked through%s",
            spec,
            about,
            single,
        )
    return about


def _refuse_split(folders: Iterable[str], spec: str, about: str) -> None:
    top = sorted({folder.split("/")[0] for folder in folders} - {""})
    kinds = [_kind_of_part(name) for name in top]
    if len(top) < 2 or not set(kinds) <= TRAINING | OTHERS or not TRAINING & set(kinds):
        return
    training = next(name for name, kind in zip(top, kinds, strict=True) if kind in TRAINING)
    path = "/".join(filter(None, (spec.partition(":")[2].rstrip("/"), about, training)))
    one = f"{spec.partition(':')[0]}:{path} for that part"
    everything = "data.classes='leaf' (classes are the folders with the images), 'top' or 'none' for all images together"
    raise InputError(
        f"{spec} has the folders {', '.join(top)}, which are parts of one set and no classes; {one}, or {everything}, would do."
    )


def _kind_of_part(folder: str) -> str:
    """The first word of a folder's name: 'train' of 'train2017', 'train_set', 'TrainSet' and
    'trainset'."""
    word = re.split(r"[\W_\d]|(?<=[a-z])(?=[A-Z])", folder)[0].lower()
    return re.sub("(?<=.)(set|data|images)$", "", word)


def _log_choice(folders: Iterable[str], spec: str) -> None:
    folders = set(folders) - {""}
    top, leaves, deepest = (
        {f.split("/")[0] for f in folders},
        {f.rpartition("/")[2] for f in folders},
        max(f.count("/") for f in folders),
    )
    if deepest:
        about = (spec, f"{len(top):,}", deepest + 1, f"{len(leaves):,}")
        log.info(
            "data: the classes of %s are its %s top folders (data.classes='top'); folders are up to %d deep: data.classes='leaf' "
            "takes the %s names of those that the images lie in, 'none' no classes",
            *about,
        )


def _log_merged(folders: Iterable[str], spec: str) -> None:
    places = collections.defaultdict(set)
    for folder in folders:
        places[folder.rpartition("/")[2]].add(folder)
    merged = {name: sorted(found) for name, found in places.items() if len(found) > 1}
    if merged:
        name, found = next(iter(sorted(merged.items())))
        about = (f"{len(merged):,}", spec, name, " and ".join(found[:2]))
        log.info(
            "data: %s names of folders are in several places of %s and are one class each: %r is in %s",
            *about,
        )


def _prefix(name: str) -> str | None:
    stem = os.path.splitext(name.rpartition("/")[2])[0]
    found = PREFIX.match(stem) if len(stem) < 256 else None  # an archive's may be of any length
    return found[1] if found else None


def _log_prefixes(images: Sequence[str], spec: str) -> None:
    """Says so where the names of files look as if they began with a class."""
    counts = collections.Counter(map(_prefix, images))
    missing = counts.pop(None, 0)
    if len(counts) > 1 and 10 * missing <= len(images) and 2 * len(counts) <= len(images):
        some = ", ".join(map(repr, sorted(counts)[:3]))
        about = (spec, len(counts), some)
        log.info(
            "data: no classes for %s; file names have %d prefixes (%s), which data.classes='prefix' makes classes",
            *about,
        )
