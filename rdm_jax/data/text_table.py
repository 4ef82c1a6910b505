"""Captions of prepared images and their embeddings, each distinct caption stored once.

They lie in a folder beside the images: `tokens.bin` has the valid tokens of all distinct captions
one after the other, float16 of `width`, little-endian; `text.npz` the captions, where each begins,
and which one each image has; the manifest says which encoder made them, of which images.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float16, Int

from rdm_jax.data.manifest import check_sizes, read_addition, verify_files
from rdm_jax.runtime.console import progress
from rdm_jax.runtime.errors import InputError
from rdm_jax.text.encoders import TextEncoder

VERSION = 1
TOKENS, TEXT = "tokens.bin", "text.npz"
DTYPE = np.dtype("<f2")
FIELDS = {
    "encoder": str,
    "weights_hash": str,
    "tokens": int,
    "width": int,
    "of": str,
    "shards": list,
}
CHUNK = 256  # captions that are embedded at a time


class Embedding(NamedTuple):
    """How captions are to be embedded.

    Attributes:
      encoder: as the config names it (`data.text_encoder`).
      tokens: the most tokens of a caption.
    """

    encoder: str
    tokens: int


class TextSpec(NamedTuple):
    """How captions are embedded.

    Attributes:
      encoder: its name.
      weights_hash: sha256 of its weights.
      tokens: the most tokens of a caption.
      width: values of a token.
    """

    encoder: str
    weights_hash: str
    tokens: int
    width: int

    def __str__(self) -> str:
        return (
            f"{self.encoder} ({self.tokens} tokens of {self.width}, weights "
            f"{self.weights_hash[:12]})"
        )


def spec_of(about: Mapping[str, Any]) -> TextSpec | None:
    """How the captions of a checkpoint's network are embedded, by its metadata; None for none."""
    text = about.get("text")
    return TextSpec(*(text[field] for field in TextSpec._fields)) if text else None


def same_text(one: TextSpec | None, other: TextSpec | None) -> bool:
    """Whether captions have the same embeddings; what the encoder is called does not matter."""
    return (one and one[1:]) == (other and other[1:])


@dataclasses.dataclass(frozen=True)
class TextTable:
    """Captions by image, with their embeddings.

    Attributes:
      spec: how they are embedded.
      captions: the distinct ones.
      offsets: where the tokens of each begin, and the end of the last.
      of_image: the caption of each image.
      values: all tokens; an array, or the file that holds them.

    A process maps the file once, so that what replaces it later is not seen. Pickled, for processes
    that read batches, a table has no captions.
    """

    spec: TextSpec
    captions: tuple[str, ...]
    offsets: Int[np.ndarray, " m1"]
    of_image: Int[np.ndarray, " n"]
    values: "np.ndarray | TokenFile"

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)} | {
            "captions": ()
        }

    def batch(self, indices: Int[np.ndarray, " b"]) -> dict[str, np.ndarray]:
        """{'text': float16 (b, tokens, width), zeros behind the end; 'text_length': int32 (b,)}."""
        chosen, values = self.of_image[indices], self._values
        lengths = (self.offsets[chosen + 1] - self.offsets[chosen]).astype(np.int32)
        text = np.zeros((len(chosen), self.spec.tokens, self.spec.width), np.float16)
        for row, first, length in zip(text, self.offsets[chosen], lengths, strict=True):
            row[:length] = values[first : first + length]
        return {"text": text, "text_length": lengths}

    def captions_of(self, indices: Int[np.ndarray, " b"]) -> list[str]:
        """The captions of images. Raises IndexError for a table that was pickled."""
        return [self.captions[i] for i in self.of_image[indices]]

    @functools.cached_property
    def _values(self) -> Float16[np.ndarray, "k width"]:
        if isinstance(self.values, TokenFile):
            return self.values.mapped((int(self.offsets[-1]), self.spec.width))
        return self.values


class TokenFile(NamedTuple):
    """A file of tokens.

    Attributes:
      path: of the file.
      stamp: inode and time of the last change, of the file that is meant.
    """

    path: Path
    stamp: tuple[int, int]

    @classmethod
    def of(cls, path: Path) -> "TokenFile":
        """The file that is there now."""
        return cls(path, _stamp(path))

    def mapped(self, shape: tuple[int, int]) -> Float16[np.ndarray, "k width"]:
        """Its values, mapped and not read. Raises InputError for another file of that name."""
        values = np.memmap(self.path, DTYPE, "r", shape=shape)
        if _stamp(self.path) != self.stamp:
            raise InputError(
                f"{self.path} was written again while it was used", "Run the same command again."
            )
        return values


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_ino, status.st_mtime_ns


def folder_of(directory: Path, embedding: Embedding) -> Path:
    """Where the text of a prepared set is."""
    kind, _, path = embedding.encoder.partition(":")
    place = f"_{hashlib.sha256(path.encode()).hexdigest()[:8]}" if path else ""
    return directory / f"text_{kind}{place}_{embedding.tokens}"


def verify_tables(directory: Path) -> None:
    """Raises InputError for a file of any table of a set that differs from its hash."""
    for folder in sorted(path for path in directory.glob("text_*") if path.is_dir()):
        verify_files(folder, read_manifest(folder)["shards"], fix_of(folder))


def embedded(
    captions: Sequence[str], encoder: TextEncoder, check_stop: Callable[[], None] = lambda: None
) -> TextTable:
    """The table of these captions, one per image, each distinct one embedded once, in memory.

    Raises:
      InputError: a caption is empty or too long.
    """
    distinct, of_image = numbered(captions)
    parts, lengths = [], []
    for tokens, counts in embed(distinct, encoder, check_stop):
        parts.append(tokens)
        lengths += counts.tolist()
    spec = TextSpec(encoder.name, encoder.weights_hash, encoder.tokens, encoder.width)
    return TextTable(spec, distinct, offsets_of(lengths), of_image, np.concatenate(parts))


def numbered(captions: Sequence[str]) -> tuple[tuple[str, ...], Int[np.ndarray, " n"]]:
    """The distinct captions, in their order, and the index of each image's one, int32."""
    numbers = {caption: number for number, caption in enumerate(dict.fromkeys(captions))}
    return tuple(numbers), np.array([numbers[caption] for caption in captions], np.int32)


def offsets_of(lengths: Sequence[int] | np.ndarray) -> Int[np.ndarray, " m1"]:
    """Where the tokens of each caption begin, and the end of the last, int64."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def embed(
    captions: Sequence[str],
    encoder: TextEncoder,
    check_stop: Callable[[], None] = lambda: None,
    done: int = 0,
) -> Iterator[tuple[Float16[np.ndarray, "k width"], Int[np.ndarray, " b"]]]:
    """Yields the valid tokens and the lengths of some captions at a time.

    Args:
      captions: to embed.
      encoder: of the captions.
      check_stop: called between captions; an exception ends the work.
      done: how many of them are embedded already.

    Raises:
      InputError: a caption is empty or too long.
    """
    with progress(len(captions), f"embedding captions by {encoder.name}", done) as bar:
        for first in range(done, len(captions), CHUNK):
            tokens, lengths = encoder(captions[first : first + CHUNK])
            valid = np.arange(encoder.tokens) < np.asarray(lengths)[:, None]
            yield np.asarray(tokens)[valid].astype(DTYPE), np.asarray(lengths, np.int32)
            bar.update(len(lengths))
            check_stop()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a table. Raises InputError if it is missing or damaged."""
    return read_addition(folder, VERSION, FIELDS, fix_of(folder))


def fix_of(folder: Path) -> str:
    """What to do about a damaged table: it is made of the records beside it."""
    return f"Delete {folder} and run --mode=prepare."


def open_table(directory: Path, embedding: Embedding, content: str, count: int) -> TextTable:
    """The table of a prepared set.

    Args:
      directory: of the set.
      embedding: how its captions are embedded.
      content: of its images (`RecordReader.content`).
      count: of its images.

    Raises:
      InputError: there is none, it is of other images, or it is damaged.
    """
    folder = folder_of(directory, embedding)
    if not folder.is_dir():
        raise InputError(
            f"the prepared data in {directory} has no captions embedded by {embedding.encoder!r} "
            f"with {embedding.tokens} tokens",
            "Run --mode=prepare with config.data.captions, and a data.directory that can be "
            "written.",
        )
    manifest = read_manifest(folder)
    if manifest["of"] != content:
        raise InputError(f"{folder} has the captions of other images", fix_of(folder))
    check_sizes(folder, manifest["shards"], fix_of(folder))
    try:
        with np.load(folder / TEXT, allow_pickle=False) as file:
            captions = tuple(file["captions"].tobytes().decode().split("\n"))
            offsets, of_image = file["offsets"].astype(np.int64), file["of_image"].astype(np.int32)
        if len(of_image) != count or len(offsets) != len(captions) + 1:
            raise ValueError("it is of other images")
        if of_image.min() < 0 or of_image.max() >= len(captions):
            raise ValueError("an image has a caption that is not there")
        stored = (folder / TOKENS).stat().st_size
        if offsets[-1] * manifest["width"] * DTYPE.itemsize != stored or np.diff(offsets).min() < 1:
            raise ValueError("its tokens are not those of its captions")
        if offsets[0] != 0 or np.diff(offsets).max() > manifest["tokens"]:
            raise ValueError("a caption has more tokens than fit")
    except Exception as error:  # numpy, zipfile and zlib each raise their own errors
        raise InputError(f"{folder} is damaged ({error})", fix_of(folder)) from error
    spec = TextSpec(*(manifest[field] for field in TextSpec._fields))
    return TextTable(spec, captions, offsets, of_image, TokenFile.of(folder / TOKENS))
