"""Small images from a folder, in place of the first stages' own."""

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
        size = self._source.load(0).size[::-1]
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
        """The classes of the images of seeds, by the names of their folders; None where these are no classes of the network."""
        if not self._source.class_names or not set(self._source.class_names) <= set(class_names):
            return None
        names = [self._source.class_names[self._source.labels[seed % len(self._source)]] for seed in seeds]
        return np.asarray([class_names.index(name) for name in names], np.int32)

    def _image(self, index: int) -> np.ndarray:
        height, width = self._size
        if self._source.load(index).size != (width, height):
            where = f"image {self._source.names[index]!r} of config.sampling.low={self._spec!r}"
            raise InputError(f"{where} is of another size than the first; {height} x {width} would do.")
        channels, background = self._data.channels, self._data.background
        return self._source.read(index, height=height, width=width, channels=channels, background=background)
