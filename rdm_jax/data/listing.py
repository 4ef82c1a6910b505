"""Tells apart the files of a folder or an archive: images, side files, and what systems leave."""

import collections
import os
import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from rdm_jax.data.images import SUFFIXES, is_image
from rdm_jax.runtime.console import log
from rdm_jax.runtime.errors import BadImage

LABELS_FILE = "dataset.json"
# What systems, file managers and network drives leave behind, in lower case; besides all names that
# begin with a dot.
RUBBISH = {"__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "@eadir", "lost+found"}
RUBBISH |= {"$recycle.bin", "#recycle", "system volume information"}
# What people keep beside images; by suffix, and by name where there is none.
SIDE_SUFFIX = re.compile(
    r"\.(txt|text|jsonl?|[ct]sv|xml|ya?ml|toml|md|rst|html?|css|js|pdf|log|bib|url|sha256|md5)"
)
SIDE_NAME = re.compile(
    "readme|licen[sc]e|copying|notice|authors|change(log|s)|citation|manifest|(md5|sha256)sums"
)
# Image formats that are not supported; a folder of such files is still a folder of images.
UNSUPPORTED = (".heic", ".heif", ".jxl", ".jp2", ".j2k", ".psd", ".svg", ".ico", ".tga", ".exr")
UNSUPPORTED += (".hdr", ".dcm", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2")
ARCHIVE = re.compile(r"\.(zip|tar|tgz|gz|xz|bz2|7z|rar)$")
# Control characters, and bytes that are not UTF-8.
NO_TEXT = re.compile("[\\x00-\\x1f\\x7f\\ud800-\\udfff]")


def is_rubbish(name: str) -> bool:
    """Whether a file or folder was put there by a system for its own ends."""
    return name.startswith(".") or name.lower() in RUBBISH


def is_side_file(name: str) -> bool:
    """Whether a file is of a kind that people keep beside images, and is not an image itself."""
    stem, suffix = os.path.splitext(name.rpartition("/")[2].lower())
    return bool(SIDE_SUFFIX.fullmatch(suffix) or (not suffix and SIDE_NAME.fullmatch(stem)))


def is_meant_as_image(name: str) -> bool:
    """Whether a file has the suffix of an image format, supported or not."""
    return name.lower().endswith((*SUFFIXES, *UNSUPPORTED))


class Listing(NamedTuple):
    """The files of a folder or an archive, sorted out.

    Attributes:
      images: names, sorted.
      labels_files: names of files called LABELS_FILE, in upper or lower case.
      unusable: what is neither an image nor a side file, and why.
    """

    images: list[str]
    labels_files: list[str]
    unusable: dict[str, BadImage]


def sort_out(names: Iterable[str], read_head: Callable[[str], bytes], place: str) -> Listing:
    """Tells images, labels files, side files (which are counted in the log) and others apart.

    Args:
      names: of all files.
      read_head: returns the first bytes of a file; they decide where the suffix is unknown.
      place: the folder or archive, for the log.
    """
    images: list[str] = []
    labels_files: list[str] = []
    side: list[str] = []
    unusable: dict[str, BadImage] = {}
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
            unusable[name] = BadImage(
                "is not an image but an archive",
                "Unpack it, or use it alone as zip:PATH or tar:PATH.",
            )
        else:
            unusable[name] = BadImage("is not an image", f"Use {', '.join(SUFFIXES)}.")
    if side:
        _log_side_files(side, images, place)
    return Listing(images, labels_files, unusable)


def _log_side_files(side: list[str], images: list[str], place: str) -> None:
    """Counts side files by kind, and names the folders that hold nothing else."""
    kinds = collections.Counter(
        os.path.splitext(name)[1].lower() or name.rpartition("/")[2] for name in side
    )
    with_images = {folder for name in images for folder in folders_of(name)}
    without = sorted({folder for name in side for folder in folders_of(name)} - with_images)
    if without:
        log.info(
            "data: no image is in the folder %s of %s",
            ", ".join(map(repr, without[:5])) + (", ..." if len(without) > 5 else ""),
            place,
        )
    log.info(
        "data: %s file(s) beside the images of %s are ignored (%s), such as %r",
        f"{len(side):,}",
        place,
        ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common(5)),
        side[0],
    )


def folders_of(name: str) -> Iterator[str]:
    """All folders that contain a file, the innermost first."""
    while name := name.rpartition("/")[0]:
        yield name
