"""Which files of a folder or an archive are meant as images, which lie beside them, and which no
user put there."""

import collections
import os
import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from rdm_jax.data.images import SUFFIXES, is_image
from rdm_jax.runtime.console import log

LABELS_FILE = "dataset.json"
# What systems, file managers and network drives leave behind, in lower case; besides all names that
# begin with a dot.
RUBBISH = frozenset(
    [
        "__macosx",
        "thumbs.db",
        "ehthumbs.db",
        "desktop.ini",
        "@eadir",
        "icon\r",
        "lost+found",
        "$recycle.bin",
        "#recycle",
    ]
    + ["system volume information"]
)
# What people keep beside images; by suffix, and by name where there is none.
SIDE_SUFFIX = re.compile(
    r"\.(txt|text|jsonl?|[ct]sv|xml|ya?ml|toml|md|rst|html?|css|js|pdf|log|bib|url|sha256|md5)"
)
SIDE_NAME = re.compile(
    "readme|licen[sc]e|copying|notice|authors|change(log|s)|citation|manifest|(md5|sha256)sums"
)
# Images that cannot be read here; a folder of them is meant as images all the same.
UNREADABLE = (
    ".heic",
    ".heif",
    ".jxl",
    ".jp2",
    ".j2k",
    ".psd",
    ".svg",
    ".ico",
    ".tga",
    ".exr",
    ".hdr",
    ".dcm",
)
UNREADABLE += (".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2")
ARCHIVE = re.compile(r"\.(zip|tar|tgz|gz|xz|bz2|7z|rar)$")
NO_TEXT = re.compile(
    "[\\x00-\\x1f\\x7f\\ud800-\\udfff]"
)  # control characters, and bytes that are no UTF-8


def is_rubbish(name: str) -> bool:
    """Whether a file or folder was put there by a system for its own ends, and is not meant."""
    return name.startswith(".") or name.lower() in RUBBISH


def is_side_file(name: str) -> bool:
    """Whether a file is one that people keep beside images, and is no image."""
    stem, suffix = os.path.splitext(name.rpartition("/")[2].lower())
    return bool(SIDE_SUFFIX.fullmatch(suffix) or (not suffix and SIDE_NAME.fullmatch(stem)))


def is_meant_as_image(name: str) -> bool:
    """Whether a file is called as images are, of any kind."""
    return name.lower().endswith((*SUFFIXES, *UNREADABLE))


class Listing(NamedTuple):
    """The names in a place, sorted out.

    Attributes:
      images: in order of name.
      labels_files: those called LABELS_FILE, in upper or lower case.
      unusable: what is neither an image nor a side file, and why.
    """

    images: list[str]
    labels_files: list[str]
    unusable: dict[str, str]


def sort_out(names: Iterable[str], read_head: Callable[[str], bytes], place: str) -> Listing:
    """Tells images, labels files, side files (which are counted in the log) and strangers apart.

    Args:
      names: of all files.
      read_head: gives the first bytes of a file, which decide where its suffix is not known.
      place: for the log.
    """
    images, labels_files, side, unusable = [], [], [], {}
    for name in sorted(names):
        if name.lower().endswith(SUFFIXES):
            images.append(name)
        elif name.rpartition("/")[2].lower() == LABELS_FILE:
            labels_files.append(name)
        elif is_side_file(name):
            side.append(name)
        elif is_image(read_head(name)):
            images.append(name)
        elif ARCHIVE.search(name.lower()):
            unusable[name] = (
                "is not an image but an archive; unpacking it, or zip:PATH or tar:PATH for it alone, would do."
            )
        else:
            unusable[name] = f"is not an image; nothing but {', '.join(SUFFIXES)} would do."
    if side:
        kinds = collections.Counter(
            os.path.splitext(name)[1].lower() or name.rpartition("/")[2] for name in side
        )
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common(5))
        alone = sorted(
            {folder for name in side for folder in folders_of(name)}
            - {f for name in images for f in folders_of(name)}
        )
        if alone:
            log.info(
                "data: no image is in the folder %s of %s",
                ", ".join(map(repr, alone[:5])) + ", ..." * (len(alone) > 5),
                place,
            )
        log.info(
            "data: %s file(s) beside the images of %s are not looked at (%s), such as %r",
            f"{len(side):,}",
            place,
            kinds,
            side[0],
        )
    return Listing(images, labels_files, unusable)


def folders_of(name: str) -> Iterator[str]:
    """All folders that a file lies in."""
    while name := name.rpartition("/")[0]:
        yield name
