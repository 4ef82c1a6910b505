"""Sets of images of one size with random access: prepared records, or a source in memory."""

import functools
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rdm_jax.data.cell_sums import SumReader, cells_in, dtype_of, fix_of, folder_of, sums_of
from rdm_jax.data.content import image_hash, set_hash, total
from rdm_jax.data.images import ImageSpec
from rdm_jax.data.in_memory import decoded
from rdm_jax.data.latent_spec import LatentSpec
from rdm_jax.data.left_out import check_left_out, reasons
from rdm_jax.data.records import RecordReader, check_complete
from rdm_jax.data.source import DecodedSource
from rdm_jax.data.sources import check_apart, open_source
from rdm_jax.data.text_table import Embedding, TextSpec, TextTable, embedded, open_table
from rdm_jax.runtime.console import log
from rdm_jax.runtime.errors import BadImage, InputError
from rdm_jax.runtime.files import local_path
from rdm_jax.runtime.lazy import import_library
from rdm_jax.text.encoders import TextEncoder

Batch = dict[str, np.ndarray]


class ImageSet(Sequence):
    """Images of one size, made by `open_prepared` or `open_direct`; can be pickled.

    Args:
      items: pixels, uint8 (h, w, c), or sums of cells of them, and class index, by index.
      image_shape: (h, w, c) of every image.
      class_names: the classes; empty without classes (every label is then -1).
      content: the hash of the set by `content.set_hash`; '' if unknown.
      names: of the images, from which that hash is found once they are in memory; () if unknown.
      cell: items hold the sums of cell x cell pixels, as `cell_sums.dtype_of`; 1 for pixels.
      dtype: of the items, if they are neither pixels nor sums.

    Attributes:
      image_shape, class_names, cell, dtype: as given.
      latent_spec: of a set of latents, the autoencoder and the statistics; else None.
      latents: the same images as moments of latents (`add_latents`); None without.
      text: how its captions are embedded, which `add_text` adds; None without captions.

    A pickled set, for processes that read batches, has no captions.
    """

    def __init__(
        self,
        items: Sequence,
        image_shape: tuple[int, ...],
        class_names: tuple[str, ...],
        content: str = "",
        names: Sequence[str] = (),
        cell: int = 1,
        dtype: np.dtype | None = None,
    ):
        self.dtype = dtype or dtype_of(cell)
        self.image_shape = image_shape
        self.class_names = class_names
        self.cell = cell
        self.latent_spec: LatentSpec | None = None
        self.latents: ImageSet | None = None
        self.text: TextSpec | None = None
        self._texts: TextTable | None = None
        self._items = items
        self._content = content
        self._names = names
        self._cached: Batch | None = None
        self._whole: ImageSet | None = None  # the set that this one is a part of
        self._chosen: np.ndarray | None = None  # indices of a part in the whole set
        self._sums: dict[int, ImageSet] = {}  # the same images as sums, by the size of cells

    def __getstate__(self) -> dict[str, Any]:
        # Worker processes read this set; its sums may be gigabytes in memory.
        return self.__dict__ | {"_sums": {}, "latents": None}

    def __len__(self) -> int:
        if self._chosen is not None:
            return len(self._chosen)
        return len(self._cached["label"] if self._cached else self._items)

    def __getitem__(self, index: int) -> Batch:
        """One image: {'image': uint8 (h, w, c), 'label': int32 ()}.

        Raises:
          IndexError: there is no such image.
          InputError: the record is damaged.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        return {key: values[0] for key, values in self.batch([index]).items()}

    def batch(self, indices: Sequence[int] | np.ndarray, *, text: bool = False) -> Batch:
        """Several images in this order: {'image': uint8 (b, h, w, c), 'label': int32 (b,)}.

        Sums of cells are of their own dtype. With `text` also 'text' and 'text_length' of the
        captions, if there are any (`TextTable.batch`).
        """
        if self._chosen is not None:
            indices = self._chosen[np.asarray(indices)]
        texts = self._texts.batch(np.asarray(indices)) if text and self._texts else {}
        if self._cached:
            return {key: values[indices] for key, values in self._cached.items()} | texts
        batch = {
            "image": np.empty((len(indices), *self.image_shape), self.dtype),
            "label": np.empty(len(indices), np.int32),
        }
        for place, index in enumerate(indices):
            batch["image"][place], batch["label"][place] = self._items[int(index)]
        return batch | texts

    def caption(self, indices: Sequence[int] | np.ndarray | None = None) -> list[str] | None:
        """The captions of images, or of all; '' for none. None for a set without captions."""
        if self._texts is None:
            return None
        chosen = np.arange(len(self)) if indices is None else np.asarray(indices)
        return self._texts.captions_of(chosen if self._chosen is None else self._chosen[chosen])

    def labels(self) -> np.ndarray:
        """The class of every image, int32 (n,), -1 for none; no image is decoded."""
        chosen = np.arange(len(self)) if self._chosen is None else self._chosen
        if self._cached:
            return self._cached["label"][chosen]
        return np.asarray([self._items.label(int(index)) for index in chosen], np.int32)

    def add_text(self, texts: TextTable | None) -> None:
        """Adds captions, one per image; batches then can have them, those of sums too."""
        self.text, self._texts = (texts.spec if texts else None), texts
        for sums in self._sums.values():
            sums.add_text(texts)

    def split(self, held_out: int) -> tuple["ImageSet", "ImageSet | None"]:
        """The set without `held_out` of its images, and these (None for 0); nothing is copied.

        One image is drawn from each of `held_out` equal parts, with a fixed seed; so that of a
        sorted set every class is represented.

        Raises:
          InputError: no image is left for training.
        """
        if not held_out:
            return self, None
        if not held_out < len(self):
            raise InputError(
                f"config.data.held_out={held_out} leaves none of {len(self)} images",
                f"Use at most {len(self) - 1}.",
            )
        offsets = np.random.default_rng(0).random(held_out)
        held = np.floor((np.arange(held_out) + offsets) * len(self) / held_out).astype(int)
        return self._part(np.setdiff1d(np.arange(len(self)), held)), self._part(held)

    def _part(self, chosen: np.ndarray) -> "ImageSet":
        form = {"cell": self.cell, "dtype": self.dtype}
        part = ImageSet(self._items, self.image_shape, self.class_names, **form)
        part._cached = self._cached
        part.text, part._texts = self.text, self._texts
        part._sums = {cell: sums._part(chosen) for cell, sums in self._sums.items()}
        part.latent_spec = self.latent_spec
        part.latents = self.latents._part(chosen) if self.latents is not None else None
        part._chosen = chosen if self._chosen is None else self._chosen[chosen]
        part._whole = self._whole or self
        return part

    def of_cells(self, cell: int) -> "ImageSet":
        """The same images as the sums of cell x cell pixels if it has them; else the set itself."""
        return self._sums.get(cell, self)

    def add_latents(self, latents: "ImageSet", spec: LatentSpec) -> None:
        """Adds the same images as moments of latents, with the captions that there are."""
        latents.latent_spec, self.latents = spec, latents
        latents.add_text(self._texts)

    def add_sums(self, sums: "ImageSet") -> None:
        """Adds the same images as sums of cells, for `of_cells`."""
        self._sums[sums.cell] = sums

    def sums(self, cell: int) -> "ImageSet":
        """The sums of cell x cell pixels of a set in memory, in memory."""
        h, w, c = self.image_shape
        shape = (h // cell, w // cell, c)
        sums = ImageSet((), shape, self.class_names, self.identity, cell=cell)
        sums.add_text(self._texts)
        sums._cached = self._cached | {"image": sums_of(self._cached["image"], cell)}
        return sums

    @functools.cached_property
    def identity(self) -> str:
        """Equal for the same images in the same order with the same classes, however stored.

        That of a part is the identity of the whole set and a hash of the part's indices.
        """
        if self._whole is not None:
            chosen = hashlib.sha256(self._chosen.astype("<i8").tobytes()).hexdigest()
            return f"{self._whole.identity} {chosen[:16]}"
        if self._content or not (self._cached and len(self._names)):
            return self._content or self.fingerprint
        captions = self.caption() or [""] * len(self)
        labels, images = self._cached["label"].tolist(), self._cached["image"]
        hashes = map(image_hash, self._names, labels, images, captions)
        return set_hash(total(hashes), self.image_shape, self.class_names)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash that identifies the set: of what is in memory, else of its files' metadata."""
        digest = hashlib.sha256(repr((len(self), self.image_shape, self.class_names)).encode())
        if self._cached:
            for first in range(0, len(self), 1024):
                for values in self.batch(np.arange(first, min(first + 1024, len(self)))).values():
                    digest.update(np.ascontiguousarray(values))
            if self._texts:
                digest.update(json.dumps(self.caption(np.arange(len(self)))).encode())
        else:
            digest.update(self._items.identity().encode())
            digest.update(b"" if self._chosen is None else self._chosen.tobytes())
        return digest.hexdigest()

    def image_bytes(self, *, text: bool) -> int:
        """Bytes per image of a batch, without its label."""
        pixels = int(np.prod(self.image_shape)) * self.dtype.itemsize
        spec = self.text if text else None
        return pixels + (np.float16().itemsize * spec.tokens * spec.width if spec else 0)

    @property
    def nbytes(self) -> int:
        """Bytes of all pixels, or of their sums."""
        return len(self) * self.image_bytes(text=False)

    @property
    def is_cached(self) -> bool:
        """Whether all pixels are in memory."""
        return self._cached is not None

    def cache(self, description: str, skip: Callable[[int, BadImage], None] | None = None) -> None:
        """Decodes the whole set into one array, so that a batch is a lookup.

        Args:
          description: of the progress bar.
          skip: called for each image that cannot be used, which is then left out; None to raise.

        Raises:
          InputError: an image cannot be used.
        """
        images, labels, kept = decoded(self._items, self.image_shape, self.dtype, description, skip)
        if not kept.all():
            self._names = [name for name, keep in zip(self._names, kept, strict=True) if keep]
        self._cached = {"image": images, "label": labels}
        self._items = ()


def open_prepared(
    directory: str | os.PathLike,
    *,
    cache_bytes: int = 0,
    cells: Sequence[int] = (),
    embedding: Embedding | None = None,
) -> ImageSet:
    """Opens a prepared data set, made by `prepare` or by tensorflow-datasets as array_record.

    Args:
      directory: the one that contains dataset_info.json. The split is 'train'; its images must have
        one size.
      cache_bytes: the set is decoded into memory, once, if its pixels take at most this.
      cells: sides of the cells whose sums `ImageSet.of_cells` is to give: made of images in memory,
        or read from records if these exist.
      embedding: of the captions that batches can then have; None for none.

    Raises:
      InputError: there is no data set or no such captions, it is damaged, or its images are
        not uint8 of one size.
    """
    directory = local_path(directory, "directory").resolve()
    if not (directory / "dataset_info.json").is_file():
        raise InputError(
            f"there is no prepared data in {directory}",
            "Give the directory that --mode=prepare has made.",
        )
    import_library("tensorflow_datasets", "data")  # where it is missing, the data is not damaged
    try:
        reader = RecordReader(directory)
        shape, dtype = reader.image_shape, reader.features["image"].np_dtype
    except Exception as error:  # the libraries raise their own errors for damaged files
        raise InputError(
            f"the prepared data in {directory} is damaged ({error})", "Prepare it again."
        ) from error
    check_complete(directory, reader)
    if len(shape) != 3 or None in shape or dtype != np.uint8:
        raise InputError(
            f"the images in {directory} have shape {shape}, {dtype}",
            "Use a data set of uint8 images of one size.",
        )
    images = ImageSet(reader, shape, reader.class_names, reader.content())
    if images.nbytes <= cache_bytes:
        images.cache(f"decoding {directory.name}")
    for cell in cells:
        sums = images.sums(cell) if images.is_cached else _open_sums(directory, images, cell)
        if sums is None:
            continue
        if not sums.is_cached and sums.nbytes <= cache_bytes:
            sums.cache(f"reading the sums of {directory.name}")
        images.add_sums(sums)
    if embedding:
        images.add_text(open_table(directory, embedding, reader.content(), len(reader)))
    return images


def _open_sums(directory: Path, images: ImageSet, cell: int) -> ImageSet | None:
    """The sums beside prepared images; None if there are none of these images."""
    if cell not in cells_in(directory):
        return None
    folder = folder_of(directory, cell)
    reader = SumReader(folder)
    if reader.of != images.identity:
        log.warning("data: %s is ignored: it has the sums of other images", folder)
        return None
    h, w, c = images.image_shape
    wanted = (cell, (h // cell, w // cell, c), len(images))
    if (reader.cell, reader.image_shape, len(reader)) != wanted:
        raise InputError(f"{folder} does not have the sums of these images", fix_of(folder))
    return ImageSet(reader, reader.image_shape, images.class_names, reader.of, cell=cell)


def open_direct(
    spec: str,
    form: ImageSpec,
    *,
    cache_bytes: int,
    skin_tones: str = "",
    classes: str = "auto",
    captions: str = "none",
    skip_bad: bool = False,
    max_left_out: float = 0.1,
    apart_from: Sequence[Path] = (),
    cells: Sequence[int] = (),
    encoder: TextEncoder | None = None,
) -> ImageSet:
    """Decodes a small source into memory; nothing is written.

    Args:
      spec, skin_tones, classes, captions: as for `sources.open_source`.
      form: size and channels of every image.
      cache_bytes: the most memory that the pixels may take.
      skip_bad: leave out images that cannot be used, with a line in the log, instead of raising.
      max_left_out, apart_from: as for `prepare.prepare`.
      cells: as for `open_prepared`.
      encoder: of the captions, which batches then can have; None for none.

    Raises:
      InputError: a setting or an image cannot be used, too many cannot, or the set is too large.
    """
    form.check()
    check_apart(spec, apart_from)
    source = open_source(
        spec,
        skin_tones=skin_tones,
        classes=classes,
        captions=captions,
        skip_bad=skip_bad,
        encoder=encoder,
    )
    skipped = reasons(source.skipped)
    check_left_out(skipped, len(source), source.lost, max_left_out, spec)
    shape = (form.height, form.width, form.channels)
    images = ImageSet(DecodedSource(source, form), shape, source.class_names, names=source.names)
    if images.nbytes > cache_bytes:
        raise InputError(
            f"{spec} is too large to be used without preparing ({len(source):,} images take "
            f"{images.nbytes / 2**30:.3g} GiB in memory, more than {cache_bytes / 2**30:.3g})",
            "Set a data.directory to prepare them in, or a larger data.cache_gib.",
        )

    def skip(index: int, error: BadImage) -> None:
        skipped[source.names[index]] = error.reason

    images.cache(f"decoding {spec}", skip if skip_bad else None)
    for name, reason in skipped.items():
        log.info("data: left out: %s: %s", name, reason)
    if not len(images):
        raise InputError(f"no image of {spec} can be used", "Use another source.")
    if len(skipped) > len(source.skipped):
        left = set(images.batch(np.arange(len(images)))["label"].tolist())
        lost = {source.class_names[label] for label in {*source.labels} - left}
        check_left_out(skipped, len(images), {*lost, *source.lost}, max_left_out, spec)
    if source.captions and encoder:
        known = dict(zip(source.names, source.captions, strict=True))
        images.add_text(embedded([known[name] for name in images._names], encoder))
    for cell in cells:
        images.add_sums(images.sums(cell))
    return images
