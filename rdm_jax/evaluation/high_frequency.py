"""The energy of images at high spatial frequencies, in which grain shows."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8


def high_frequency_energy(images: UInt8[Array, "b h w c"]) -> Float[Array, " b"]:
    """The mean square of what an image has at or above half the Nyquist frequency.

    An image in [-1, 1] is taken as a sum of cosines (the orthonormal DCT-II, which unlike a Fourier
    transform sees no jump where opposite edges would meet). Those of at least 1/4 cycle per pixel
    along one axis or both count. White noise of variance v has 3/4 v. Apart from the rounding of
    float32, the energy of a constant image is zero.

    Args:
      images: of any size; the mean is that over pixels and channels.
    """
    x = images.transpose(0, 3, 1, 2).astype(jnp.float32) / 127.5 - 1
    (rows, low_rows), (columns, low_columns) = map(_cosines, images.shape[1:3])
    x = jnp.matmul(x, columns.T, precision=jax.lax.Precision.HIGHEST)
    # Energy does not change by an orthonormal transform: what is high along one axis
    # needs no transform along the other.
    high, rest = x[..., low_columns:], x[..., :low_columns].swapaxes(2, 3)
    rest = jnp.matmul(rest, rows[low_rows:].T, precision=jax.lax.Precision.HIGHEST)
    energy = (high**2).sum((1, 2, 3)) + (rest**2).sum((1, 2, 3))
    return energy / np.prod(images.shape[1:])


def _cosines(length: int) -> tuple[Float[np.ndarray, "n n"], int]:
    """The orthonormal DCT-II as a matrix, and how many of its rows have low frequencies.

    Row k has k / (2 length) cycles per pixel.
    """
    k, i = np.arange(length)[:, None], np.arange(length)
    cosines = np.cos(np.pi * k * (i + 0.5) / length) * np.sqrt(2 / length)
    cosines[0] /= np.sqrt(2)
    return cosines.astype(np.float32), -(-length // 2)
