"""A record of a source at its preparation, one small entry per image, to detect changes later."""

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt64

from rdm_jax.data.manifest import read_manifest
from rdm_jax.data.records import RecordReader
from rdm_jax.data.source import Source
from rdm_jax.runtime.console import log

FILE = "source.npz"
SHOWN = 3  # names of each kind of change


class Record(NamedTuple):
    """Name, hash of the stamp and class index of every listed image, unusable ones included."""

    names: list[str]
    stamps: UInt64[np.ndarray, " n"]
    labels: Int[np.ndarray, " n"]


def record_of(source: Source) -> Record:
    """The record of a source; make it before images are read, so that later changes are noticed."""
    stamps = [
        hashlib.sha256(f"{source.reader.stamp(name)}{source.caption(i)}".encode()).digest()[:8]
        for i, name in enumerate(source.names)
    ]
    labels = source.labels if len(source.labels) else [-1] * len(source)
    return Record(
        names=list(source.names),
        stamps=np.frombuffer(b"".join(stamps), "<u8"),
        labels=np.asarray(labels, np.int32),
    )


def save_record(directory: Path, record: Record) -> None:
    """Writes the record of a source to a prepared set."""
    names = np.frombuffer("\n".join(record.names).encode(), np.uint8)
    np.savez_compressed(directory / FILE, names=names, stamps=record.stamps, labels=record.labels)


def has_changed(directory: Path, now: Record, class_names: tuple[str, ...], spec: str) -> bool:
    """Whether a source differs from the one that the directory was prepared from; logs how.

    Sets of older versions have no record: only the names of their images are compared.

    Args:
      directory: of the prepared set.
      now: the record of the source.
      class_names: of the source.
      spec: of the source, for the log.

    Raises:
      InputError: the directory is not a prepared set.
    """
    before = _read(directory)
    old_names = tuple(read_manifest(directory)["classes"])
    if before is None:
        names = RecordReader(directory).names()
        unused = read_manifest(directory)["skipped"].keys()
        found = {
            "added": sorted({*now.names} - {*names} - unused),
            "removed": sorted({*names} - {*now.names}),
            "changed": [],
        }
        log.info(
            "data: %s is of an older version: its source is compared by the names of images only",
            directory,
        )
    else:
        indices = {name: index for index, name in enumerate(before.names)}
        both = [(index, indices[name]) for index, name in enumerate(now.names) if name in indices]
        another_class = [
            now.names[i]
            for i, j in both
            if _class(now, i, class_names) != _class(before, j, old_names)
        ]
        found = {
            "added": [name for name in now.names if name not in indices],
            "removed": sorted(indices.keys() - {*now.names}),
            "changed": [now.names[i] for i, j in both if now.stamps[i] != before.stamps[j]],
            "of another class": another_class,
        }
    changes = [
        f"{len(names):,} {what} ({', '.join(names[:SHOWN])}{', ...' if len(names) > SHOWN else ''})"
        for what, names in found.items()
        if names
    ]
    if before is not None and not changes and class_names != old_names:
        changes = ["other classes"]
    log.info(
        "data: %s, compared with %s: %s",
        spec,
        directory,
        ", ".join(changes) or "nothing has changed",
    )
    return bool(changes)


def _class(record: Record, index: int, names: tuple[str, ...]) -> str | None:
    label = record.labels[index]
    return names[label] if 0 <= label < len(names) else None


def _read(directory: Path) -> Record | None:
    """The record in a prepared set; None if it is missing or damaged."""
    try:
        with np.load(directory / FILE, allow_pickle=False) as file:
            names = file["names"].tobytes().decode().split("\n")
            record = Record(
                names, file["stamps"].astype(np.uint64), file["labels"].astype(np.int32)
            )
        return record if len(names) == len(record.stamps) == len(record.labels) else None
    except Exception:  # numpy, zipfile and zlib each raise their own errors
        return None
