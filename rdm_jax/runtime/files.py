"""Files that are there whole or not at all, and JSON in them."""

import difflib
import hashlib
import itertools
import json
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rdm_jax.runtime.console import log
from rdm_jax.runtime.errors import InputError

PNG_END = b"\0\0\0\0IEND\xaeB`\x82"


def local_path(text: str | os.PathLike, field: str) -> Path:
    """A path on this machine as the user gave it, with '~' expanded.

    Args:
      field: the flag or field that it was given by, for the message.

    Raises:
      InputError: it begins with the home of a user who is not known, or is a URL. `Path` would make
        a local folder called 'gs:' of gs://bucket, and everything written to it would be lost with
        the machine.
    """
    scheme, found, _ = os.fspath(text).partition("://")
    if found:
        raise InputError(
            f"{field}={os.fspath(text)!r} is a URL, and {scheme}:// is not supported; a local path, such as that of a mounted "
            "bucket, would do."
        )
    try:
        return Path(text).expanduser()
    except RuntimeError as error:  # of '~NAME/...'
        raise InputError(
            f"{field}={os.fspath(text)!r} cannot be used ({error}); the whole path would do."
        ) from error


def nearest(path: Path) -> Path | None:
    """The path that exists and is spelt almost as this one, which does not: one of its folders or
    the last name is another."""
    missing = next(
        (folder for folder in reversed([path, *path.parents]) if not folder.exists()), None
    )
    if missing is None or not missing.parent.is_dir():
        return None
    there = [other.name for other in missing.parent.iterdir() if not other.name.startswith(".")]
    for name in difflib.get_close_matches(missing.name, there, cutoff=0.75):
        found = missing.with_name(name) / path.relative_to(missing)
        if found.exists():
            return found
    return None


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a path to write to; what was written becomes `path` when the block ends, and is
    removed when it raises."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.incomplete")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def is_aside(folder: Path) -> bool:
    """Whether a folder is called as `move_aside` calls one."""
    return re.search(r"-earlier-\d+$", folder.name) is not None


def move_aside(folder: Path, names: Iterable[str]) -> Path:
    """Moves what a folder has of these files, in this order, to a new folder beside it,
    NAME-earlier-1 or so; returns it."""
    number = next(
        n for n in itertools.count(1) if not folder.with_name(f"{folder.name}-earlier-{n}").exists()
    )
    target = folder.with_name(f"{folder.name}-earlier-{number}")
    target.mkdir()
    for name in names:
        if (folder / name).exists():
            (target / name).parent.mkdir(exist_ok=True)
            (folder / name).rename(target / name)
    return target


def link_or_copy(path: Path, other: Path) -> None:
    """Gives a file a second name, or copies it where the file system knows no such thing."""
    try:
        os.link(path, other)
    except OSError:
        shutil.copyfile(path, other)


@contextmanager
def log_write_errors(path: Path) -> Iterator[None]:
    """A part of a training that writes what it can do without: where the disk does not take it,
    that is said, and no more."""
    try:
        yield
    except OSError as error:
        log.warning(
            "%s cannot be written (%s); training goes on without it", path, error.strerror or error
        )


def is_whole_npz(path: Path, names: Iterable[str]) -> bool:
    """Whether an .npz is there, has these arrays and no others, and each has the checksum that it
    should have."""
    try:
        with zipfile.ZipFile(path) as file:
            return (
                sorted(file.namelist()) == sorted(f"{name}.npy" for name in names)
                and file.testzip() is None
            )
    except Exception:  # a flipped bit may ask for a compression, or a password, that nobody knows
        return False


def is_whole_png(path: Path) -> bool:
    """Whether a PNG is there and ends as one ends: what was cut off, or never written, does not."""
    try:
        with path.open("rb") as file:
            file.seek(-len(PNG_END), os.SEEK_END)
            return file.read() == PNG_END
    except OSError:
        return False


def parse_json(text: str | bytes) -> Any:
    """What JSON from a file says. Raises ValueError where it is none, and where it is nested too
    deep for Python's own parser."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def sha256(path: Path) -> str:
    """The hash of a file's content in hexadecimal; '' where there is no such file."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return ""


def cache_folder() -> Path:
    """Where the user's caches of this project lie."""
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser(
        "~/.cache"
    )  # Path's own raises where there is no home
    return Path(tempfile.gettempdir() if caches.startswith("~") else caches) / "rdm_jax"
