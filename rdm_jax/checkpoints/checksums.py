"""Checksums of a checkpoint's files: Orbax does not notice a changed byte in an array."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rdm_jax.runtime.files import parse_json, sha256
from rdm_jax.runtime.mounts import AnyPath, file_sizes, talking_to

CHECKSUMS = "checksums.json"
# Orbax writes these last: the time of its commit, and a marker. They hold no training state.
LATER = ("_CHECKPOINT_METADATA", "commit_success.txt")
SMALL = 2**20
READERS = 8
ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


def write_checksums(folder: AnyPath) -> None:
    """Writes the sizes and SHA-256 of all files under a folder into `checksums.json` there."""
    sizes = _sizes(folder)
    found = {
        name: {"bytes": sizes[name], "sha256": digest}
        for name, digest in _digests(folder, list(sizes)).items()
    }
    (folder / CHECKSUMS).write_text(json.dumps(found, indent=1))


def damage(folder: AnyPath, thorough: bool = True) -> str:
    """Describes the first file under a folder that differs from its checksum; '' if none does.

    Args:
      thorough: read all files; else only those below 1 MiB, and compare the sizes of the others.

    Raises:
      OSError: a file cannot be read, which does not mean that it is damaged.
    """
    try:
        expected = _expected(folder)
    except ABSENT:
        return f"{CHECKSUMS} is missing"
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        return f"{CHECKSUMS} is damaged: {error}"
    found = _sizes(folder)
    for name in expected.keys() - found.keys():
        # A network file system may list a file later than it opens it.
        if isinstance(folder, Path) and (folder / name).is_file():
            found[name] = (folder / name).stat().st_size
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            return f"{name} is missing"
        if name not in expected:
            return f"{name} does not belong to it"
        if found[name] != expected[name][0]:
            return f"{name} has {found[name]:,} bytes instead of {expected[name][0]:,}"
    read = [name for name, (size, _) in sorted(expected.items()) if thorough or size < SMALL]
    for name, digest in _digests(folder, read).items():
        if digest != expected[name][1]:
            return f"{name} does not match its checksum"
    return ""


def is_half_deleted(folder: AnyPath) -> bool:
    """Whether files of a damaged checkpoint are missing. Raises OSError as `damage`."""
    try:
        return not _expected(folder).keys() <= _sizes(folder).keys()
    except ABSENT:
        return True
    except (ValueError, TypeError, KeyError, AttributeError):
        return False


def _expected(folder: AnyPath) -> dict[str, tuple[int, str]]:
    """The sizes and checksums that the files should have."""
    with talking_to(folder / CHECKSUMS):
        listed = parse_json((folder / CHECKSUMS).read_text())
    return {name: (int(about["bytes"]), str(about["sha256"])) for name, about in listed.items()}


def _sizes(folder: AnyPath) -> dict[str, int]:
    return {n: size for n, size in file_sizes(folder).items() if n not in (*LATER, CHECKSUMS)}


def _digests(folder: AnyPath, names: list[str]) -> dict[str, str]:
    """The SHA-256 of these files, several of which are read at a time."""
    with talking_to(folder), ThreadPoolExecutor(READERS) as pool:
        digests = pool.map(lambda name: sha256(folder / name), names)
        return dict(zip(names, digests, strict=True))
