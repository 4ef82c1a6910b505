"""Images in a zip or a tar, read one at a time by name. Nothing is unpacked to the disk."""

import abc
import errno
import functools
import lzma
import os
import re
import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import Any

from PIL import Image

from rdm_jax.data.images import MAGIC_BYTES, MAX_BYTES, open_image, read_head
from rdm_jax.data.listing import NO_TEXT, folders_of, is_rubbish
from rdm_jax.data.readers import Reader
from rdm_jax.runtime.console import log
from rdm_jax.runtime.errors import BadImage, InputError

# Images are compressed already: a larger member that unpacks to more than MAX_RATIO times its size
# is a decompression bomb.
MAX_RATIO = 200
SMALL = 2**20
# Bits and ids of the zip format.
ENCRYPTED, UTF8, LINK, UNICODE_PATH = 0x1, 0x800, 0o120000, 0x7075
COMPRESSED = {
    b"\x1f\x8b": "gunzip -k",
    b"\xfd7zXZ": "xz -dk",
    b"BZh": "bunzip2 -k",
    b"\x28\xb5\x2f\xfd": "zstd -d",
}


def is_zip(path: Path) -> bool:
    """Whether a file begins like a zip."""
    return read_head(path)[:4] in (b"PK\3\4", b"PK\5\6")


def is_tar(path: Path) -> bool:
    """Whether a file begins like a tar, or has the name of a compressed one."""
    with path.open("rb") as file:
        ustar = file.read(262)[257:] == b"ustar"
    return ustar or re.search(r"\.(tar(\.\w+)?|tgz|txz|tbz2?)$", path.name.lower()) is not None


class Archive(Reader):
    """The members of an archive, by name.

    Raises:
      InputError: it cannot be read as one.
    """

    memory_per_image = 700
    kind: str

    def __init__(self, path: Path):
        if not os.path.isfile(path):
            raise InputError(
                f"there is no {self.kind} {path}",
                "Give the path of a file, or folder:PATH for a folder.",
            )
        try:
            self._path, self._version, self.place = path, _version(path), str(path.resolve())
            members = self._members()
        except (
            OSError,
            zipfile.BadZipFile,
            tarfile.TarError,
            NotImplementedError,
            ValueError,
            RecursionError,
            OverflowError,
        ) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"{path} cannot be read as a {self.kind} ({error})",
                "Copy it again from an intact original.",
            ) from error
        if members.guessed:
            log.warning(
                "data: %s names in %s are in an unknown code page and may be misread, such as %r; "
                "unpack it with `unzip -O CODEPAGE`, or make the zip again with names in UTF-8",
                f"{len(members.guessed):,}",
                path,
                members.guessed[0],
            )

    def _members(self) -> "_Members":
        if _version(self._path) != self._version:
            raise OSError(
                errno.ESTALE, f"the {self.kind} has changed since it was listed", str(self._path)
            )
        return _opened(_KINDS[self.kind], self._path, self._version)

    def names(self) -> tuple[list[str], dict[str, BadImage]]:
        """The names of its usable files, and those of unusable ones with the reason.

        Files that systems leave behind are in neither.
        """
        members = self._members()
        return list(members.usable), dict(members.unusable)

    def read(self, name: str, most: int) -> bytes:
        """A member's bytes. Raises BadImage if damaged, larger than `most`, or a bomb."""
        members = self._members()
        size, stored = members.sizes(name)
        if size > most:
            raise BadImage(f"has {size:,} bytes", f"Use at most {most:,} bytes.")
        if size > max(SMALL, MAX_RATIO * stored):
            raise BadImage(
                f"unpacks from {stored:,} to {size:,} bytes, which no image does", "Remove it."
            )
        return members.read(name)

    def head(self, name: str) -> bytes:
        """A member's first bytes; b'' if they cannot be read."""
        return self._members().head(name)

    def load(self, name: str) -> Image.Image:
        """Decodes a member."""
        return open_image(self.read(name, MAX_BYTES))

    def stamp(self, name: str) -> str:
        """Metadata of the archive that change when the member changes."""
        return self._members().stamp(name)


class Zip(Archive):
    """The members of a zip. Raises InputError if it cannot be read as one."""

    kind = "zip"


class Tar(Archive):
    """The members of an uncompressed tar. Raises InputError if it is not one."""

    kind = "tar"


def _version(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


class _Members(abc.ABC):
    """An open archive: its usable members by name, and what is wrong with the others.

    Attributes:
      usable: whatever the subclass keeps of a member, by name.
      unusable: the reason, by name.
      guessed: names whose code page is unknown, and which may be misread.
    """

    def __init__(self, kind: str):
        self._kind = kind
        self.usable: dict[str, Any] = {}
        self.unusable: dict[str, BadImage] = {}
        self.guessed: list[str] = []
        self._folders: set[str] = set()

    def _add(self, name: str, member: object, reason: str | None) -> None:
        """Adds a member, if its name and kind are ones that an archive of images needs."""
        name = re.sub(r"(?<![^/])\./|(?<=/)/", "", name)  # as `tar cf set.tar data/.` writes them
        if not name or any(is_rubbish(part) for part in name.split("/") if part != ".."):
            return
        if name.endswith("/"):
            self._folders.add(name)
            return
        reason = reason or _unsafe_name(name, self._kind)
        if reason:
            self.usable.pop(name, None)
            self.unusable[name] = BadImage(
                reason, f"Replace it by a plain file below the root of the {self._kind}."
            )
        elif name in self.usable or name in self.unusable:
            self.usable.pop(name, None)  # which of the two is meant is unknown
            self.unusable[name] = BadImage(f"is in the {self._kind} twice", "Keep one of them.")
        else:
            self.usable[name] = member

    def _note_empty(self) -> None:
        """Marks empty folders as unusable: an empty class is more likely a slip than meant."""
        parents = {
            name.rstrip("/").rpartition("/")[0]
            for name in (*self.usable, *self.unusable, *self._folders)
        }
        filled = {f"{folder}/" for parent in parents for folder in (parent, *folders_of(parent))}
        for name in self._folders - filled:
            self.unusable[name] = BadImage("is an empty folder", "Add an image, or remove it.")

    @abc.abstractmethod
    def sizes(self, name: str) -> tuple[int, int]:
        """Bytes of a member, unpacked and as stored."""

    @abc.abstractmethod
    def read(self, name: str) -> bytes:
        """A member's bytes. Raises BadImage if they are damaged."""

    @abc.abstractmethod
    def head(self, name: str) -> bytes:
        """As for `Archive`."""

    @abc.abstractmethod
    def stamp(self, name: str) -> str:
        """As for `Archive`."""


def _unsafe_name(name: str, kind: str) -> str | None:
    if NO_TEXT.search(name):
        return "has a NUL or another control character in its name"
    if name.startswith("/") or ".." in name.split("/") or re.match("[A-Za-z]:", name):
        return f"has a name that leads out of the {kind}"
    return None


class _ZipMembers(_Members):
    def __init__(self, path: Path):
        super().__init__("zip")
        self._file = zipfile.ZipFile(path)
        for member in self._file.infolist():
            name, is_known = _zip_name(member)
            self._add(name, member, _unsafe_kind(member))
            if not is_known:
                self.guessed.append(name)
        self._note_empty()

    def sizes(self, name: str) -> tuple[int, int]:
        return self.usable[name].file_size, self.usable[name].compress_size

    def read(self, name: str) -> bytes:
        try:
            return self._file.read(self.usable[name])
        except (
            OSError,
            zipfile.BadZipFile,
            zlib.error,
            lzma.LZMAError,
            EOFError,
            RuntimeError,
            ValueError,
        ) as error:
            if isinstance(error, OSError) and error.errno:  # bz2 sets none for invalid data
                raise
            raise BadImage(
                f"cannot be unpacked ({error})",
                "Copy it again from an intact original, or remove it.",
            ) from error

    def head(self, name: str) -> bytes:
        try:
            with self._file.open(self.usable[name]) as member:
                return member.read(MAGIC_BYTES)
        except Exception:  # as in `read`; what cannot be unpacked is not an image
            return b""

    def stamp(self, name: str) -> str:
        return f"{self.usable[name].file_size} {self.usable[name].CRC:08x}"


def _zip_name(member: zipfile.ZipInfo) -> tuple[str, bool]:
    """A member's name, with Windows' backslashes as slashes; and whether its encoding is known.

    UTF-8 that is not marked as such is recognised; anything else is read as code page 437.
    """
    name = member.orig_filename
    is_known = True
    if not member.flag_bits & UTF8:
        raw = name.encode("cp437")  # zipfile has decoded it as such
        try:
            name = (_unicode_path(member.extra, raw) or raw).decode()
        except UnicodeDecodeError:
            is_known = False
    return name.replace("\\", "/"), is_known


def _unicode_path(extra: bytes, raw: bytes) -> bytes | None:
    """The name in Info-ZIP's Unicode path field, if its checksum is that of the raw name."""
    while len(extra) >= 4:
        kind = int.from_bytes(extra[:2], "little")
        size = int.from_bytes(extra[2:4], "little")
        field = extra[4 : 4 + size]
        extra = extra[4 + size :]
        checksum = int.from_bytes(field[1:5], "little")
        if kind == UNICODE_PATH and field[:1] == b"\1" and checksum == zlib.crc32(raw):
            return field[5:]
    return None


def _unsafe_kind(member: zipfile.ZipInfo) -> str | None:
    if member.external_attr >> 16 & 0o170000 == LINK:
        return "is a link"
    return "is encrypted" if member.flag_bits & ENCRYPTED else None


class _TarMembers(_Members):
    def __init__(self, path: Path):
        super().__init__("tar")
        self._file = path.open("rb")
        head = self._file.read(6)
        version = _version(path)
        for magic, unpack in COMPRESSED.items():
            if head.startswith(magic):
                raise InputError(
                    f"{path} is a compressed tar, from which single images cannot be read",
                    f"Run `{unpack} {path.name}` first.",
                )
        self._file.seek(0)
        with tarfile.open(
            fileobj=self._file, mode="r:", encoding="utf-8", errors="surrogateescape"
        ) as archive:
            while (member := archive.next()) is not None:
                archive.members = []  # the library keeps them all, at a kilobyte each
                is_plain = member.isdir() or member.isreg() and not member.issparse()
                # A tar has no checksums of content.
                stamp = f"{member.size} {member.offset_data} {version}"
                self._add(
                    f"{member.name}/" if member.isdir() else member.name,
                    (member.offset_data, member.size, stamp),
                    None if is_plain else "is a link, a device or sparse",
                )
            self._note_empty()
            self._check_end(archive.offset)

    def _check_end(self, end: int) -> None:
        """Checks that only zeros follow: the library takes anything unreadable for the end."""
        self._file.seek(end)
        block = self._file.read(tarfile.BLOCKSIZE)
        if len(block) < tarfile.BLOCKSIZE:
            raise tarfile.ReadError("it is cut off")
        while block:
            if block.strip(b"\0"):
                offset = self._file.tell() - len(block)
                raise tarfile.ReadError(
                    f"it is damaged, or another one was joined to it, at byte {offset}"
                )
            block = self._file.read(2**20)

    def sizes(self, name: str) -> tuple[int, int]:
        return (self.usable[name][1],) * 2

    def read(self, name: str) -> bytes:
        return self._part(name, self.usable[name][1])

    def head(self, name: str) -> bytes:
        return self._part(name, min(MAGIC_BYTES, self.usable[name][1]))

    def _part(self, name: str, size: int) -> bytes:
        content = os.pread(self._file.fileno(), size, self.usable[name][0])
        if len(content) < size:
            raise BadImage("is truncated", "Copy the tar again from an intact original.")
        return content

    def stamp(self, name: str) -> str:
        return self.usable[name][2]


_KINDS = {"zip": _ZipMembers, "tar": _TarMembers}


# Cached, so that a directory of perhaps a million members is read once per process, not per shard.
@functools.lru_cache(maxsize=4)
def _opened(kind: type[_Members], path: Path, version: tuple[int, int]) -> _Members:
    return kind(path)
