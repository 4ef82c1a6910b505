"""Small images from a folder or the caller, in place of those of the first stages."""

import hashlib
from collections.abc import Mapping

import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from rdm_jax.config import Config
from rdm_jax.data.classes import Classes, matched
from rdm_jax.data.sources import open_source
from rdm_jax.runtime.errors import InputError


class LowImages:
    """The images of `sampling.low`, all with the resolution of one stage.

    Args:
      config: of the run.

    Attributes:
      stage: number of the stage whose images they replace.

    Raises:
      InputError: there are no images, or their size is not that of a stage before the last.
    """

    def __init__(self, config: Config):
        self._source = open_source(config.sampling.low)
        self._spec, self._data = config.sampling.low, config.data
        self._digests: dict[bytes, str] = {}
        size = self._decoded(0).shape[:2]
        sizes = [stage.resolution for stage in config.stages[:-1]]
        if size not in sizes:
            known = " or ".join(f"{h} x {w}" for h, w in sizes)
            raise InputError(
                f"config.sampling.low={self._spec!r} has images of {size[0]} x {size[1]} "
                "(height x width), which is not the size of an earlier stage",
                f"Use images of {known}." if known else "Use a config of more than one stage.",
            )
        self.stage, self._size = sizes.index(size) + 1, size

    def images(self, seeds: Int[np.ndarray, " b"]) -> UInt8[np.ndarray, "b h w c"]:
        """The image of each seed: image s mod n for seed s.

        Raises:
          InputError: an image is damaged or of another size.
        """
        return np.stack([self._image(int(seed) % len(self._source)) for seed in seeds])

    def labels(
        self, seeds: Int[np.ndarray, " b"], classes: Classes
    ) -> Int[np.ndarray, " b"] | None:
        """The classes of the images of seeds, int32 (b,); None if the images have no classes.

        Args:
          seeds: (b,).
          classes: of the network; the images' classes are matched to them by name.

        Raises:
          InputError: a class of the images is unknown to the network.
        """
        source = self._source.among(classes.names)
        theirs = Classes(source.class_names)
        if not len(theirs):
            return None
        numbers = matched(theirs, classes)
        if numbers is None:
            raise InputError(
                f"config.sampling.low={self._spec!r} has images of the classes {theirs}, and the "
                f"network knows {classes}",
                "Use images whose classes have the same names, or set --config.sampling.labels.",
            )
        return np.asarray(
            [numbers[source.label(int(seed) % len(self._source))] for seed in seeds], np.int32
        )

    def digest(self, seeds: Int[np.ndarray, " b"]) -> str:
        """A hash of the images of seeds: samples of other images have another one."""
        indices = np.unique(seeds % len(self._source))
        key = indices.tobytes()
        if key not in self._digests:  # cached, because every image is decoded
            digest = hashlib.sha256()
            for index in indices:
                digest.update(self._image(int(index)).tobytes())
            self._digests[key] = digest.hexdigest()
        return self._digests[key]

    def _decoded(self, index: int) -> UInt8[np.ndarray, "h w c"]:
        return self._source.decode(
            index, channels=self._data.channels, background=self._data.background
        )

    def _image(self, index: int) -> UInt8[np.ndarray, "h w c"]:
        pixels = self._decoded(index)
        if pixels.shape[:2] != self._size:
            height, width = self._size
            name = self._source.names[index]
            raise InputError(
                f"image {name!r} of config.sampling.low={self._spec!r} has another size than the "
                "first image",
                f"Use images of {height} x {width} (height x width).",
            )
        return pixels


def small_asked(
    small: np.ndarray | Array,
    stages: Mapping[int, tuple[int, ...]],
    channels: int,
) -> tuple[int, UInt8[np.ndarray, "m h w c"] | Float[np.ndarray, "m h w c"]]:
    """The stage whose images are given, and the images.

    Args:
      small: one image or several, uint8, or float in [-1, 1].
      stages: the resolutions of the stages whose images may be given, by their numbers.
      channels: of the images.

    Raises:
      InputError: they have another dtype, shape or range.
    """
    small = np.asarray(small)
    images = small[None] if small.ndim == 3 else small
    of_size = {size: number for number, size in stages.items()}
    known = " or ".join(f"({h}, {w}, {channels})" for h, w in of_size)
    if images.ndim != 4 or not len(images) or images.shape[-1] != channels:
        number = None
    else:
        number = of_size.get(images.shape[1:3])
    if number is None:
        raise InputError(
            f"small has the shape {small.shape}, which is not that of images of an earlier stage",
            f"Give an array of the shape (n, h, w, c) with (h, w, c) = {known}."
            if known
            else "Leave it out: no loaded stage continues from small images.",
        )
    if images.dtype == np.uint8:
        return number, images
    if not np.issubdtype(images.dtype, np.floating):
        raise InputError(f"small has the dtype {images.dtype}", "Give uint8, or float in [-1, 1].")
    if not np.all(np.abs(images) <= 1):  # NaN, too
        raise InputError(
            "small has values that are outside of [-1, 1] or not finite",
            "Scale and clip it, or give uint8.",
        )
    return number, images.astype(np.float32)
