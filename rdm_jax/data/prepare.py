"""Any source -> array_record files, once, in the format of tensorflow-datasets and without TensorFlow."""

import contextlib
import fcntl
import functools
import io
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource
from PIL import Image
from tqdm import tqdm

from rdm_jax.data.sources import Source, open_source
from rdm_jax.errors import InputError
from rdm_jax.terminal import progress

# Bytes of pixels a shard: tensorflow-datasets keeps the encoded images of the shard that it writes in memory.
SHARD_BYTES = 256 * 2**20


class RelayImages(tfds.core.ShardBasedBuilder, skip_registration=True):
    """Writes a source in the order of its listing: split 'train', features image, name and, with classes, label.

    A ShardBasedBuilder, since GeneratorBasedBuilder shuffles through files of TensorFlow's beyond 1 GB.
    """

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, source: Source, settings: dict, bar: tqdm, data_dir: Path):
        self._source, self._settings, self._bar = source, settings, bar
        super().__init__(data_dir=data_dir, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        shape = tuple(self._settings[side] for side in ("height", "width", "channels"))
        features = {"image": tfds.features.Image(shape=shape, encoding_format="png"), "name": tfds.features.Text()}
        if self._source.class_names:
            features["label"] = tfds.features.ClassLabel(names=self._source.class_names)
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"Images of {self._settings['spec']}, prepared by rdm_jax.",
            features=tfds.features.FeaturesDict(features),
            metadata=tfds.core.MetadataDict(self._settings),
            disable_shuffling=True,
        )

    def _shard_iterators_per_split(self, dl_manager) -> dict:
        count = len(self._source)
        shards = min(count, -(-_raw_bytes(count, self._settings) // SHARD_BYTES))
        parts = np.array_split(np.arange(count), shards)
        return {"train": [functools.partial(map, self._example, part.tolist()) for part in parts]}

    def _example(self, index: int) -> tuple[int, dict]:
        size = {key: self._settings[key] for key in ("height", "width", "channels")}
        pixels = self._source.read(index, **size, background=tuple(self._settings["background"]))
        png = io.BytesIO()  # By Pillow, for tensorflow-datasets would encode an array by TensorFlow.
        Image.fromarray(pixels[..., 0] if size["channels"] == 1 else pixels).save(png, format="png")
        example = {"image": png.getvalue(), "name": self._source.names[index]}
        if self._source.class_names:
            example["label"] = self._source.labels[index]
        self._bar.update()
        return index, example


def prepare(
    spec: str,
    directory: str | os.PathLike,
    *,
    height: int,
    width: int,
    channels: int,
    background: Sequence[int] = (255, 255, 255),
    skin_tones: str = "",
) -> Path:
    """Writes a source as records, unless that is done already.

    The directory appears at the end, by one rename, or not at all; a killed run leaves only a hidden sibling of it,
    which the next one clears away. One process of a run calls this, the others wait for it.

    Args:
      spec, skin_tones: as for `sources.open_source`; the spec is compared with that of an earlier run as it is written.
      directory: what is to become the data set, as `tfds.builder_from_directory` and `pipeline.open_prepared` read it.
      height, width: of every image, after a central crop to their ratio and Lanczos.
      channels: 1 (grey) or 3 (RGB).
      background: RGB from 0 to 255, behind what is transparent.

    Returns:
      The absolute path of the directory.

    Raises:
      InputError: a setting or an image cannot be used, the directory holds something else or a set prepared from
        other settings, it cannot be written, or the disk is full.
    """
    settings = _settings(spec, height, width, channels, background, skin_tones)
    directory = Path(directory).expanduser().resolve()
    try:
        if not _is_prepared(directory, settings):
            source = open_source(spec, skin_tones=skin_tones)
            with _staging(directory) as staging:
                _write(source, settings, staging, directory)
    except OSError as error:
        raise InputError(f"the data directory {directory} cannot be written ({error}); another place would do.") from error
    return directory


def _settings(spec, height, width, channels, background, skin_tones) -> dict:
    for name, side in (("height", height), ("width", width)):
        if side < 1:
            raise InputError(f"{name}={side} is no size of an image; 1 or more would do.")
    if channels not in (1, 3):
        raise InputError(f"channels={channels} cannot be prepared; 1 (grey) or 3 (RGB) would do.")
    if len(background) != 3 or not all(0 <= value <= 255 for value in background):
        raise InputError(f"background={background} is no colour; three numbers from 0 to 255 would do.")
    return {
        "spec": spec,
        "height": height,
        "width": width,
        "channels": channels,
        "background": list(background),
        "skin_tones": skin_tones,
    }


def _is_prepared(directory: Path, settings: dict) -> bool:
    """Whether this very set is there; what else is there is refused, never overwritten."""
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return False
    try:
        found = json.loads((directory / "metadata.json").read_text())
        different = [f"{key}={found[key]!r}, not {value!r}" for key, value in settings.items() if found[key] != value]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{directory} is there and is no prepared data; another directory would do.") from error
    if different:
        differences = " and ".join(different)
        raise InputError(f"{directory} was prepared with {differences}; another directory, or deleting it, would do.")
    return True


@contextlib.contextmanager
def _staging(directory: Path) -> Iterator[Path]:
    """An empty hidden sibling of the directory, ours alone while its lock is held (the lock dies with its process)."""
    staging = directory.with_name(f".{directory.name}.incomplete")
    staging.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(staging, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise InputError(f"{directory} is being prepared by another process; waiting for that would do.") from error
    try:
        for left_over in staging.iterdir():
            shutil.rmtree(left_over)
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        os.close(descriptor)


def _write(source: Source, settings: dict, staging: Path, directory: Path) -> None:
    # PNG is smaller than the pixels by a factor nobody knows beforehand; this catches what cannot go well.
    needed, free = _raw_bytes(len(source), settings) // 4, shutil.disk_usage(staging).free
    if free < needed:
        raise OSError(f"{free / 2**20:.1f} MB free, {needed / 2**20:.1f} MB needed at the least")
    with progress(len(source), f"preparing {settings['spec']}") as bar, contextlib.redirect_stdout(io.StringIO()):
        builder = RelayImages(source, settings, bar, staging)  # It prints to stdout what we say better.
        try:
            builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
        except RuntimeError as error:  # array_record's words for a full disk, among others.
            raise OSError(error) from error
    shards = sorted(str(shard) for shard in builder.data_path.glob("*.array_record*"))
    if len(ArrayRecordDataSource(shards)) != len(source):
        raise OSError("records are missing from what was written")
    os.rename(builder.data_path, directory)


def _raw_bytes(count: int, settings: dict) -> int:
    return count * settings["height"] * settings["width"] * settings["channels"]
