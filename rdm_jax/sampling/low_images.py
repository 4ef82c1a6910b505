"""Small images from a folder, in place of the first stages' own."""

import hashlib

import numpy as np
from jaxtyping import Int, UInt8

from rdm_jax.config import Config
from rdm_jax.data.sources import open_source
from rdm_jax.errors import InputError


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
        self._source, self._spec, self._data = open_source(config.sampling.low), config.sampling.low, config.data
        size = self._decoded(0).shape[:2]
        sizes = [stage.resolution for stage in config.stages[:-1]]
        if size not in sizes:
            known = " or ".join(f"{h} x {w}" for h, w in sizes) or "a config of more than one stage"
            found = f"{size[0]} x {size[1]} (height x width)"
            raise InputError(f"config.sampling.low={self._spec!r} has images of {found}; {known} would do.")
        self.stage, self._size = sizes.index(size) + 1, size

    def images(self, seeds: Int[np.ndarray, " b"]) -> UInt8[np.ndarray, "b h w c"]:
        """The image of each seed: number s mod n for seed s. Raises InputError for one that is damaged or of another size."""
        return np.stack([self._image(int(seed) % len(self._source)) for seed in seeds])

    def labels(self, seeds: Int[np.ndarray, " b"], class_names: tuple[str, ...]) -> Int[np.ndarray, " b"] | None:
        """The classes of the images of seeds, by the names of their folders, or by the folders' order if there is one a class.

        None where the images are in no class folders. Raises InputError where the folders are no classes of the network.
        """
        source = self._source.among(class_names)
        folders = source.class_names
        if not folders:
            return None
        if set(folders) <= set(class_names):
            numbers = [class_names.index(name) for name in folders]
        elif len(folders) == len(class_names):
            numbers = list(range(len(folders)))
        else:
            known = f"{len(folders)} class folders ({', '.join(folders[:3])}, ...), the network {len(class_names)} other classes"
            would_do = "folders named like its classes, or another --config.sampling.labels,"
            raise InputError(f"config.sampling.low={self._spec!r} has {known}; {would_do} would do.")
        return np.asarray([numbers[source.label(int(seed) % len(self._source))] for seed in seeds], np.int32)

    def digest(self, seeds: Int[np.ndarray, " b"]) -> str:
        """A hash of the images of seeds, so that samples of other images are not taken for theirs."""
        digest = hashlib.sha256()
        for index in np.unique(seeds % len(self._source)):
            digest.update(self._image(int(index)).tobytes())
        return digest.hexdigest()

    def _decoded(self, index: int) -> UInt8[np.ndarray, "h w c"]:
        return self._source.decode(index, channels=self._data.channels, background=self._data.background)

    def _image(self, index: int) -> UInt8[np.ndarray, "h w c"]:
        pixels = self._decoded(index)
        if pixels.shape[:2] != self._size:
            height, width = self._size
            where = f"image {self._source.names[index]!r} of config.sampling.low={self._spec!r}"
            raise InputError(f"{where} is of another size than the first; {height} x {width} would do.")
        return pixels
