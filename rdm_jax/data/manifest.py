"""What a prepared set says of itself, and whether its files still are what they were."""

import hashlib
import json
from pathlib import Path
from typing import Any

from rdm_jax.errors import InputError
from rdm_jax.terminal import log, progress

MANIFEST = "manifest.json"
FIELDS = {"settings", "count", "classes", "enlarged", "skipped", "shards"}


def verify_files(directory: Path) -> None:
    """Compares every file with its hash in the manifest. Raises InputError for one that differs or is not there."""
    shards = read_manifest(directory)["shards"]
    with progress(sum(shard["records"] for shard in shards), f"verifying {directory.name}") as bar:
        for shard in shards:
            if sha256(directory / shard["file"]) != shard["sha256"]:
                would_do = "deleting the directory and preparing it again"
                raise InputError(f"{directory / shard['file']} is not as it was written; {would_do} would do.")
            bar.update(shard["records"])
    log.info("data: %d files in %s are as they were written", len(shards), directory)


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a prepared set. Raises InputError where there is none."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
        if not manifest.keys() >= FIELDS:
            raise ValueError("fields are missing")
        return manifest
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{directory} is there and is no prepared data ({error}); another directory would do.") from error


def sha256(path: Path) -> str:
    """The hash of a file's content in hexadecimal; '' where there is no such file."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return ""
