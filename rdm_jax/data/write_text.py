"""Adds the embeddings of captions (`text_table`) to a prepared set, from its own records."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rdm_jax.data.captions import unfit
from rdm_jax.data.manifest import MANIFEST
from rdm_jax.data.records import RecordReader, content_of
from rdm_jax.data.staging import staging_folder
from rdm_jax.data.text_table import (
    DTYPE,
    TEXT,
    TOKENS,
    VERSION,
    Embedding,
    TextSpec,
    embed,
    folder_of,
    numbered,
    offsets_of,
    read_manifest,
)
from rdm_jax.runtime.console import log
from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.files import atomic_write, parse_json, sha256
from rdm_jax.text import encoders
from rdm_jax.text.encoders import TextEncoder

# Of an unfinished table: the lengths of the captions whose tokens are written, and what made them.
LENGTHS, STARTED = "lengths.bin", "started.json"


def add_text(directory: Path, embedding: Embedding, check_stop: Callable[[], None]) -> None:
    """Embeds the captions of a prepared set, unless that is done; published by one rename.

    A run that is interrupted is resumed by the next one, with the same result, bit for bit.

    Args:
      directory: of the prepared set.
      embedding: by which encoder, of how many tokens.
      check_stop: called between captions; an exception ends the work.

    Raises:
      InputError: the set has no captions, one cannot be embedded, there is no such encoder, or
        another process prepares the set.
      OSError: a file cannot be written.
    """
    if is_embedded(directory, embedding):
        return
    folder = folder_of(directory, embedding)
    with staging_folder(directory) as staging:
        if is_embedded(directory, embedding):  # by another process, before it released the lock
            return
        reader = RecordReader(directory)
        captions = reader.captions(check_stop)
        encoder = encoders.open_encoder(embedding.encoder, embedding.tokens)
        made = staging / folder.name
        distinct, of_image = numbered(captions)
        _check(reader, distinct, of_image, encoder)
        lengths = _append(made, distinct, encoder, check_stop)
        _finish(made, distinct, lengths, of_image, encoder, reader.content())
        if folder.exists():  # but it is of other images, or damaged
            shutil.rmtree(folder)
        os.rename(made, folder)
    log.info(
        "data: %s has the captions of %s images, %s of them different, embedded by %s",
        directory.name,
        f"{len(of_image):,}",
        f"{len(distinct):,}",
        encoder.name,
    )


def is_embedded(directory: Path, embedding: Embedding) -> bool:
    """Whether a prepared set has a table of the captions of its images."""
    folder = folder_of(directory, embedding)
    try:
        return folder.exists() and read_manifest(folder)["of"] == content_of(directory)
    except InputError:
        return False


def _check(
    reader: RecordReader, captions: Sequence[str], of_image: np.ndarray, encoder: TextEncoder
) -> None:
    """Refuses captions that the encoder does not take, before any is embedded."""
    bad = unfit(captions, encoder)
    if not bad:
        return
    caption, error = next(iter(bad.items()))
    image = int(np.flatnonzero(of_image == captions.index(caption))[0])
    others = f" ({len(bad) - 1:,} other captions cannot be used)" if len(bad) > 1 else ""
    raise InputError(
        f"{reader.name(image)} of {reader.directory} {error.reason}{others}", error.fix
    )


def _append(
    made: Path, captions: Sequence[str], encoder: TextEncoder, check_stop: Callable[[], None]
) -> np.ndarray:
    """Appends the tokens of captions to those that an interrupted run has written.

    Returns:
      The lengths of all captions, int32.
    """
    made.mkdir(exist_ok=True)
    started = {
        "weights_hash": encoder.weights_hash,
        "captions": hashlib.sha256(json.dumps(captions).encode()).hexdigest(),
    }
    done = _resumed(made, started, DTYPE.itemsize * encoder.width)
    if done:
        log.info("data: %s of %s captions are embedded", f"{done:,}", f"{len(captions):,}")
    with (made / TOKENS).open("ab") as tokens, (made / LENGTHS).open("ab") as lengths:
        for values, counts in embed(captions, encoder, check_stop, done):
            tokens.write(values.tobytes())
            tokens.flush()
            os.fsync(tokens.fileno())  # a length says that its tokens are there
            lengths.write(counts.astype("<i4").tobytes())
            lengths.flush()
    return np.fromfile(made / LENGTHS, "<i4")


def _resumed(made: Path, started: dict[str, Any], token_bytes: int) -> int:
    """The number of captions that an interrupted run has embedded; what is incomplete is cut off.

    If it began with another encoder or other captions, its files are removed.
    """
    try:
        resumes = parse_json((made / STARTED).read_text()) == started
    except (OSError, ValueError):
        resumes = False
    if not resumes:
        for left in (LENGTHS, TOKENS):
            (made / left).unlink(missing_ok=True)
        with atomic_write(made / STARTED) as partial:
            partial.write_text(json.dumps(started))
    for name in (LENGTHS, TOKENS):
        (made / name).touch()
    ends = token_bytes * offsets_of(np.fromfile(made / LENGTHS, "<i4"))
    done = int(np.searchsorted(ends, (made / TOKENS).stat().st_size, side="right")) - 1
    os.truncate(made / LENGTHS, 4 * done)
    os.truncate(made / TOKENS, ends[done])
    return done


def _finish(
    made: Path,
    captions: Sequence[str],
    lengths: np.ndarray,
    of_image: np.ndarray,
    encoder: TextEncoder,
    content: str,
) -> None:
    """Makes a table of the tokens in a folder: the captions of the images of that content."""
    np.savez_compressed(
        made / TEXT,
        captions=np.frombuffer("\n".join(captions).encode(), np.uint8),
        offsets=offsets_of(lengths),
        of_image=of_image,
    )
    spec = TextSpec(encoder.name, encoder.weights_hash, encoder.tokens, encoder.width)
    manifest = {
        "version": VERSION,
        **spec._asdict(),
        "of": content,
        "captions": len(captions),
        "shards": [
            {
                "file": path.name,
                "records": len(captions),
                "bytes": path.stat().st_size,
                "sha256": sha256(path),
            }
            for path in (made / TOKENS, made / TEXT)
        ],
    }
    with atomic_write(made / MANIFEST) as partial:
        partial.write_text(json.dumps(manifest, indent=1))
    for left in (LENGTHS, STARTED):
        (made / left).unlink()
