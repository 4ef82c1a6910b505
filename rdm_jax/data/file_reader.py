"""Which reader a path on disk has: a folder, a zip or a tar, or a folder in an archive."""

import difflib
import os
from collections.abc import Iterable
from pathlib import Path

from rdm_jax.data import archives, readers
from rdm_jax.data.listing import folders_of
from rdm_jax.runtime.console import log
from rdm_jax.runtime.errors import InputError


def containing_archive(path: Path) -> tuple[Path, str]:
    """The archive that a path leads into, and the folder in it with a slash; else path and ''."""
    if not os.path.exists(path):
        for above in path.parents:
            if os.path.isfile(above):
                return above, f"{path.relative_to(above).as_posix()}/"
    return path, ""


def no_such_folder(archive: Path, inner: str, names: Iterable[str]) -> InputError:
    """The error for a folder that an archive does not have; `names` are those of its files."""
    folders = sorted({folder for name in names for folder in folders_of(name)})
    close = [
        folder for folder in folders if folder.lower() == inner.lower()
    ] or difflib.get_close_matches(inner, folders, cutoff=0.75)
    shown = ", ".join(repr(folder) for folder in (close or folders)[:3])
    fix = "Use the archive itself: its files are in no folder."
    if shown:
        fix = f"Use {shown}." if close else f"Use {shown} or another folder in it."
    return InputError(f"there is no folder {inner!r} with files in {archive}", fix)


def reader_of(kind: str, path: Path) -> readers.Folder | archives.Archive:
    """The reader for what exists at a path: a folder, a zip or a tar, whatever `kind` says."""
    found = kind
    if os.path.isdir(path):
        found = "folder"
    elif os.path.isfile(path) and archives.is_zip(path):
        found = "zip"
    elif os.path.isfile(path) and (kind == "tar" or archives.is_tar(path)):
        found = "tar"
    elif os.path.isfile(path) and kind == "folder":
        raise InputError(
            f"{path} is a file but not a folder, zip or tar", "Give the path of one of these."
        )
    if found != kind != "emoji":
        log.info("data: %s:%s is a %s, and is read as one", kind, path, found)
    if found == "zip":
        return archives.Zip(path)
    if found == "tar":
        return archives.Tar(path)
    return readers.Folder(path)
