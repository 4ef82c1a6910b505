"""Files written atomically, checked when read, and found by nearly their name."""

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
from rdm_jax.runtime.mounts import AnyPath

PNG_END = b"\0\0\0\0IEND\xaeB`\x82"


def local_path(text: str | os.PathLike[str], field: str) -> Path:
    """Returns the local path that the user gave, with '~' expanded; buckets are refused.

    Args:
      field: the flag or config field that holds the path, for the message.

    Raises:
      InputError: it is a URL, or '~NAME' names an unknown user. `Path` would turn gs://bucket into
        a local folder 'gs:', and everything written to it would be lost with the machine.
    """
    scheme, separator, rest = os.fspath(text).partition("://")
    if separator:
        fix = "Use a local path, such as that of a mounted bucket."
        if scheme == "hf":
            fix = "Use a local path; by name a whole relay is loaded or imported, nothing else."
        if scheme == "gs":
            bucket, _, folder = rest.strip("/").partition("/")
            command = f"gcsfuse --implicit-dirs {bucket} /mnt/{bucket}"
            fix = f"Mount it with '{command}', and use /mnt/{bucket}/{folder}."
        raise InputError(
            f"{field}={os.fspath(text)!r} is a URL, and {scheme}:// is not supported here", fix
        )
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise InputError(
            f"{field}={os.fspath(text)!r} cannot be expanded ({error})", "Use the absolute path."
        ) from error


def nearest(path: Path) -> Path | None:
    """Returns an existing path spelled almost like `path`, which does not exist; else None.

    The two differ in the name of one folder, or in the last name.
    """
    missing = next(
        (folder for folder in reversed([path, *path.parents]) if not folder.exists()), None
    )
    if missing is None or not missing.parent.is_dir():
        return None
    names = [other.name for other in missing.parent.iterdir() if not other.name.startswith(".")]
    for name in difflib.get_close_matches(missing.name, names, cutoff=0.75):
        candidate = missing.with_name(name) / path.relative_to(missing)
        if candidate.exists():
            return candidate
    return None


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary path that replaces `path` when the block ends; it is removed on errors."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.incomplete")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def is_aside(folder: Path) -> bool:
    """Whether a folder has a name that `move_aside` gives."""
    return re.search(r"-earlier-\d+$", folder.name) is not None


def move_aside(folder: Path, names: Iterable[str]) -> Path:
    """Moves these files of a folder, in this order, to a new folder NAME-earlier-N beside it.

    Files that do not exist are skipped. Returns the new folder.
    """
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
    """Hard-links a file, or copies it if the file system has no hard links."""
    try:
        os.link(path, other)
    except OSError:
        shutil.copyfile(path, other)


@contextmanager
def log_write_errors(path: AnyPath) -> Iterator[None]:
    """Logs an OSError instead of raising it, for files that training can do without."""
    try:
        yield
    except OSError as error:
        log.warning("%s cannot be written (%s); training continues", path, error.strerror or error)


def is_whole_npz(path: Path, names: Iterable[str]) -> bool:
    """Whether an .npz exists and holds exactly these arrays, each with its right checksum."""
    try:
        with zipfile.ZipFile(path) as file:
            return (
                sorted(file.namelist()) == sorted(f"{name}.npy" for name in names)
                and file.testzip() is None
            )
    except Exception:  # a flipped bit may ask for an unknown compression, or for a password
        return False


def is_whole_png(path: Path) -> bool:
    """Whether a PNG exists and ends with its end marker: truncated files do not."""
    try:
        with path.open("rb") as file:
            file.seek(-len(PNG_END), os.SEEK_END)
            return file.read() == PNG_END
    except OSError:
        return False


def parse_json(text: str | bytes) -> Any:
    """Parses JSON. Raises ValueError if it is invalid, or nested too deep for Python's parser."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def sha256(path: AnyPath) -> str:
    """Returns the SHA-256 of a file's content in hexadecimal; '' if the file does not exist."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return ""


def cache_folder() -> Path:
    """Returns the folder of this project's caches: in the user's cache folder, else in /tmp."""
    # Not Path.expanduser, which raises for a user without a home.
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(tempfile.gettempdir() if caches.startswith("~") else caches) / "rdm_jax"
