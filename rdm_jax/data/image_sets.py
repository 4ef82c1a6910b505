"""Sets of images of one size, with access at random: prepared records, or a small source decoded
into memory."""

import concurrent.futures
import functools
import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from rdm_jax.data.content import image_hash, set_hash, total
from rdm_jax.data.images import ImageSpec
from rdm_jax.data.left_out import check_left_out
from rdm_jax.data.manifest import MANIFEST, read_manifest
from rdm_jax.data.records import RecordReader
from rdm_jax.data.sources import check_apart, cores, open_source
from rdm_jax.runtime.console import log, progress
from rdm_jax.runtime.errors import BadImage, InputError
from rdm_jax.runtime.files import local_path
from rdm_jax.runtime.lazy import import_library

Batch = dict[str, np.ndarray]


class ImageSet(Sequence):
    """Images of one size; made by `open_prepared` or `open_direct`. It can be sent to another
    process.

    Args:
      items: pixels, uint8 (h, w, c), and class number by index.
      image_shape: (h, w, c) of every image.
      class_names: the classes; empty when the images have none (every label is -1 then).
      content: the hash of the set by `content.set_hash`; '' where it is not known yet.
      names: of the images, to find that hash once they are in memory; () where they have none.

    Attributes:
      image_shape, class_names: as given.
    """

    def __init__(
        self,
        items: Sequence,
        image_shape: tuple[int, ...],
        class_names: tuple[str, ...],
        content: str = "",
        names: Sequence[str] = (),
    ):
        self.image_shape, self.class_names, self._names = image_shape, class_names, names
        self._items, self._cached, self._content = items, None, content
        self._whole: ImageSet | None = None  # the set that this one is a part of
        self._chosen: np.ndarray | None = (
            None  # the images of a part, by their index in the whole set
        )

    def __len__(self) -> int:
        if self._chosen is not None:
            return len(self._chosen)
        return len(self._cached["label"] if self._cached else self._items)

    def __getitem__(self, index: int) -> Batch:
        """One image: {'image': uint8 (h, w, c), 'label': int32 ()}.

        Raises:
          IndexError: there is no such image.
          InputError: its record is damaged.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        return {key: values[0] for key, values in self.batch([index]).items()}

    def batch(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """Several images, in the order given: {'image': uint8 (b, h, w, c), 'label': int32
        (b,)}."""
        if self._chosen is not None:
            indices = self._chosen[np.asarray(indices)]
        if self._cached:
            return {key: values[indices] for key, values in self._cached.items()}
        batch = {
            "image": np.empty((len(indices), *self.image_shape), np.uint8),
            "label": np.empty(len(indices), np.int32),
        }
        for place, index in enumerate(indices):
            batch["image"][place], batch["label"][place] = self._items[int(index)]
        return batch

    def split(self, held_out: int) -> tuple["ImageSet", "ImageSet | None"]:
        """The set without `held_out` of its images, and these; no copies.

        They are chosen at random, always the same, one from each of so many equal parts: of every
        class, if the set is sorted.

        Raises:
          InputError: none would be left.
        """
        if not held_out:
            return self, None
        if not held_out < len(self):
            raise InputError(
                f"config.data.held_out={held_out} leaves none of {len(self)} images; fewer would do."
            )
        held = np.floor(
            (np.arange(held_out) + np.random.default_rng(0).random(held_out)) * len(self) / held_out
        ).astype(int)
        return self._part(np.setdiff1d(np.arange(len(self)), held)), self._part(held)

    def _part(self, chosen: np.ndarray) -> "ImageSet":
        part = ImageSet(self._items, self.image_shape, self.class_names)
        part._cached, part._chosen = (
            self._cached,
            chosen if self._chosen is None else self._chosen[chosen],
        )
        part._whole = self._whole or self
        return part

    @functools.cached_property
    def identity(self) -> str:
        """Equal for the same images in the same order with the same classes, in memory or not, and
        wherever they lie.

        That of a part is the whole set's and a hash of which images it has.
        """
        if self._whole is not None:
            return f"{self._whole.identity} {hashlib.sha256(self._chosen.astype('<i8').tobytes()).hexdigest()[:16]}"
        if self._content or not (self._cached and len(self._names)):
            return self._content or self.fingerprint
        hashes = map(image_hash, self._names, self._cached["label"].tolist(), self._cached["image"])
        return set_hash(total(hashes), self.image_shape, self.class_names)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Tells the set from every other: a hash of its pixels where they are in memory, else of
        what its files say of theirs."""
        digest = hashlib.sha256(repr((len(self), self.image_shape, self.class_names)).encode())
        if self._cached:
            for first in range(0, len(self), 1024):
                for values in self.batch(np.arange(first, min(first + 1024, len(self)))).values():
                    digest.update(np.ascontiguousarray(values))
        else:
            digest.update(
                self._items.identity().encode()
                + (b"" if self._chosen is None else self._chosen.tobytes())
            )
        return digest.hexdigest()

    @property
    def nbytes(self) -> int:
        """Bytes of all pixels."""
        return len(self) * int(np.prod(self.image_shape))

    @property
    def is_cached(self) -> bool:
        """Whether all pixels are in memory."""
        return self._cached is not None

    def cache(self, description: str, skip: Callable[[int, BadImage], None] | None = None) -> None:
        """Decodes the whole set into one array, so that a batch costs a look-up.

        Args:
          description: of the progress bar.
          skip: is told of each image that cannot be used, which is left out then; None to raise for
            it.

        Raises:
          InputError: an image cannot be used.
        """
        count = len(self._items)
        images, labels = np.empty((count, *self.image_shape), np.uint8), np.empty(count, np.int32)
        kept = np.ones(count, bool)

        def decode(index: int) -> None:
            try:
                images[index], labels[index] = self._items[index]
            except BadImage as error:
                if skip is None:
                    raise
                kept[index] = False
                skip(index, error)
            bar.update()

        # Pillow and array_record let go of Python's lock while they decode.
        with (
            progress(count, description) as bar,
            concurrent.futures.ThreadPoolExecutor(cores()) as pool,
        ):
            try:
                for _ in pool.map(decode, range(count)):
                    pass
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        if not kept.all():
            images, labels = images[kept], labels[kept]
            self._names = [name for name, keep in zip(self._names, kept, strict=True) if keep]
        self._cached, self._items = {"image": images, "label": labels}, ()


def open_prepared(directory: str | os.PathLike, *, cache_bytes: int = 0) -> ImageSet:
    """Opens what `prepare` wrote, or any array_record set of tensorflow-datasets with one size of
    image in 'train'.

    Args:
      directory: the one with dataset_info.json in it.
      cache_bytes: the set is decoded into memory, once, when its pixels are not more than this.

    Raises:
      InputError: nothing is there, it is damaged, or its images are not uint8 of one size.
    """
    directory = local_path(directory, "directory").resolve()
    if not (directory / "dataset_info.json").is_file():
        raise InputError(
            f"there is no prepared data in {directory}; the directory that --mode=prepare has made would do."
        )
    import_library("tensorflow_datasets", "data")  # where it is missing, the data is not damaged
    try:
        reader = RecordReader(directory)
        shape, dtype = reader.image_shape, reader.features["image"].np_dtype
    except (
        Exception
    ) as error:  # Whatever is wrong with the files, the libraries report it in their own ways.
        raise InputError(
            f"the prepared data in {directory} is damaged ({error}); preparing it again would do."
        ) from error
    _check_whole(directory, reader)
    if len(shape) != 3 or None in shape or dtype != np.uint8:
        raise InputError(
            f"the images in {directory} have shape {shape}, {dtype}; uint8 of one size would do."
        )
    images = ImageSet(reader, shape, reader.class_names, reader.content())
    if images.nbytes <= cache_bytes:
        images.cache(f"decoding {directory.name}")
    return images


def _check_whole(directory: Path, reader: RecordReader) -> None:
    """Compares what can be seen without reading the records; a record has a checksum of its own."""
    if reader.declared != len(reader):
        raise InputError(
            f"{directory} holds {len(reader)} of {reader.declared} records; preparing it again would do."
        )
    if not (directory / MANIFEST).is_file():
        return  # Another's set.
    manifest = read_manifest(directory)
    if list(manifest["classes"]) != list(reader.class_names):
        raise InputError(
            f"{directory} has other classes than its manifest; deleting it and preparing it again would do."
        )
    for shard in manifest["shards"]:
        path = directory / shard["file"]
        size = path.stat().st_size if path.is_file() else None
        if size != shard["bytes"]:
            named = (
                f"{path} is missing"
                if size is None
                else f"{path} has {size:,} of {shard['bytes']:,} bytes"
            )
            raise InputError(f"{named}; deleting the directory and preparing it again would do.")


def open_direct(
    spec: str,
    form: ImageSpec,
    *,
    cache_bytes: int,
    skin_tones: str = "",
    classes: str = "auto",
    skip_bad: bool = False,
    max_left_out: float = 0.1,
    apart_from: Sequence[Path] = (),
) -> ImageSet:
    """Decodes a small source into memory; nothing is written.

    Args:
      spec, skin_tones, classes: as for `sources.open_source`.
      form: what every image is brought to.
      cache_bytes: how much memory the pixels may take.
      skip_bad: leave out images that cannot be used, with a line in the log, instead of refusing
        the set.
      max_left_out, apart_from: as for `prepare.prepare`.

    Raises:
      InputError: a setting or an image cannot be used, too many cannot, or the set is too large.
    """
    form.check()
    check_apart(spec, apart_from)
    source = open_source(spec, skin_tones=skin_tones, classes=classes, skip_bad=skip_bad)
    check_left_out(source.skipped, len(source), source.lost, max_left_out, spec)
    shape = (form.height, form.width, form.channels)
    images = ImageSet(DecodedSource(source, form), shape, source.class_names, names=source.names)
    if images.nbytes > cache_bytes:
        size = f"{len(source):,} images take {images.nbytes / 2**30:.3g} GiB in memory, more than {cache_bytes / 2**30:.3g}"
        would_do = "a data.directory to prepare them in, or a larger data.cache_gib,"
        raise InputError(
            f"{spec} is too large to be used without preparing ({size}); {would_do} would do."
        )
    skipped = dict(source.skipped)

    def skip(index: int, error: BadImage) -> None:
        name = source.names[index]
        skipped[name] = str(error).removeprefix(f"image {name!r} ")

    images.cache(f"decoding {spec}", skip if skip_bad else None)
    for name, reason in skipped.items():
        log.info("data: left out: %s: %s", name, reason)
    if not len(images):
        raise InputError(f"no image of {spec} can be used; another source would do.")
    if len(skipped) > len(source.skipped):
        left = set(images.batch(np.arange(len(images)))["label"].tolist())
        lost = {source.class_names[label] for label in {*source.labels} - left}
        check_left_out(skipped, len(images), {*lost, *source.lost}, max_left_out, spec)
    return images


class DecodedSource(Sequence):
    """A source's images, each decoded when it is asked for."""

    def __init__(self, source, form: ImageSpec):
        self._source, self._form = source, form

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self._source.read(index, self._form), self._source.label(index)

    def identity(self) -> str:
        """Changes when an image does: the names, sizes and times or checksums of all, and the
        form."""
        return repr(
            [(name, self._source.reader.stamp(name)) for name in self._source.names] + [self._form]
        )
