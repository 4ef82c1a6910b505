"""What a source was when it was prepared, one small entry an image, so that it can be compared with
what it is now."""

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt64

from rdm_jax.data.manifest import read_manifest
from rdm_jax.data.records import RecordReader
from rdm_jax.data.sources import Source
from rdm_jax.runtime.console import log

FILE = "source.npz"
SHOWN = 3  # names of each kind of change


class Record(NamedTuple):
    """Of every image that was listed, also of those that could not be used: its name, a hash of its
    stamp, its class number."""

    names: list[str]
    stamps: UInt64[np.ndarray, " n"]
    labels: Int[np.ndarray, " n"]


def record_of(source: Source) -> Record:
    """What the source is now; to be taken before its images are read, so that what changes
    meanwhile is noticed later."""
    stamps = [
        hashlib.sha256(source.reader.stamp(name).encode()).digest()[:8] for name in source.names
    ]
    labels = source.labels if len(source.labels) else [-1] * len(source)
    return Record(
        list(source.names), np.frombuffer(b"".join(stamps), "<u8"), np.asarray(labels, np.int32)
    )


def save_record(directory: Path, record: Record) -> None:
    """Writes down what a source was."""
    names = np.frombuffer("\n".join(record.names).encode(), np.uint8)
    np.savez_compressed(directory / FILE, names=names, stamps=record.stamps, labels=record.labels)


def has_changed(directory: Path, now: Record, class_names: tuple[str, ...], spec: str) -> bool:
    """Whether a source is another than the one that the directory was prepared from; the log says
    how it differs.

    Of a set of an older version only the names are known.

    Args:
      directory: of the prepared set.
      now: what the source is.
      class_names: of the source.
      spec: of the source, for the log.

    Raises:
      InputError: the directory is no prepared set.
    """
    before, old_names = _read(directory), tuple(read_manifest(directory)["classes"])
    if before is None:
        names = RecordReader(directory).names()
        unused = read_manifest(directory)["skipped"].keys()
        found = {
            "added": sorted({*now.names} - {*names} - unused),
            "removed": sorted({*names} - {*now.names}),
            "changed": [],
        }
        log.info(
            "data: %s is of an older version, so that its source is compared by the names of images alone",
            directory,
        )
    else:
        places = {name: place for place, name in enumerate(before.names)}
        both = [(place, places[name]) for place, name in enumerate(now.names) if name in places]
        another_class = [
            now.names[i]
            for i, j in both
            if _class(now, i, class_names) != _class(before, j, old_names)
        ]
        found = {
            "added": [name for name in now.names if name not in places],
            "removed": sorted(places.keys() - {*now.names}),
            "changed": [now.names[i] for i, j in both if now.stamps[i] != before.stamps[j]],
            "of another class": another_class,
        }
    changes = [
        f"{len(names):,} {what} ({', '.join(names[:SHOWN])}{', ...' * (len(names) > SHOWN)})"
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


def _class(record: Record, place: int, names: tuple[str, ...]) -> str | None:
    label = record.labels[place]
    return names[label] if 0 <= label < len(names) else None


def _read(directory: Path) -> Record | None:
    """What was written down; None where it is not there or is damaged."""
    try:
        with np.load(directory / FILE, allow_pickle=False) as file:
            names = file["names"].tobytes().decode().split("\n")
            record = Record(
                names, file["stamps"].astype(np.uint64), file["labels"].astype(np.int32)
            )
        return record if len(names) == len(record.stamps) == len(record.labels) else None
    except Exception:  # numpy, zipfile and zlib each raise their own
        return None
