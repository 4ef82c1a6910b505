"""Prepared records -> batches: the same order whatever the number of processes, resumed exactly."""

import functools
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import grain
import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource
from PIL import Image

from rdm_jax.errors import InputError
from rdm_jax.terminal import progress

Batch = dict[str, np.ndarray]


class PreparedImages(Sequence):
    """Random access to a prepared set; made by `open_prepared`.

    Attributes:
      directory: where it is.
      image_shape: (h, w, c) of every image.
      class_names: the classes; empty when the images have none (every label is -1 then).
    """

    def __init__(self, directory: Path, records: Sequence, image_shape: tuple[int, int, int], class_names: tuple[str, ...]):
        self.directory, self.image_shape, self.class_names = directory, image_shape, class_names
        self._records, self._cached = records, None

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Batch:
        """One image: {'image': uint8 (h, w, c), 'label': int32 ()}.

        Raises:
          IndexError: there is no such image.
          InputError: its record is damaged.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        if self._cached:
            return {key: values[index] for key, values in self._cached.items()}
        try:
            record = self._records[index]
            image = Image.open(io.BytesIO(record["image"])).convert("L" if self.image_shape[-1] == 1 else "RGB")
            pixels = np.asarray(image).reshape(self.image_shape)
        except Exception as error:  # array_record, protobuf and Pillow each raise their own.
            where = f"record {index} of {self.directory}"
            raise InputError(f"{where} is damaged ({error}); deleting that and preparing it again would do.") from error
        return {"image": pixels, "label": np.int32(record.get("label", -1))}

    def batch(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """Several images, in the order given: {'image': uint8 (b, h, w, c), 'label': int32 (b,)}."""
        if self._cached:
            return {key: values[indices] for key, values in self._cached.items()}
        items = [self[int(index)] for index in indices]
        return {key: np.stack([item[key] for item in items]) for key in ("image", "label")}

    def cache(self) -> None:
        """Decodes the whole set into one array, so that a batch costs a look-up."""
        cached = {
            "image": np.empty((len(self), *self.image_shape), np.uint8),
            "label": np.empty(len(self), np.int32),
        }
        with progress(len(self), f"decoding {self.directory.name}") as bar:
            for index in range(len(self)):
                for key, value in self[index].items():
                    cached[key][index] = value
                bar.update()
        self._cached = cached


def open_prepared(directory: str | os.PathLike, *, cache_bytes: int = 0) -> PreparedImages:
    """Opens what `prepare` wrote, or any array_record set of tensorflow-datasets with one size of image in 'train'.

    Args:
      directory: the one with dataset_info.json in it.
      cache_bytes: the set is decoded into memory, once, when its pixels are not more than this.

    Raises:
      InputError: nothing is there, it is damaged, or its images are not uint8 of one size.
    """
    directory = Path(directory).expanduser().resolve()
    if not (directory / "dataset_info.json").is_file():
        raise InputError(f"there is no prepared data in {directory}; the path that `prepare` returned would do.")
    try:
        builder = tfds.builder_from_directory(directory)
        # Images are decoded here and not by tensorflow-datasets, which asks for OpenCV and warns where it is missing.
        records = builder.as_data_source("train", decoders={"image": tfds.decode.SkipDecoding()})
        written = len(ArrayRecordDataSource([str(file) for file in builder.info.splits["train"].filepaths]))
        features = dict(builder.info.features)
        image = features["image"]
    except Exception as error:  # Whatever is wrong with the files, the libraries report it in their own ways.
        raise InputError(f"the prepared data in {directory} is damaged ({error}); preparing it again would do.") from error
    if written != len(records):
        raise InputError(f"{directory} holds {written} of {len(records)} records; preparing it again would do.")
    if None in image.shape or image.np_dtype != np.uint8:
        raise InputError(f"the images in {directory} have shape {image.shape}, {image.np_dtype}; uint8 of one size would do.")
    class_names = tuple(features["label"].names) if "label" in features else ()
    source = PreparedImages(directory, records, tuple(image.shape), class_names)
    if len(source) * int(np.prod(source.image_shape)) <= cache_bytes:
        source.cache()
    return source


def train_iterator(
    source: PreparedImages,
    *,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 2,
    prefetch: int = 4,
) -> grain.DatasetIterator:
    """Batches without end, epoch after epoch in a new order, every image once an epoch.

    Global batch k takes the positions k * batch_size, ... of the epochs laid end to end; process i takes its i-th
    part. So neither the global batches nor the iterator's state, {'next_index': k} for the next k to be handed out
    (JSON), know of the number of processes, and a run goes on exactly on another number of them.

    Args:
      source: what to draw from.
      batch_size: of the global batch; it may exceed the number of images.
      seed: of the orders.
      process_index, process_count: whose part to yield.
      threads, prefetch: how many threads make how many batches ahead of need.

    Returns:
      An iterator over {'image': uint8 (b, h, w, c), 'label': int32 (b,)} with b = batch_size // process_count, and
      with get_state() and set_state().

    Raises:
      InputError: the batch size is not a positive multiple of the number of processes, or the seed is negative.
    """
    if batch_size < 1 or batch_size % process_count:
        raise InputError(f"batch_size={batch_size} cannot be shared by {process_count} processes; a multiple would do.")
    if not 0 <= process_index < process_count:
        raise InputError(f"process_index={process_index} of {process_count} processes; 0 to {process_count - 1} would do.")
    if seed < 0:
        raise InputError(f"seed={seed} is negative; 0 or more would do.")
    batches = _Batches(source, batch_size, seed, process_index, process_count)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
    return iter(grain.MapDataset.source(batches).to_iter_dataset(options))


class _Batches:
    """One process's part of every global batch, by number.

    A batch is one element to grain, as its bookkeeping costs more than the look-up of a cached image; and its own
    shuffle adds the epoch to the seed, so that the second epoch of seed 0 would be the first of seed 1.
    """

    def __init__(self, source: PreparedImages, batch_size: int, seed: int, process_index: int, process_count: int):
        self._source, self._batch_size = source, batch_size
        self._part = np.arange(batch_size).reshape(process_count, -1)[process_index]

        def order(epoch: int) -> np.ndarray:
            return np.random.default_rng((seed, epoch)).permutation(len(source))

        self._order = functools.lru_cache(maxsize=4)(order)  # Two epochs for a batch across them, two for prefetching.

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> Batch:
        epochs, positions = np.divmod(index * self._batch_size + self._part, len(self._source))
        parts = [self._order(epoch)[positions[epochs == epoch]] for epoch in range(int(epochs[0]), int(epochs[-1]) + 1)]
        return self._source.batch(np.concatenate(parts))
