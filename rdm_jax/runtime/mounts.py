"""Folders of a bucket (gs://), each with a local folder that stands for it.

Files are written and read in the local folder; `push` uploads what this process has changed, and
`pull` fetches what others have. Checkpoints alone are written in the bucket: `in_store` says where.
"""

import atexit
import contextlib
import errno
import functools
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeAlias

from etils import epath

from rdm_jax.runtime.console import log
from rdm_jax.runtime.errors import InputError, reason
from rdm_jax.runtime.lazy import lazy_import
from rdm_jax.runtime.locks import InUse

gcsfs = lazy_import("gcsfs", "gcs")

AnyPath: TypeAlias = Path | epath.Path  # of a local file, or of one in a bucket
SCHEME = "gs://"
# Folders of a stage that are written in the bucket itself, and those that are never read again.
IN_STORE = ("checkpoints", "snapshots")
WRITE_ONLY = ("tensorboard", "previews")
LOCAL = "wandb"  # of a stage, which a tracker's library has open and sends itself
LOCK = ".lock"
ROLES = (
    "Give this account the roles roles/storage.objectAdmin and roles/storage.legacyBucketReader of "
    "the bucket."
)
PARTIAL = ".incomplete"  # the end of the names of files that are being written


class _Known(NamedTuple):
    """A file as both sides had it: the object's generation, the local size and time."""

    generation: str
    local: tuple[int, int]


class Mount:
    """A folder of a bucket and the local folder that stands for it, which ends with the process.

    Args:
      url: 'gs://BUCKET/FOLDER'.

    Attributes:
      url: as given, without a final '/'.
      path: of the local folder.
    """

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        self._root = self.url.removeprefix(SCHEME)
        temporary = Path(tempfile.mkdtemp(prefix="rdm_jax-"))
        atexit.register(shutil.rmtree, temporary, ignore_errors=True)
        self.path = temporary / PurePosixPath(self._root).name
        self.path.mkdir()
        self._known: dict[str, _Known] = {}
        self._whole: set[str] = set()  # folders whose files are all fetched
        self._busy = threading.RLock()

    def pull(self, *folders: str) -> None:
        """Fetches the files that others have changed, and removes those that they have removed.

        Args:
          folders: from now on these are fetched as a whole; of others only what is small.

        Raises:
          OSError: the bucket cannot be read.
        """
        with self._busy, talking_to(self.url):
            self._whole.update(folders)
            found = self._listed()
            new = [
                name
                for name, generation in found.items()
                if name in self._known or self._is_wanted(name)
                if name not in self._known or self._known[name].generation != generation
            ]
            # Elsewhere first: `push` must never see the first half of a file.
            coming = [self.path.with_name(f"{number}{PARTIAL}") for number in range(len(new))]
            if new:
                files().get([f"{self._root}/{name}" for name in new], [*map(str, coming)])
            for name, fetched in zip(new, coming, strict=True):
                (self.path / name).parent.mkdir(parents=True, exist_ok=True)
                fetched.replace(self.path / name)
                self._known[name] = _Known(found[name], _state(self.path / name))
            for name in [name for name in self._known if name not in found]:
                (self.path / name).unlink(missing_ok=True)
                del self._known[name]

    def push(self) -> None:
        """Uploads the files that changed here, each in one piece; removes those removed here.

        Raises:
          InputError: another run has taken the folder over.
          OSError: the bucket cannot be written. The next call tries again.
        """
        check_owned(epath.Path(self.url))
        with self._busy, talking_to(self.url):
            here = {
                str(path.relative_to(self.path)): _state(path)
                for path in self.path.rglob("*")
                if path.is_file() and not path.name.endswith(PARTIAL)
                if path.relative_to(self.path).parts[1:2] != (LOCAL,)
            }
            new = [
                name
                for name, state in here.items()
                if name not in self._known or self._known[name].local != state
            ]
            gone = [name for name in self._known if name not in here]
            if new:
                files().put([f"{self.path}/{n}" for n in new], [f"{self._root}/{n}" for n in new])
                generations = self._listed()
                # Of the state before: what has changed meanwhile is uploaded next time.
                self._known |= {name: _Known(generations.get(name, ""), here[name]) for name in new}
            for name in gone:
                with contextlib.suppress(FileNotFoundError):
                    files().rm_file(f"{self._root}/{name}")
                del self._known[name]

    def _listed(self) -> dict[str, str]:
        """The generations of all objects, but for those in checkpoints, by their names."""
        found = {name: str(about["generation"]) for name, about in _objects(self._root).items()}
        others = {*IN_STORE, LOCK}
        return {n: g for n, g in found.items() if not others & {*PurePosixPath(n).parts}}

    def _is_wanted(self, name: str) -> bool:
        first, *rest = PurePosixPath(name).parts
        if first in self._whole or not rest:
            return True
        if rest[0] in WRITE_ONLY:
            return False
        return rest[0] == "evaluations" or (len(rest) == 1 and not name.endswith(".npz"))


_mounts: dict[str, Mount] = {}
taken: dict[str, str] = {}  # URLs of folders that this process has lost, and who writes there now


def is_url(text: str | os.PathLike[str]) -> bool:
    """Whether a text is the URL of a bucket that can be mounted."""
    return os.fspath(text).startswith(SCHEME)


def mounted(url: str) -> Path:
    """The local folder that stands for 'gs://BUCKET/FOLDER', with the files that are there now.

    Raises:
      InputError: it is not the URL of a folder, there is no such bucket, or it cannot be read.
    """
    bucket, _, folder = url.removeprefix(SCHEME).strip("/").partition("/")
    if not bucket or not folder or "//" in folder:
        raise InputError(f"{url!r} is not a folder of a bucket", "Use gs://BUCKET/FOLDER.")
    url = f"{SCHEME}{bucket}/{folder}"
    mount = _mounts.get(url)
    try:
        if mount is None:
            with talking_to(f"{SCHEME}{bucket}"):
                files().info(bucket)
            mount = Mount(url)
        mount.pull()
    except OSError as error:
        raise InputError(
            f"{error.filename} cannot be read ({error.strerror})", f"Create the bucket. {ROLES}"
        ) from error
    if not _mounts:
        log.addFilter(_named_record)
    _mounts[url] = mount
    return mount.path


def any_path(text: str | os.PathLike[str]) -> AnyPath:
    """The path of a local file, '~' expanded, or of one in a bucket."""
    if not is_url(text):
        return Path(text).expanduser()
    files()
    return epath.Path(text)


def in_store(path: Path) -> AnyPath:
    """Where what a local path stands for is in its bucket; the path itself if it is not mounted."""
    mount = _mount_of(path)
    if mount is None:
        return path
    return epath.Path(f"{mount.url}/{path.relative_to(mount.path)}".removesuffix("/."))


def check_owned(path: AnyPath) -> None:
    """Raises InputError if this process has lost the lock of the folder that a path is in."""
    place = f"{in_store(path) if isinstance(path, Path) else path}/"
    for url, owner in taken.items():
        if place.startswith(f"{url}/"):
            raise InputError(
                f"{url} is not written any more, as this run has lost its lock to {owner}",
                "Wait until no other run writes there, and run the same command again.",
            )


def named(text: str) -> str:
    """A message that names URLs instead of the local folders that stand for them."""
    for mount in _mounts.values():
        text = text.replace(str(mount.path), mount.url)
    return text


def _named_record(record: logging.LogRecord) -> bool:
    record.msg, record.args = named(record.getMessage()), ()
    return True


def push() -> None:
    """Uploads what this process has changed. Raises as `Mount.push`."""
    for mount in _mounts.values():
        mount.push()


def pull(*folders: Path) -> None:
    """Fetches what other processes have changed. Raises OSError if a bucket cannot be read.

    Args:
      folders: from now on these are fetched as a whole; of others only what is small.
    """
    for mount in _mounts.values():
        mount.pull(*(folder.name for folder in folders if _mount_of(folder) is mount))


def file_sizes(folder: AnyPath) -> dict[str, int]:
    """The bytes of all files under a folder, by their names relative to it."""
    if isinstance(folder, Path):
        paths = [path for path in folder.rglob("*") if path.is_file()]
        return {str(path.relative_to(folder)): path.stat().st_size for path in paths}
    found = _objects(str(folder).removeprefix(SCHEME))
    return {name: int(about["size"]) for name, about in found.items()}


def remove_folder(folder: AnyPath) -> None:
    """Removes a folder and all that is in it, as far as that is possible."""
    if isinstance(folder, Path):
        shutil.rmtree(folder, ignore_errors=True)
    else:
        with contextlib.suppress(OSError), talking_to(str(folder)):
            folder.rmtree(missing_ok=True)


@contextlib.contextmanager
def talking_to(where: str | AnyPath) -> Iterator[None]:
    """Raises any library's error about a bucket as an OSError that names the URL.

    Args:
      where: the URL. Errors about a local path are raised as they are.
    """
    try:
        yield
    except (InputError, InUse):
        raise
    except Exception as error:  # gcsfs, aiohttp, google-auth and fsspec each raise their own
        url = str(where)
        if isinstance(where, Path) or is_url(str(getattr(error, "filename", ""))):
            raise
        kind = error.errno if isinstance(error, OSError) and error.errno else errno.EIO
        if isinstance(error, FileNotFoundError):
            raise FileNotFoundError(errno.ENOENT, "it does not exist", url) from error
        raise OSError(kind, reason(error), url) from error


def is_store_error(error: Exception) -> bool:
    """Whether an error comes from a library of buckets, which has errors that are no OSErrors."""
    return type(error).__module__.partition(".")[0] in ("gcsfs", "aiohttp", "google")


def _objects(root: str) -> dict[str, dict[str, Any]]:
    """What the store says of all objects in a folder, by their names in it.

    Only of those whose name is that of a file inside the folder: others may write what they like
    into a bucket ('../x'), and some programs make empty objects 'FOLDER/' that stand for folders.
    """
    with talking_to(f"{SCHEME}{root}"):
        found = files().find(root, detail=True)
    below = f"{root}/"
    named = {
        path.removeprefix(below): about for path, about in found.items() if path.startswith(below)
    }
    return {name: about for name, about in named.items() if _is_of_file(name)}


def _is_of_file(name: str) -> bool:
    """Whether an object's name, relative to its folder, is that of a file inside the folder."""
    return "\0" not in name and not {"", ".", ".."} & {*name.split("/")}


def _mount_of(path: Path) -> Mount | None:
    return next((m for m in _mounts.values() if path.is_relative_to(m.path)), None)


def _state(path: Path) -> tuple[int, int]:
    about = path.stat()
    return about.st_size, about.st_mtime_ns


@functools.cache
def files() -> Any:
    """The file system of all buckets, also for `epath`.

    Without a cache of listings, as other processes and TensorStore write there too.
    """
    import fsspec

    _ = gcsfs.GCSFileSystem  # refused by name if it is missing
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    return fsspec.filesystem("gcs")
