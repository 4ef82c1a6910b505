"""Records of images: a tensorflow-datasets data set as array_record files, with random access."""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import rdm_jax
from rdm_jax.data.content import image_hash, total
from rdm_jax.data.images import ImageSpec, encode, open_image, to_uint8
from rdm_jax.data.manifest import MANIFEST, identity
from rdm_jax.data.sources import Source
from rdm_jax.data.tfds_directory import open_directory
from rdm_jax.runtime.errors import BadImage, InputError
from rdm_jax.runtime.files import atomic_write, parse_json, sha256
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


def versions() -> dict[str, str]:
    """The versions of everything that decides the bytes of a record."""
    libraries = ("array_record", "pillow", "tensorflow-datasets")
    return {"rdm_jax": rdm_jax.__version__} | {
        name: importlib.metadata.version(name) for name in libraries
    }


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file of a set, to be written; can be pickled.

    Attributes:
      source: the images of this file only.
      path: of the file; a JSON file beside it (the voucher) describes its content.
      skip_bad: leave out images that cannot be used, instead of raising.
    """

    source: Source
    form: ImageSpec
    encoding: Encoding
    path: Path
    skip_bad: bool

    @property
    def features(self) -> Any:
        """The `tfds.features.FeaturesDict` of a record: image, name and, with classes, label."""
        shape = (self.form.height, self.form.width, self.form.channels)
        if self.encoding.kind == "raw":
            image = tfds.features.Tensor(
                shape=shape, dtype=np.uint8, encoding=tfds.features.Encoding.BYTES
            )
        else:
            image = tfds.features.Image(shape=shape, encoding_format=self.encoding.kind)
        names = self.source.class_names
        label = {"label": tfds.features.ClassLabel(names=names)} if names else {}
        return tfds.features.FeaturesDict({"image": image, "name": tfds.features.Text(), **label})

    def write(self) -> dict[str, Any]:
        """Writes the file, unless it exists and was written from the same images.

        Returns:
          'bytes' and 'sha256' of the file; 'content', a hash of names, labels and decoded pixels;
          'records', their number, how many of them were 'enlarged', and how many are 'of_class' 0,
          1, ...; and 'skipped', reasons by the names of images left out.

        Raises:
          InputError: as for `Source.read`; no file is left.
          OSError: the file cannot be written.
        """
        voucher = self.path.with_suffix(".json")
        made_from = self._made_from()
        found = _read_voucher(voucher)
        usable = (
            found
            and found.pop("made_from") == made_from
            and (self.skip_bad or not found["skipped"])
        )
        if usable and found["sha256"] == sha256(self.path):
            return found
        seen = {
            "content": total(()),
            "records": 0,
            "enlarged": 0,
            "of_class": [0] * len(self.source.class_names),
            "skipped": {},
        }
        with atomic_write(self.path) as partial:
            _write_records(partial, self._examples(seen))
            if len(array_record.ArrayRecordDataSource([str(partial)])) != seen["records"]:
                raise OSError(f"{partial} lost records while it was written")
            about = {"bytes": partial.stat().st_size, "sha256": sha256(partial), **seen}
        with atomic_write(voucher) as partial:
            partial.write_text(json.dumps({**about, "made_from": made_from}))
        return about

    def _made_from(self) -> str:
        """A hash of everything that decides the file's bytes."""
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
        return hashlib.sha256(json.dumps(everything).encode()).hexdigest()

    def _examples(self, seen: dict[str, Any]) -> Iterator[tuple[int, bytes]]:
        """Yields serialized records by index, and adds their statistics to `seen`."""
        features, form = self.features, self.form
        serializer = tfds.core.example_serializer.ExampleSerializer(features.get_serialized_info())
        for index, name in enumerate(self.source.names):
            try:
                decoded = self.source.decode(index, form.channels, form.background)
                label = self.source.label(index)
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
            seen["content"] = total((seen["content"], image_hash(name, label, pixels)))
            example = {"image": pixels, "name": name}
            if self.encoding.kind != "raw":
                example["image"] = encode(pixels, self.encoding.kind, self.encoding.quality)
            if self.source.class_names:
                example["label"] = label
            # Not by features.serialize_example, whose bytes differ from process to process.
            record = serializer.get_tf_example(features.encode_example(example))
            yield index, record.SerializeToString(deterministic=True)


def _write_records(path: Path, examples) -> None:
    try:
        tfds.core.ExampleWriter(file_format=tfds.core.FileFormat.ARRAY_RECORD).write(path, examples)
    except RuntimeError as error:  # array_record's error for a full disk, among others
        raise OSError(f"{path}: {error}") from error
    with path.open("rb") as file:
        os.fsync(file.fileno())  # or a power failure could leave a named file without its content


def _read_voucher(voucher: Path) -> dict[str, Any] | None:
    """What a voucher says of its file; None if it is missing, damaged or incomplete."""
    try:
        found = parse_json(voucher.read_text())
        is_complete = {"content", "records", "skipped", "sha256", "made_from"} <= found.keys()
    except (OSError, ValueError, AttributeError):
        return None
    return found if is_complete else None


class RecordReader(Sequence):
    """Random access to the split 'train' of a data set in array_record files; can be pickled.

    Raises:
      Exception: of the libraries, for anything that is wrong with the files.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        builder = open_directory(directory)
        self.features = builder.info.features
        split = builder.info.splits["train"]
        self.declared = split.num_examples
        self._records = array_record.ArrayRecordDataSource([str(file) for file in split.filepaths])
        self.image_shape = tuple(self.features["image"].shape)
        # Images are decoded by this package, as tensorflow-datasets needs OpenCV and warns without
        # it.
        encoded = isinstance(self.features["image"], tfds.features.Image)
        self._decoders = {"image": tfds.decode.SkipDecoding()} if encoded else None
        label = dict(self.features).get("label")
        self.class_names = tuple(label.names) if isinstance(label, tfds.features.ClassLabel) else ()

    def __getstate__(self) -> Path:
        return self.directory

    def __setstate__(self, directory: Path):
        self.__init__(directory)

    def __len__(self) -> int:
        return len(self._records)

    def names(self) -> list[str]:
        """The names of all images. Raises InputError if a record is damaged."""
        names = []
        for index in range(len(self)):
            with self._undamaged(index):
                names.append(self._record(index)["name"].decode())
        return names

    def content(self) -> str:
        """Changes when an image does, and not when the set is copied.

        By the manifest; for sets without, by the sizes of files.
        """
        if (self.directory / MANIFEST).is_file():
            return identity(self.directory)
        files = sorted(path for path in self.directory.iterdir() if path.is_file())
        return hashlib.sha256(
            json.dumps([(path.name, path.stat().st_size) for path in files]).encode()
        ).hexdigest()

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
