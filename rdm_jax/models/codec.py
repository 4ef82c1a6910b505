"""An autoencoder at work: batches sharded over devices, and large images in tiles.

Tiles overlap, and are blended with weights that fall linearly towards a tile's edges. A tile sees
neither what lies outside of it nor the statistics of the whole image, so the result is not that of
the whole image.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Num

from rdm_jax.models.autoencoder import Autoencoder, Moments
from rdm_jax.models.target import compiling_for
from rdm_jax.runtime import sharding
from rdm_jax.runtime.errors import InputError

OVERLAP = 4  # neighbouring tiles share a quarter of their side, or more


class Codec:
    """Encodes and decodes batches of any size.

    They are padded to a power of two for each device, so that few sizes are compiled.

    Args:
      model: the autoencoder.
      params: its parameters.
      mesh: of this process's devices (`sharding.local_mesh`).
      tile: side of tiles, in pixels of latents, at least 4; 0 for whole images. What is no larger
        than a tile is done at once.

    Raises:
      InputError: the tile is smaller.
    """

    def __init__(self, model: Autoencoder, params: Any, mesh: Mesh, tile: int = 0):
        if tile and tile < OVERLAP:
            raise InputError(f"tile={tile} cannot be used", f"Use {OVERLAP} or more, or 0.")
        self.config, self._mesh, self._tile = model.config, mesh, tile
        self._params = jax.device_put(params, sharding.replicated(mesh))
        shardings = (sharding.replicated(mesh), sharding.batched(mesh))

        def compiled(function: Callable[..., Any]) -> Any:
            return jax.jit(function, in_shardings=shardings, out_shardings=shardings[1])

        self._encode, self._decode = compiled(model.encode), compiled(model.decode)

    def encode(self, images: Num[np.ndarray, "b h w c"]) -> Moments:
        """The latents of images in [-1, 1], as NumPy arrays of float32.

        Raises:
          InputError: the images are integers, have other channels, or do not divide.
        """
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise InputError(
                f"images.dtype={images.dtype} cannot be used",
                "Scale the images to [-1, 1], as float32.",
            )
        _, height, width, channels = images.shape
        self.config.check_images(height, width, channels, "image.shape")

        def stacked(x: np.ndarray) -> np.ndarray:
            return np.concatenate(self._over_devices(self._encode, x), -1)

        both = in_tiles(stacked, images, self._tile, self.config.factor, 1)
        moments: Any = np.split(both, 2, axis=-1)
        return Moments(*moments)

    def decode(self, latents: Float[np.ndarray, "b h w c"]) -> Float[np.ndarray, "b h2 w2 c2"]:
        """The images of latents, in about [-1, 1]; float32.

        Raises:
          InputError: the latents have other channels.
        """
        if latents.shape[-1] != self.config.latent_channels:
            raise InputError(
                f"latents.shape={latents.shape} does not fit the autoencoder",
                f"Use latents of {self.config.latent_channels} channels.",
            )

        def decoded(z: np.ndarray) -> np.ndarray:
            return self._over_devices(self._decode, z)

        return in_tiles(decoded, latents, self._tile, 1, self.config.factor)

    def decoded(self, latents: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        """As `decode`, of arrays on the devices, whole; the result may still be computed."""
        with compiling_for(self._mesh):
            return self._decode(self._params, latents)

    def _over_devices(self, function: Any, x: np.ndarray) -> Any:
        """Applies a function of (params, batch) to the padded batch."""
        share = max(1, -(-len(x) // self._mesh.size))
        size = self._mesh.size * 2 ** (share - 1).bit_length()
        padded = np.pad(x, [(0, size - len(x)), (0, 0), (0, 0), (0, 0)])
        with compiling_for(self._mesh):
            result = function(self._params, sharding.put_batch(padded, self._mesh))
        return jax.tree.map(lambda each: np.asarray(each)[: len(x)], result)


def in_tiles(
    function: Callable[[np.ndarray], np.ndarray],
    x: Float[np.ndarray, "b h w c"],
    tile: int,
    before: int,
    after: int,
) -> Float[np.ndarray, "b h2 w2 c2"]:
    """A function of images, applied to overlapping tiles, which are then blended.

    Args:
      function: of images; all tiles have the same size.
      x: the images.
      tile: side of a tile, in the unit of which `before` pixels are one before the function and
        `after` after it; 0 for one tile.
    """
    sides = [side // before for side in x.shape[1:3]]
    sizes = [min(side, tile or side) for side in sides]
    if sizes == sides:
        return function(x)
    windows = [_ramp(size * after, max(1, size // OVERLAP) * after) for size in sizes]
    window = np.multiply.outer(*windows)[..., None]
    total: Any = 0.0
    weight = np.zeros((sides[0] * after, sides[1] * after, 1), np.float32)
    for top in _starts(sides[0], sizes[0]):
        for left in _starts(sides[1], sizes[1]):
            corners = list(zip((top, left), sizes, strict=True))
            rows, columns = (slice(at * before, (at + n) * before) for at, n in corners)
            part = function(x[:, rows, columns])
            if weight.max() == 0:
                total = np.zeros((len(x), *weight.shape[:2], part.shape[-1]), np.float32)
            rows, columns = (slice(at * after, (at + n) * after) for at, n in corners)
            total[:, rows, columns] += window * part
            weight[rows, columns] += window
    return total / weight


def _starts(side: int, size: int) -> list[int]:
    """Where tiles begin, evenly over the side, so that neighbours overlap enough."""
    step = size - max(1, size // OVERLAP)
    count = 1 + max(0, -(-(side - size) // step))
    return [round(start) for start in np.linspace(0, side - size, count)]


def _ramp(size: int, overlap: int) -> Float[np.ndarray, " n"]:
    """Weights along a tile's side, falling to almost 0 over `overlap` at both ends."""
    distance = np.minimum(np.arange(size), np.arange(size)[::-1]) + 0.5
    return np.minimum(1, distance / overlap).astype(np.float32)
