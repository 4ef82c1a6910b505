"""Adds the embeddings of captions (`text_table`) to a prepared set, from its own records."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from rdm_jax.data.records import RecordReader
from rdm_jax.data.staging import staging_folder
from rdm_jax.data.text_table import Embedding, embedded, folder_of, read_manifest, write
from rdm_jax.runtime.console import log
from rdm_jax.runtime.errors import InputError
from rdm_jax.text.encoders import open_encoder


def add_text(directory: Path, embedding: Embedding, check_stop: Callable[[], None]) -> None:
    """Embeds the captions of a prepared set, unless that is done; published by one rename.

    Args:
      directory: of the prepared set.
      embedding: by which encoder, of how many tokens.
      check_stop: called between captions; an exception ends the work.

    Raises:
      InputError: the set has no captions, one cannot be embedded, there is no such encoder, or
        another process prepares the set.
      OSError: a file cannot be written.
    """
    reader, folder = RecordReader(directory), folder_of(directory, embedding)
    content = reader.content()
    if _is_written(folder, content):
        return
    encoder = open_encoder(embedding.encoder, embedding.tokens)
    table = embedded(reader.captions(), encoder, check_stop)
    with staging_folder(directory) as staging:
        made = staging / folder.name
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir()
        write(table, made, content)
        if folder.exists():  # but it is of other images, or damaged
            shutil.rmtree(folder)
        os.rename(made, folder)
    log.info(
        "data: %s has the captions of %s images, %s of them different, embedded by %s",
        directory.name,
        f"{len(table.of_image):,}",
        f"{len(table.captions):,}",
        encoder.name,
    )


def _is_written(folder: Path, content: str) -> bool:
    try:
        return folder.exists() and read_manifest(folder)["of"] == content
    except InputError:
        return False
