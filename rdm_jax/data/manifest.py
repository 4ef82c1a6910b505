"""The manifest of a prepared set, and the verification of its files."""

import re
from pathlib import Path
from typing import Any

from rdm_jax.data.content import set_hash, total
from rdm_jax.runtime.console import log, progress
from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.files import parse_json, sha256

MANIFEST = "manifest.json"
# Version 1 has no field 'version', and no 'content'.
VERSION = 2
FIELDS = {
    "settings": dict,
    "count": int,
    "classes": dict,
    "enlarged": int,
    "skipped": dict,
    "shards": list,
}
FILE_NAME = re.compile(r"\w[\w.-]*", re.ASCII)
# Settings that version 1 lacks, with the values that reproduce its behaviour.
NEW_SETTINGS = {"classes": "auto"}
DAMAGED = "Delete the directory and prepare it again."
SHARD = {"file": str, "records": int, "bytes": int, "sha256": str}


def verify_files(directory: Path, shards: list[dict[str, Any]], fix: str) -> None:
    """Compares every file with its hash in a manifest.

    Args:
      directory: of the files.
      shards: as the manifest lists them.
      fix: what to do about a file that differs.

    Raises:
      InputError: a file differs or is missing.
    """
    with progress(sum(shard["records"] for shard in shards), f"verifying {directory.name}") as bar:
        for shard in shards:
            if sha256(directory / shard["file"]) != shard["sha256"]:
                raise InputError(
                    f"{directory / shard['file']} differs from its hash in the manifest", fix
                )
            bar.update(shard["records"])
    log.info("data: %d files in %s match their hashes", len(shards), directory)


def check_sizes(directory: Path, shards: list[dict[str, Any]], fix: str) -> None:
    """Raises InputError for a file that is missing or of another size than a manifest says."""
    for shard in shards:
        path = directory / shard["file"]
        if not path.is_file():
            raise InputError(f"{path} is missing", fix)
        size = path.stat().st_size
        if size != shard["bytes"]:
            raise InputError(f"{path} has {size:,} of {shard['bytes']:,} bytes", fix)


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a prepared set, with settings that older versions lack.

    Raises:
      InputError: there is none, it is damaged, or a newer version wrote it.
    """
    try:
        manifest = parse_json((directory / MANIFEST).read_text())
        version = manifest.get("version", 1)
        if type(version) is not int:
            raise ValueError(f"version is {version!r:.40}")
        if version > VERSION:
            raise InputError(
                f"{directory / MANIFEST} has version {version}, and this rdm_jax reads versions up "
                f"to {VERSION}",
                "Install a newer rdm_jax, or prepare the data again in another directory.",
            )
        if not manifest.keys() >= FIELDS.keys():
            raise ValueError("fields are missing")
        for field, kind in FIELDS.items():
            if type(manifest[field]) is not kind:
                raise ValueError(f"{field} is not a {kind.__name__}")
        for shard in manifest["shards"]:
            check_shard(shard)
        if version > 1 and type(manifest.get("content")) is not str:
            raise ValueError("content is not a str")
        manifest["settings"] = NEW_SETTINGS | manifest["settings"]
        return manifest
    except InputError:
        raise
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(
            f"{directory} exists but is not a prepared data set ({error})", "Use another directory."
        ) from error


def read_addition(folder: Path, version: int, fields: dict[str, type], fix: str) -> dict[str, Any]:
    """The manifest of what lies beside prepared images and is made of them: sums, or captions.

    Args:
      folder: of the files and their manifest.
      version: that is read.
      fields: the kinds of its fields; 'shards' lists the files.
      fix: what to do if it cannot be used.

    Raises:
      InputError: it is missing or damaged, or a newer version wrote it.
    """
    try:
        manifest = parse_json((folder / MANIFEST).read_text())
        if manifest["version"] != version:
            raise ValueError(f"version is {manifest['version']!r:.40}, not {version}")
        for field, kind in fields.items():
            if type(manifest[field]) is not kind:
                raise ValueError(f"{field} is not a {kind.__name__}")
        for shard in manifest["shards"]:
            check_shard(shard)
        return manifest
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{folder} has no usable manifest ({error})", fix) from error


def identity(directory: Path) -> str:
    """A hash that identifies the images of a prepared set.

    Older manifests only have the hashes of files.

    Raises:
      InputError: there is no manifest.
    """
    manifest = read_manifest(directory)
    if "content" in manifest:
        return manifest["content"]
    return set_hash(
        total(shard["sha256"] for shard in manifest["shards"]), (), list(manifest["classes"])
    )


def check_shard(shard: Any) -> None:
    """Raises ValueError unless this is the entry of a file beside the manifest."""
    if not isinstance(shard, dict) or any(
        type(shard.get(field)) is not kind for field, kind in SHARD.items()
    ):
        raise ValueError("the entry of a shard is not complete")
    # The manifest is not trusted, and the file is going to be opened.
    if not FILE_NAME.fullmatch(shard["file"]):
        raise ValueError(f"{shard['file'][:200]!r} is not a file beside it")
