"""A source: names of images with their classes and captions, each decoded when it is read."""

import contextlib
import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import UInt8

from rdm_jax.data.captions import Captioned, unfit
from rdm_jax.data.images import ImageSpec, fit, to_uint8
from rdm_jax.data.readers import Reader
from rdm_jax.runtime.errors import BadImage, InputError

if TYPE_CHECKING:  # workers that prepare images need no JAX
    from rdm_jax.text.encoders import TextEncoder


@dataclasses.dataclass(frozen=True)
class Source:
    """A set of images that are read one by one; can be pickled.

    Attributes:
      names: one unique name per image (its path below the folder).
      reader: reads an image by its name.
      class_names: the classes; empty without classes.
      labels: one class index per image; empty without classes, or if only the reader knows them.
      skipped: what is left out of the listing, and why.
      captions: one caption per image; empty without captions.
      single_folder: the one that contains all images, if it is not a class; else ''.
      lost: classes without a usable image; they are not in `class_names`.
    """

    names: Sequence[str]
    reader: Reader
    class_names: tuple[str, ...] = ()
    labels: Sequence[int] = ()
    captions: Sequence[str] = ()
    skipped: Mapping[str, BadImage] = dataclasses.field(default_factory=dict)
    single_folder: str = ""
    lost: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    def part(self, indices: Sequence[int]) -> "Source":
        """Only the images with these indices, in this order."""
        names = [self.names[i] for i in indices]
        labels = [self.labels[i] for i in indices] if self.labels else ()
        captions = [self.captions[i] for i in indices] if self.captions else ()
        return dataclasses.replace(self, names=names, labels=labels, captions=captions, skipped={})

    def caption(self, index: int) -> str:
        """An image's caption; '' without captions."""
        return self.captions[index] if self.captions else ""

    def captioned(self, found: Captioned) -> "Source":
        """The images that have a caption, with it."""
        kept = self.part([i for i, name in enumerate(self.names) if name in found.captions])
        return dataclasses.replace(
            kept,
            captions=[found.captions[name] for name in kept.names],
            skipped={**self.skipped, **found.skipped},
        )

    def embeddable(self, encoder: "TextEncoder | None") -> "Source":
        """The images whose captions an encoder takes; all of them without an encoder."""
        bad = unfit(self.captions, encoder) if encoder else {}
        if not bad:
            return self
        named = dict(zip(self.names, self.captions, strict=True))
        skipped = {name: bad[caption] for name, caption in named.items() if caption in bad}
        found = {name: caption for name, caption in named.items() if caption not in bad}
        return self.captioned(Captioned(found, skipped))

    def among(self, class_names: Collection[str]) -> "Source":
        """The source, with its single folder as the class if that is the name of one of these."""
        if self.class_names or self.single_folder not in class_names:
            return self
        return dataclasses.replace(self, class_names=(self.single_folder,), labels=[0] * len(self))

    def label(self, index: int) -> int:
        """An image's class index; -1 without classes. Raises BadImage if there is no such class."""
        if not self.class_names:
            return -1
        label = self.labels[index] if self.labels else self.reader.label(self.names[index])
        if not 0 <= label < len(self.class_names):
            raise BadImage(
                f"has the class index {label}",
                f"Use 0 to {len(self.class_names) - 1}.",
                image=self.names[index],
            )
        return label

    def read(
        self, index: int, form: ImageSpec
    ) -> UInt8[np.ndarray, "{form.height} {form.width} {form.channels}"]:
        """Reads one image with the size and channels of `form`. Raises as `decode` and `fit`."""
        return self.fit(index, self.decode(index, form.channels, form.background), form)

    def decode(
        self, index: int, channels: int, background: tuple[int, ...]
    ) -> UInt8[np.ndarray, "h w {channels}"]:
        """Reads one image at its own size.

        Raises:
          BadImage: it is damaged, too large, or has no 8-bit conversion; names the image.
          InputError: it cannot be read, which says nothing about the image.
        """
        with self._named(index):
            try:
                return to_uint8(self.reader.load(self.names[index]), channels, background)
            except OSError as error:
                raise InputError(
                    f"image {self.names[index]!r} cannot be read ({error})",
                    "Run the same command again once it can be read.",
                ) from error

    def fit(
        self, index: int, pixels: UInt8[np.ndarray, "h w c"], form: ImageSpec
    ) -> UInt8[np.ndarray, "h2 w2 c"]:
        """Crops and resizes a decoded image. Raises BadImage if `form.crop` refuses its size."""
        with self._named(index):
            return fit(pixels, form)

    @contextlib.contextmanager
    def _named(self, index: int):
        try:
            yield
        except BadImage as error:
            raise BadImage(error.reason, error.fix, image=self.names[index]) from error


class DecodedSource(Sequence):
    """The images of a source, each decoded when it is read."""

    def __init__(self, source: Source, form: ImageSpec):
        self._source, self._form = source, form

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self._source.read(index, self._form), self._source.label(index)

    def identity(self) -> str:
        """Changes when an image does: the names and stamps of all images, and the form."""
        stamps = [(name, self._source.reader.stamp(name)) for name in self._source.names]
        return repr([*stamps, self._form])
