"""The representation of images in records and in the network: uint8 pixels, and [-1, 1]."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt, UInt8


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

        The means are the same, to the bit, whether the device adds pixels or records hold the sums.
        """
        if pool > 1:
            return Pixels(self.cell * pool).encode(self._sums(images, pool))
        return images.astype(jnp.float32) / (127.5 * self.cell**2) - 1

    def _sums(self, images: UInt[Array, "b h w c"], pool: int) -> UInt[Array, "b h2 w2 c"]:
        """Exact sums of pool x pool values, as records hold them."""
        b, h, w, c = images.shape
        cells = images.reshape(b, h // pool, pool, w // pool, pool, c)
        sums = cells.sum((2, 4), dtype=jnp.uint32).astype(Pixels(self.cell * pool).dtype)
        # What follows is compiled as for sums from records: a compiler that fused it with the
        # addition could round it in another way.
        return jax.lax.optimization_barrier(sums)

    def decode(self, x: Float[Array, "b h w c"]) -> UInt8[Array, "b h w c"]:
        """[-1, 1] to uint8, rounded; values outside are clipped."""
        return jnp.clip(jnp.round((x + 1) * 127.5), 0, 255).astype(jnp.uint8)

    def clip(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Clips values to those that images can have."""
        return jnp.clip(x, -1, 1)
