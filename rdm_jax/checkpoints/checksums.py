"""Checksums of a checkpoint's files: Orbax does not notice a changed byte in an array."""

import json
from pathlib import Path

from rdm_jax.runtime.files import parse_json, sha256

CHECKSUMS = "checksums.json"
# Orbax writes these last: the time of its commit, and a marker. They hold no training state.
LATER = ("_CHECKPOINT_METADATA", "commit_success.txt")
SMALL = 2**20


def write_checksums(folder: Path) -> None:
    """Writes the sizes and SHA-256 of all files under a folder into `checksums.json` there."""
    found = {
        name: {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for name, path in _files(folder).items()
    }
    (folder / CHECKSUMS).write_text(json.dumps(found, indent=1))


def damage(folder: Path, thorough: bool = True) -> str:
    """Describes the first file under a folder that differs from its checksum; '' if none does.

    Args:
      thorough: read all files; else only those below 1 MiB, and compare the sizes of the others.
    """
    try:
        listed = parse_json((folder / CHECKSUMS).read_text())
        expected = {
            name: (int(about["bytes"]), str(about["sha256"])) for name, about in listed.items()
        }
    except FileNotFoundError:
        return f"{CHECKSUMS} is missing"
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"{CHECKSUMS} is damaged: {error}"
    found = _files(folder)
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            return f"{name} is missing"
        if name not in expected:
            return f"{name} does not belong to it"
        size, digest = expected[name]
        if found[name].stat().st_size != size:
            return f"{name} has {found[name].stat().st_size:,} bytes instead of {size:,}"
        if (thorough or size < SMALL) and sha256(found[name]) != digest:
            return f"{name} does not match its checksum"
    return ""


def _files(folder: Path) -> dict[str, Path]:
    paths = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: path for name, path in paths.items() if name not in (*LATER, CHECKSUMS)}
