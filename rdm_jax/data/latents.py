"""Latents beside prepared images: the posteriors that an autoencoder gives them, encoded once.

A file holds the mean, then the log-variance of every latent (h, w, 2 c), float16, little-endian,
one image after the other in the order of the records; another their classes, int32. The manifest
has the SHA-256 of the autoencoder, and the statistics that latents are normalised with.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Float64, UInt8

from rdm_jax.data.image_sets import ImageSet
from rdm_jax.data.manifest import MANIFEST, check_sizes, read_addition, verify_files
from rdm_jax.data.records import RecordReader, content_of
from rdm_jax.data.staging import staging_folder
from rdm_jax.runtime.console import log, progress
from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.files import atomic_write, sha256

VERSION = 1
FIELDS = {
    "autoencoder": str,
    "of": str,
    "shape": list,
    "mean": list,
    "deviation": list,
    "shards": list,
}
DTYPE, LABEL = np.dtype("<f2"), np.dtype("<i4")
MOMENTS, LABELS = "moments.bin", "labels.bin"
CHUNK = 64  # images that are encoded at a time


@runtime_checkable
class LatentEncoder(Protocol):
    """An autoencoder's encoder."""

    @property
    def digest(self) -> str:
        """SHA-256 of its weights."""

    def check(self, image_shape: tuple[int, ...]) -> None:
        """Raises InputError for images (h, w, c) that it does not take."""

    def __call__(self, images: UInt8[np.ndarray, "b h w c"]) -> Float[np.ndarray, "b h2 w2 k"]:
        """Means, then log-variances of the latents, along the last axis; float32."""


class LatentSet(NamedTuple):
    """Latents of a prepared set.

    Attributes:
      images: the set, whose 'image' are the moments, float16 (h, w, 2 c).
      mean, deviation: of each channel, over the set.
    """

    images: ImageSet
    mean: tuple[float, ...]
    deviation: tuple[float, ...]


def folder_of(directory: Path, digest: str) -> Path:
    """Where the latents of a prepared set are, by the hash of the autoencoder."""
    return directory / f"latents_{digest[:16]}"


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of latents. Raises InputError if it is missing or damaged."""
    return read_addition(folder, VERSION, FIELDS, fix_of(folder))


def fix_of(folder: Path) -> str:
    """What to do about damaged latents: they are made of the records beside them."""
    return f"Delete {folder} and run --mode=prepare."


def verify_latents(directory: Path) -> None:
    """Raises InputError for a file of any latents of a set that differs from its hash."""
    for folder in sorted(path for path in directory.glob("latents_*") if path.is_dir()):
        verify_files(folder, read_manifest(folder)["shards"], fix_of(folder))


def is_encoded(directory: Path, digest: str) -> bool:
    """Whether a prepared set has latents of its images by this autoencoder."""
    try:
        manifest = read_manifest(folder_of(directory, digest))
        return (manifest["of"], manifest["autoencoder"]) == (content_of(directory), digest)
    except InputError:
        return False


def add_latents(
    directory: Path, encoder: LatentEncoder, check_stop: Callable[[], None] = lambda: None
) -> None:
    """Encodes a prepared set, unless that is done; published by one rename.

    A run that is interrupted is resumed by the next one, from its last whole chunk.

    Args:
      directory: of the prepared set.
      encoder: of the latents.
      check_stop: called between chunks; an exception ends the work.

    Raises:
      InputError: the encoder does not take the images, a latent does not fit in float16, a record
        is damaged, or another process prepares the set.
      OSError: a file cannot be written.
    """
    if is_encoded(directory, encoder.digest):
        return
    reader = RecordReader(directory)
    encoder.check(reader.image_shape)
    folder = folder_of(directory, encoder.digest)
    with staging_folder(directory) as staging:
        if is_encoded(directory, encoder.digest):  # by another process, before the lock was free
            return
        content = reader.content()
        # Its name says what an unfinished file is made of.
        of = hashlib.sha256(f"{content} {encoder.digest}".encode()).hexdigest()[:16]
        made = staging / f"{folder.name}_{of}"
        made.mkdir(exist_ok=True)
        shape = _append(made, reader, encoder, check_stop)
        _finish(made, len(reader), shape, content, encoder.digest)
        if folder.exists():  # but it is of other images, or damaged
            shutil.rmtree(folder)
        os.rename(made, folder)
    log.info("data: %s has the latents of %s images", directory.name, f"{len(reader):,}")


def _append(
    made: Path, reader: RecordReader, encoder: LatentEncoder, check_stop: Callable[[], None]
) -> tuple[int, ...]:
    """Appends moments and classes to those that an interrupted run has written.

    Returns:
      The shape of the moments of an image.
    """
    shape = encoder(np.zeros((1, *reader.image_shape), np.uint8)).shape[1:]
    each = {MOMENTS: int(np.prod(shape)) * DTYPE.itemsize, LABELS: LABEL.itemsize}
    for name in each:
        (made / name).touch()
    done = min((made / name).stat().st_size // size for name, size in each.items())
    done -= done % CHUNK
    for name, size in each.items():
        os.truncate(made / name, done * size)
    with (
        (made / MOMENTS).open("ab") as moments,
        (made / LABELS).open("ab") as labels,
        progress(len(reader), "encoding latents", done) as bar,
    ):
        for first in range(done, len(reader), CHUNK):
            items = [reader[index] for index in range(first, min(first + CHUNK, len(reader)))]
            values = encoder(np.stack([pixels for pixels, _ in items]))
            if not np.abs(values).max() <= np.finfo(DTYPE).max:  # or not finite
                raise InputError(
                    f"latents of records {first} to {first + len(items) - 1} do not fit in float16",
                    "Use another autoencoder.",
                )
            moments.write(values.astype(DTYPE).tobytes())
            labels.write(np.array([label for _, label in items], LABEL).tobytes())
            bar.update(len(items))
            check_stop()
    return shape


def _finish(made: Path, count: int, shape: tuple[int, ...], content: str, digest: str) -> None:
    """Makes a set of latents of the files in a folder."""
    moments = np.memmap(made / MOMENTS, DTYPE, "r", shape=(count, *shape))
    mean, deviation = statistics(moments)
    if not deviation.min() > 0:
        channel = int(deviation.argmin())
        raise InputError(
            f"channel {channel} of the latents is the same in all images",
            "Use another autoencoder.",
        )
    manifest = {
        "version": VERSION,
        "autoencoder": digest,
        "of": content,
        "shape": list(shape),
        "mean": mean.tolist(),
        "deviation": deviation.tolist(),
        "shards": [
            {
                "file": path.name,
                "records": count,
                "bytes": path.stat().st_size,
                "sha256": sha256(path),
            }
            for path in (made / MOMENTS, made / LABELS)
        ],
    }
    with atomic_write(made / MANIFEST) as partial:
        partial.write_text(json.dumps(manifest, indent=1))


def statistics(
    moments: Float[np.ndarray, "n h w k"],
) -> tuple[Float64[np.ndarray, " c"], Float64[np.ndarray, " c"]]:
    """Mean and standard deviation of each channel over draws from all posteriors.

    The variance is that of the means plus the mean of the variances.
    """
    total, squares, values = 0.0, 0.0, 0
    for first in range(0, len(moments), CHUNK):
        part = moments[first : first + CHUNK].astype(np.float64)
        mean, log_variance = np.split(part.reshape(-1, part.shape[-1]), 2, axis=-1)
        total = total + mean.sum(0)
        squares = squares + (mean**2 + np.exp(log_variance)).sum(0)
        values += len(mean)
    mean = total / values
    return mean, np.sqrt(np.maximum(squares / values - mean**2, 0))


class LatentReader(Sequence):
    """Random access to the moments of a prepared set; can be pickled.

    Args:
      folder: that holds them.

    Attributes:
      image_shape: (h, w, 2 c) of an image's moments.

    Raises:
      InputError: a file is missing or of another size than its manifest says.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        manifest = read_manifest(folder)
        check_sizes(folder, manifest["shards"], fix_of(folder))
        self.image_shape = tuple(manifest["shape"])
        try:
            self._labels = np.fromfile(folder / LABELS, LABEL)
            shape = (len(self._labels), *self.image_shape)
            if int(np.prod(shape)) * DTYPE.itemsize != (folder / MOMENTS).stat().st_size:
                raise ValueError("its latents are not as many as its classes")
            self._moments = np.memmap(folder / MOMENTS, DTYPE, "r", shape=shape)
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"{folder} is damaged ({error})", fix_of(folder)) from error

    def __getstate__(self) -> Path:
        return self._folder

    def __setstate__(self, folder: Path):
        self.__init__(folder)

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        """The moments of an image (h, w, 2 c), and its class index, -1 for none."""
        return self._moments[index], int(self._labels[index])

    def label(self, index: int) -> int:
        """The class of an image, -1 for none."""
        return int(self._labels[index])

    def identity(self) -> str:
        """Changes when a latent does: the manifest, which has a hash of every file."""
        return (self._folder / MANIFEST).read_text()


def open_latents(directory: Path, digest: str, class_names: tuple[str, ...]) -> LatentSet:
    """The latents of a prepared set by an autoencoder.

    Args:
      directory: of the prepared set.
      digest: SHA-256 of the autoencoder's weights.
      class_names: of the set.

    Raises:
      InputError: there are none by this autoencoder, they are of other images, or damaged.
    """
    folder = folder_of(directory, digest)
    if not folder.is_dir():
        others = sorted(path.name for path in directory.glob("latents_*"))
        found = f", but those of others ({', '.join(others)})" if others else ""
        raise InputError(
            f"the prepared data in {directory} has no latents of the autoencoder with SHA-256 "
            f"{digest[:16]}{found}",
            "Run --mode=prepare with this autoencoder, or use the one that made them.",
        )
    manifest, content = read_manifest(folder), content_of(directory)
    if manifest["of"] != content:
        raise InputError(f"{folder} has the latents of other images", fix_of(folder))
    if manifest["autoencoder"] != digest:
        raise InputError(f"{folder} has the latents of another autoencoder", fix_of(folder))
    reader = LatentReader(folder)
    identity = hashlib.sha256(f"{content} {digest}".encode()).hexdigest()
    images = ImageSet(reader, reader.image_shape, class_names, identity, dtype=DTYPE)
    mean, deviation = (tuple(map(float, manifest[field])) for field in ("mean", "deviation"))
    if not 2 * len(mean) == 2 * len(deviation) == reader.image_shape[-1] or min(deviation) <= 0:
        raise InputError(f"{folder} has statistics of other latents", fix_of(folder))
    return LatentSet(images, mean, deviation)
