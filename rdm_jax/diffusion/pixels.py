"""The representation of images in records and in the network: uint8 pixels, and [-1, 1]."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, UInt, UInt8


@dataclasses.dataclass(frozen=True)
class Pixels:
    """Records hold uint8 pixels, or sums of them; networks see values in [-1, 1].

    Attributes:
      cell: records hold the sums of cell x cell pixels; 1 for pixels.
    """

    cell: int = 1

    @property
    def dtype(self) -> np.dtype:
        """Of records: the smallest unsigned one that holds such a sum."""
        return np.min_scalar_type(255 * self.cell**2)

    def encode(self, images: UInt[Array, "b h w c"], pool: int = 1) -> Float[Array, "b h2 w2 c"]:
        """From records to [-1, 1]: the means of pool x pool of their values.

        The means are the same, to the bit, whether the device adds pixels or records hold the sums,
        and whatever the compiler makes of it: sums are exact integers, and one product is rounded.
        """
        pixels = (pool * self.cell) ** 2  # per mean
        if pixels == 1:
            return images.astype(jnp.float32) / 127.5 - 1
        b, h, w, c = images.shape
        cells = images.astype(jnp.int32).reshape(b, h // pool, pool, w // pool, pool, c)
        doubled = 2 * cells.sum((2, 4)) - 255 * pixels
        # Clipped, as the reciprocal is rounded as well; nor can the product then become part of a
        # fused multiply-add, which some compilers make, and which rounds in another way.
        return jnp.clip(doubled.astype(jnp.float32) * np.float32(1 / (255 * pixels)), -1, 1)

    def draw(
        self, images: UInt[Array, "b h w c"], pool: int, keys: Key[Array, " b"]
    ) -> Float[Array, "b h2 w2 c"]:
        """What training sees: as `encode`, as nothing is random."""
        return self.encode(images, pool)

    def decode(self, x: Float[Array, "b h w c"]) -> UInt8[Array, "b h w c"]:
        """[-1, 1] to uint8, rounded; values outside are clipped."""
        return jnp.clip(jnp.round((x + 1) * 127.5), 0, 255).astype(jnp.uint8)

    def clip(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Clips values to those that images can have."""
        return jnp.clip(x, -1, 1)
