"""Files that are there whole or not at all."""

import hashlib
import os
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PNG_END = b"\0\0\0\0IEND\xaeB`\x82"


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields a path to write to; what was written becomes `path` when the block ends, and is removed when it raises."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.incomplete")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def is_whole_zip(path: Path) -> bool:
    """Whether a zip, which an .npz is, is there and every member has the checksum that it should have."""
    try:
        with zipfile.ZipFile(path) as file:
            return file.testzip() is None
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError):
        return False


def is_whole_png(path: Path) -> bool:
    """Whether a PNG is there and ends as one ends: what was cut off, or never written, does not."""
    try:
        with path.open("rb") as file:
            file.seek(-len(PNG_END), os.SEEK_END)
            return file.read() == PNG_END
    except OSError:
        return False


def sha256(path: Path) -> str:
    """The hash of a file's content in hexadecimal; '' where there is no such file."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return ""


def cache_folder() -> Path:
    """Where the user's caches of this project lie."""
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # Path's own raises where there is no home
    return Path(tempfile.gettempdir() if caches.startswith("~") else caches) / "rdm_jax"
