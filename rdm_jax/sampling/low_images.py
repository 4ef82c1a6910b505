"""Small images from a folder, in place of the first stages' own."""

import hashlib

import numpy as np
from jaxtyping import Int, UInt8

from rdm_jax.config import Config
from rdm_jax.data.classes import Classes, matched
from rdm_jax.data.sources import open_source
from rdm_jax.runtime.errors import InputError


class LowImages:
    """The images of `sampling.low`, all of the size of one stage.

    Args:
      config: of the run.

    Attributes:
      stage: number of the stage whose images they stand for.

    Raises:
      InputError: there are none, or their size is no stage's (of those before the last).
    """

    def __init__(self, config: Config):
        self._source, self._spec, self._data = (
            open_source(config.sampling.low),
            config.sampling.low,
            config.data,
        )
        self._digests: dict[bytes, str] = {}
        size = self._decoded(0).shape[:2]
        sizes = [stage.resolution for stage in config.stages[:-1]]
        if size not in sizes:
            known = " or ".join(f"{h} x {w}" for h, w in sizes) or "a config of more than one stage"
            found = f"{size[0]} x {size[1]} (height x width)"
            raise InputError(
                f"config.sampling.low={self._spec!r} has images of {found}; {known} would do."
            )
        self.stage, self._size = sizes.index(size) + 1, size

    def images(self, seeds: Int[np.ndarray, " b"]) -> UInt8[np.ndarray, "b h w c"]:
        """The image of each seed: number s mod n for seed s. Raises InputError for one that is
        damaged or of another size."""
        return np.stack([self._image(int(seed) % len(self._source)) for seed in seeds])

    def labels(
        self, seeds: Int[np.ndarray, " b"], classes: Classes
    ) -> Int[np.ndarray, " b"] | None:
        """The classes of the images of seeds, by their names; None where the images have no
        classes.

        Args:
          classes: of the network.

        Raises:
          InputError: their classes are none of the network's.
        """
        source = self._source.among(classes.names)
        theirs = Classes(source.class_names)
        if not len(theirs):
            return None
        numbers = matched(theirs, classes)
        if numbers is None:
            would_do = "classes of the same names, or another --config.sampling.labels, would do."
            field = f"config.sampling.low={self._spec!r}"
            raise InputError(
                f"{field} has images of the classes {theirs}, and the network knows {classes}; {would_do}"
            )
        return np.asarray(
            [numbers[source.label(int(seed) % len(self._source))] for seed in seeds], np.int32
        )

    def digest(self, seeds: Int[np.ndarray, " b"]) -> str:
        """A hash of the images of seeds, so that samples of other images are not taken for
        theirs."""
        indices = np.unique(seeds % len(self._source))
        if (
            indices.tobytes() not in self._digests
        ):  # it is asked for several times, and every image is decoded
            digest = hashlib.sha256()
            for index in indices:
                digest.update(self._image(int(index)).tobytes())
            self._digests[indices.tobytes()] = digest.hexdigest()
        return self._digests[indices.tobytes()]

    def _decoded(self, index: int) -> UInt8[np.ndarray, "h w c"]:
        return self._source.decode(
            index, channels=self._data.channels, background=self._data.background
        )

    def _image(self, index: int) -> UInt8[np.ndarray, "h w c"]:
        pixels = self._decoded(index)
        if pixels.shape[:2] != self._size:
            height, width = self._size
            where = f"image {self._source.names[index]!r} of config.sampling.low={self._spec!r}"
            raise InputError(
                f"{where} is of another size than the first; {height} x {width} would do."
            )
        return pixels
