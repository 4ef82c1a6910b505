"""Records of images: a tensorflow-datasets data set as array_record files, with random access."""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rdm_jax.data.captions import COLUMNS, plain
from rdm_jax.data.content import image_hash, total
from rdm_jax.data.images import ImageSpec, encode, open_image, to_uint8
from rdm_jax.data.manifest import DAMAGED, MANIFEST, check_sizes, identity, read_manifest
from rdm_jax.data.shards import Shard, versions
from rdm_jax.data.source import Source
from rdm_jax.data.tfds_directory import open_directory
from rdm_jax.runtime.console import progress
from rdm_jax.runtime.errors import BadImage, InputError
from rdm_jax.runtime.lazy import lazy_import

array_record = lazy_import("array_record.python.array_record_data_source", "data")
tfds = lazy_import("tensorflow_datasets", "data")

ENCODINGS = ("png", "jpeg", "raw")


@dataclasses.dataclass(frozen=True)
class Encoding:
    """How pixels are stored.

    Attributes:
      kind: 'png' (lossless), 'jpeg', or 'raw' (compressed by array_record only: fastest to decode,
        more space).
      quality: of JPEG, 1 to 100.
    """

    kind: str = "png"
    quality: int = 95

    def check(self) -> None:
        """Raises InputError, naming the field, if a field is out of range."""
        if self.kind not in ENCODINGS:
            raise InputError(
                f"encoding={self.kind!r} is unknown", f"Use {' or '.join(map(repr, ENCODINGS))}."
            )
        if not 1 <= self.quality <= 100:
            raise InputError(f"quality={self.quality} is out of range", "Use 1 to 100.")


@dataclasses.dataclass(frozen=True)
class ImageShard(Shard):
    """One file of a set of images.

    Attributes:
      source: the images of this file only.
      skip_bad: leave out images that cannot be used, instead of raising.
    """

    source: Source
    form: ImageSpec
    encoding: Encoding
    skip_bad: bool

    def __len__(self) -> int:
        return len(self.source)

    @property
    def memory_per_image(self) -> int:  # noqa: D102
        return self.source.reader.memory_per_image

    @property
    def features(self) -> Any:
        """The `tfds.features.FeaturesDict` of a record: image, name, and label and caption if
        there are any."""
        shape = (self.form.height, self.form.width, self.form.channels)
        if self.encoding.kind == "raw":
            image = tfds.features.Tensor(
                shape=shape, dtype=np.uint8, encoding=tfds.features.Encoding.BYTES
            )
        else:
            image = tfds.features.Image(shape=shape, encoding_format=self.encoding.kind)
        names = self.source.class_names
        others = {"label": tfds.features.ClassLabel(names=names)} if names else {}
        if self.source.captions:
            others["caption"] = tfds.features.Text()
        return tfds.features.FeaturesDict({"image": image, "name": tfds.features.Text(), **others})

    def empty(self) -> dict[str, Any]:
        """The statistics of a file without records.

        'content', a hash of names, labels and decoded pixels; 'records', their number, how many of
        them were 'enlarged', and how many are 'of_class' 0, 1, ...; and 'skipped', reasons by the
        names of images left out.
        """
        return {
            "content": total(()),
            "records": 0,
            "enlarged": 0,
            "of_class": [0] * len(self.source.class_names),
            "skipped": {},
        }

    def accepts(self, found: dict[str, Any]) -> bool:  # noqa: D102
        return self.skip_bad or not found["skipped"]

    def made_from(self) -> str:  # noqa: D102
        stamps = [(name, self.source.reader.stamp(name)) for name in self.source.names]
        settings = [dataclasses.asdict(self.form), dataclasses.asdict(self.encoding)]
        everything = [
            versions(),
            settings,
            self.source.reader.place,
            self.source.class_names,
            list(self.source.labels),
            stamps,
        ]
        everything += [list(self.source.captions)] if self.source.captions else []
        return hashlib.sha256(json.dumps(everything).encode()).hexdigest()

    def examples(self, seen: dict[str, Any]) -> Iterator[tuple[int, bytes]]:
        """Yields serialized records by index. Raises InputError as `Source.read`."""
        features, form = self.features, self.form
        serializer = tfds.core.example_serializer.ExampleSerializer(features.get_serialized_info())
        for index, name in enumerate(self.source.names):
            try:
                decoded = self.source.decode(index, form.channels, form.background)
                label, caption = self.source.label(index), self.source.caption(index)
                pixels = self.source.fit(index, decoded, form)
            except BadImage as error:
                if not self.skip_bad:
                    raise
                seen["skipped"][name] = error.reason
                continue
            seen["records"] += 1
            seen["enlarged"] += decoded.shape[0] < form.height or decoded.shape[1] < form.width
            if self.source.class_names:
                seen["of_class"][label] += 1
            seen["content"] = total((seen["content"], image_hash(name, label, pixels, caption)))
            example = {"image": pixels, "name": name}
            if self.encoding.kind != "raw":
                example["image"] = encode(pixels, self.encoding.kind, self.encoding.quality)
            if self.source.class_names:
                example["label"] = label
            if self.source.captions:
                example["caption"] = caption
            # Not by features.serialize_example, whose bytes differ from process to process.
            record = serializer.get_tf_example(features.encode_example(example))
            yield index, record.SerializeToString(deterministic=True)


class RecordReader(Sequence):
    """Random access to the split 'train' of a data set in array_record files; can be pickled.

    Args:
      directory: of the data set.
      shard: the only file to read, from 0; None for all.

    Attributes:
      shard_lengths: numbers of records of all files.

    Raises:
      Exception: of the libraries, for anything that is wrong with the files.
    """

    def __init__(self, directory: Path, shard: int | None = None):
        self.directory, self._shard = directory, shard
        builder = open_directory(directory)
        self.features = builder.info.features
        split = builder.info.splits["train"]
        self.declared = split.num_examples
        self.shard_lengths = list(split.shard_lengths)
        files = [str(file) for file in split.filepaths]
        self._records = array_record.ArrayRecordDataSource(
            files if shard is None else files[shard : shard + 1]
        )
        self.image_shape = tuple(self.features["image"].shape)
        # Images are decoded by this package, as tensorflow-datasets needs OpenCV and warns without
        # it.
        encoded = isinstance(self.features["image"], tfds.features.Image)
        self._decoders = {"image": tfds.decode.SkipDecoding()} if encoded else None
        label = dict(self.features).get("label")
        self.class_names = tuple(label.names) if isinstance(label, tfds.features.ClassLabel) else ()

    def __getstate__(self) -> tuple[Path, int | None]:
        return self.directory, self._shard

    def __setstate__(self, state: tuple[Path, int | None]):
        self.__init__(*state)

    def __len__(self) -> int:
        return len(self._records)

    def names(self) -> list[str]:
        """The names of all images. Raises InputError if a record is damaged."""
        names = []
        for index in range(len(self)):
            with self._undamaged(index):
                names.append(self._record(index)["name"].decode())
        return names

    def name(self, index: int) -> str:
        """What identifies an image in a message: its name, or its index where it has none."""
        if not isinstance(dict(self.features).get("name"), tfds.features.Text):
            return f"record {index}"
        with self._undamaged(index):
            return f"image {self._record(index)['name'].decode()!r}"

    def captions(self, check_stop: Callable[[], None] = lambda: None) -> list[str]:
        """The captions of all images, each in one line.

        Args:
          check_stop: called between records; an exception ends the work.

        Raises:
          InputError: there are none, one is empty or not UTF-8, or a record is damaged.
        """
        features = dict(self.features)
        known = (n for n in COLUMNS if isinstance(features.get(n), tfds.features.Text))
        column = next(known, None)
        if column is None:
            raise InputError(
                f"the prepared data in {self.directory} has no captions",
                "Prepare it with config.data.captions.",
            )
        captions = []
        with progress(len(self), f"reading the captions of {self.directory.name}") as bar:
            for index in range(len(self)):
                with self._undamaged(index):
                    text = self._record(index)[column]
                captions.append(self._caption(index, text))
                bar.update()
                check_stop()
        return captions

    def label(self, index: int) -> int:
        """The class of an image, -1 for none. Raises InputError if its record is damaged."""
        if not self.class_names:
            return -1
        with self._undamaged(index):
            return int(self._record(index)["label"])

    def _caption(self, index: int, text: bytes) -> str:
        try:
            caption, what = plain(text.decode()), "is empty"
        except UnicodeDecodeError:
            caption, what = "", "is not UTF-8"
        if not caption:
            raise InputError(
                f"the caption of {self.name(index)} of {self.directory} {what}",
                "Prepare that data set with captions only.",
            )
        return caption

    def content(self) -> str:
        """The set's `content_of`."""
        return content_of(self.directory)

    def identity(self) -> str:
        """Changes when a record does.

        The manifest, which has a hash of every file; for sets without, sizes and times of files.
        """
        if (self.directory / MANIFEST).is_file():
            return (self.directory / MANIFEST).read_text()
        files = sorted(path for path in self.directory.iterdir() if path.is_file())
        return repr([(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files])

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        """Pixels, uint8 (h, w, c), and class index, -1 for none.

        Raises:
          InputError: the record is damaged.
        """
        with self._undamaged(index):
            record = self._record(index)
            image = record["image"]
            if isinstance(image, bytes):
                image = to_uint8(open_image(image), self.image_shape[-1], (255, 255, 255))
            return image.reshape(self.image_shape), int(record["label"]) if self.class_names else -1

    def _record(self, index: int) -> dict[str, Any]:
        return self.features.deserialize_example_np(self._records[index], decoders=self._decoders)

    @contextlib.contextmanager
    def _undamaged(self, index: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # array_record, protobuf and Pillow each raise their own errors
            raise InputError(
                f"record {index} of {self.directory} is damaged ({error})",
                "Delete the directory and prepare it again.",
            ) from error


def content_of(directory: Path) -> str:
    """Changes when an image of a set does, and not when the set is copied.

    By the manifest; for sets without, by the sizes of files. Raises InputError for a damaged one.
    """
    if (directory / MANIFEST).is_file():
        return identity(directory)
    files = sorted(path for path in directory.iterdir() if path.is_file())
    return hashlib.sha256(
        json.dumps([(path.name, path.stat().st_size) for path in files]).encode()
    ).hexdigest()


def check_complete(directory: Path, reader: RecordReader) -> None:
    """Checks counts, classes and sizes; does not read records, which have checksums."""
    if reader.declared != len(reader):
        raise InputError(
            f"{directory} holds {len(reader)} of {reader.declared} records", "Prepare it again."
        )
    if not (directory / MANIFEST).is_file():
        return  # not made by `prepare`
    manifest = read_manifest(directory)
    if list(manifest["classes"]) != list(reader.class_names):
        raise InputError(f"{directory} has other classes than its manifest", DAMAGED)
    check_sizes(directory, manifest["shards"], DAMAGED)
