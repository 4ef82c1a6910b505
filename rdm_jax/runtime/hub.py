"""Shared relays by name, hf://OWNER/NAME: fetched from Hugging Face's hub into its own cache.

Only data is fetched (JSON and safetensors), and nothing in it is executed.
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rdm_jax.runtime.errors import KNOWN, InputError, reason, remedy
from rdm_jax.runtime.files import parse_json, sha256
from rdm_jax.runtime.lazy import lazy_import

huggingface_hub = lazy_import("huggingface_hub", "hub")
hub_errors = lazy_import("huggingface_hub.errors", "hub")
hub_constants = lazy_import("huggingface_hub.constants", "hub")

SCHEME = "hf://"
VERSION = 1  # of the list
LIST, CONFIG = "relay.json", "config.json"  # of a shared relay: its list of hashes, its config


def is_url(text: str | os.PathLike[str]) -> bool:
    """Whether a text is the URL of a repository."""
    return os.fspath(text).startswith(SCHEME)


def at(url: str, revision: str) -> str:
    """The URL of a repository at another revision."""
    return f"{url.partition('@')[0]}@{revision}"


def to_get_again(folder: Path) -> str:
    """The remedy if a relay's files are damaged: in the cache, all of the repository goes."""
    if _is_cached(folder):
        return f"Remove {folder.parents[1]}, and run the same again."
    return "Get it again."


def _is_cached(folder: Path) -> bool:
    return folder.parent.name == "snapshots" and folder.parents[1].name.startswith("models--")


def hashes(folder: Path) -> dict[str, str]:
    """The list of a shared relay: the SHA-256 of each file by its name.

    Raises:
      InputError: it cannot be read, or is of a newer version of this package.
    """
    try:
        listed = parse_json((folder / LIST).read_text())
        version, files = listed["version"], dict(listed["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{folder / LIST} cannot be read ({error})", to_get_again(folder)
        ) from error
    if version != VERSION:
        raise InputError(
            f"{folder / LIST} has version {version!r:.20}, and this rdm_jax reads {VERSION}",
            "Install a newer rdm_jax.",
        )
    return files


def check_there(folder: Path, names: Iterable[str]) -> None:
    """Raises InputError if a relay lacks a file that its list has."""
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise InputError(
                f"{folder / name} is missing",
                # A part of a relay in the cache is not damaged, and stays.
                "Load it once with a network, or use a complete revision."
                if _is_cached(folder)
                else "Get it again.",
            )


def check_equal(folder: Path, digests: Mapping[str, str]) -> None:
    """Raises InputError if a file of a relay has another hash than in its list."""
    for name, digest in digests.items():
        if sha256(folder / name) != digest:
            raise InputError(
                f"{folder / name} differs from its hash in {LIST}", to_get_again(folder)
            )


def fetch(url: str, names: Sequence[str], field: str) -> Path:
    """Fetches files of a shared relay; files that are there already are not fetched again.

    Args:
      url: 'hf://OWNER/NAME', or with '@REVISION': a branch, a tag or a commit.
      names: of the files, besides its list; what is not in that may be missing, but for the
        config, which is compared with its hash.
      field: that the user gave the URL in, for the message.

    Returns:
      The local folder, named after the commit.

    Raises:
      InputError: it is no such URL, the library is not installed, there is no such repository or
        revision, it has no list, it is neither reachable nor in the cache, or a file is missing or
        damaged.
    """
    given = f"{field}={url!r}"
    match = re.fullmatch(r"hf://([\w.-]+/[\w.-]+)(?:@(.+))?", url)
    if not match:
        raise InputError(
            f"{given} is not the name of a repository", "Use hf://OWNER/NAME[@REVISION]."
        )
    try:
        _ = huggingface_hub.snapshot_download, hub_errors.HfHubHTTPError
    except InputError as error:
        raise InputError(f"{given} cannot be fetched: {error.problem}", error.fix) from error
    try:
        folder = Path(
            huggingface_hub.snapshot_download(
                match[1], revision=match[2], allow_patterns=[LIST, *names]
            )
        )
    except Exception as error:  # its own errors, of the HTTP library and of the file system
        raise InputError(*_explained(given, match[2], error)) from error
    if not (folder / LIST).is_file():
        raise InputError(
            f"{given} is not a shared relay: it has no {LIST}",
            "Use a repository that a folder made by --mode=export without --stage was uploaded to.",
        )
    listed = hashes(folder)
    check_there(folder, [name for name in names if name in listed or name == CONFIG])
    if CONFIG in names:
        check_equal(folder, {CONFIG: listed.get(CONFIG, "")})
    return folder


def _explained(given: str, revision: str | None, error: Exception) -> tuple[str, str]:
    """What is wrong, and the remedy."""
    match error:
        case hub_errors.GatedRepoError():
            return (
                f"{given} asks for consent to its terms",
                "Accept them on the repository's page, and run 'hf auth login'.",
            )
        case hub_errors.RepositoryNotFoundError():
            return (
                f"{given}: there is no such repository, or no permission to read it",
                "Correct the name; if it is private, run 'hf auth login'.",
            )
        case hub_errors.RevisionNotFoundError():
            return (
                f"{given}: the repository has no revision {revision!r}",
                "Use a branch, a tag or a whole commit of it.",
            )
        case hub_errors.HFValidationError():
            return f"{given} is not the name of a repository", "Use hf://OWNER/NAME[@REVISION]."
        case hub_errors.LocalEntryNotFoundError() if hub_constants.HF_HUB_OFFLINE:
            return (
                f"{given} is not in the cache ({hub_constants.HF_HUB_CACHE}), and "
                "HF_HUB_OFFLINE is set",
                "Unset it, or load this once where there is a network and copy the cache.",
            )
        case _ if status := _status(error):
            return (
                f"{given} cannot be fetched: {hub_constants.ENDPOINT} answers with status {status}",
                "Run 'hf auth login' with a token that may read it."
                if status in (401, 403)
                else "Run the same again later.",
            )
        case hub_errors.LocalEntryNotFoundError():
            return (
                f"{given} is not in the cache ({hub_constants.HF_HUB_CACHE}), and "
                f"{hub_constants.ENDPOINT} does not answer",
                "Check the network, and run the same again.",
            )
        case OSError() if error.errno in KNOWN:
            return (
                f"{given} cannot be written to the cache ({hub_constants.HF_HUB_CACHE}): "
                f"{reason(error)}",
                remedy(error, "Free space, or set HF_HUB_CACHE to another folder."),
            )
    return f"{given} cannot be fetched ({reason(error)})", "Run the same again."


def _status(error: BaseException) -> int | None:
    """The status of the hub's answer that an error, or its cause, comes from."""
    answers = (getattr(each, "response", None) for each in (error, error.__cause__))
    return next((each.status_code for each in answers if each is not None), None)
