"""The squared error in the DCT, weighted by how much JPEG keeps of each coefficient.

As in DeCo's loss (arXiv 2511.19365): 8 x 8 blocks, the quantisation tables of ITU-T T.81 (annex K)
scaled to a quality by the rule of libjpeg, and as weights their reciprocals with mean 1.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from rdm_jax.diffusion import blurring

BLOCK = 8
# ITU-T T.81, tables K.1 and K.2: quantisation steps by vertical, then horizontal frequency.
_LUMINANCE = np.array(
    [
        [16, 11, 10, 16, 24, 40, 51, 61],
        [12, 12, 14, 19, 26, 58, 60, 55],
        [14, 13, 16, 24, 40, 57, 69, 56],
        [14, 17, 22, 29, 51, 87, 80, 62],
        [18, 22, 37, 56, 68, 109, 103, 77],
        [24, 35, 55, 64, 81, 104, 113, 92],
        [49, 64, 78, 87, 103, 121, 120, 101],
        [72, 92, 95, 98, 112, 100, 103, 99],
    ]
)
_CHROMINANCE = np.full((BLOCK, BLOCK), 99)
_CHROMINANCE[:4, :4] = [[17, 18, 24, 47], [18, 21, 26, 66], [24, 26, 56, 99], [47, 66, 99, 99]]
# From RGB to YCbCr (ITU-R BT.601, as in JFIF), without the offsets, which differences do not have.
_YCBCR = np.array(
    [
        [0.299, 0.587, 0.114],
        [-0.299 / 1.772, -0.587 / 1.772, 0.5],
        [0.5, -0.587 / 1.402, -0.114 / 1.402],
    ]
)


def weights(channels: int, quality: int) -> np.ndarray:
    """The weights of the coefficients of each channel, (8, 8, channels) float64, with mean 1.

    1 / Q, with Q the table of the luminance, and for Cb and Cr that of the chrominance. At a
    quality of 100 all are 1.

    Args:
      channels: 1 for grey, 3 for Y, Cb and Cr.
      quality: 1 to 100.
    """
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality  # per cent
    tables = [_LUMINANCE, _CHROMINANCE, _CHROMINANCE][:channels]
    steps = np.clip((np.stack(tables, -1) * scale + 50) // 100, 1, 255)
    return (1 / steps) / np.mean(1 / steps)


def squared(error: Float[Array, "b h w c"], *, quality: int) -> Float[Array, " b"]:
    """The mean over all coefficients of weight times squared coefficient, per image.

    RGB is converted to YCbCr. Without weights and conversion it is the mean squared error of the
    pixels, as the DCT is orthonormal.

    Args:
      error: of 1 or 3 channels, and of whole blocks of 8 x 8 pixels.
      quality: of JPEG, 1 to 100; a lower one ignores more of the high frequencies.
    """
    channels = error.shape[-1]
    if channels == 3:
        matrix = jnp.asarray(_YCBCR.T, error.dtype)
        error = jnp.matmul(error, matrix, precision="highest")
    b, h, w, _ = error.shape
    coefficients = blurring.patch_dct(error, patch=BLOCK)
    by_block = coefficients.reshape(b, h // BLOCK, BLOCK, w // BLOCK, BLOCK, channels)
    weight = jnp.asarray(weights(channels, quality), error.dtype)[:, None]
    return jnp.mean(weight * by_block**2, (1, 2, 3, 4, 5))
