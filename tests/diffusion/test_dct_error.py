"""The squared error in the DCT against closed forms and Pillow's tables."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft
from PIL import Image

from rdm_jax.diffusion import dct_error


@pytest.mark.parametrize("quality", [1, 10, 49, 50, 85, 100])
def test_weights_are_those_of_jpeg(quality):
    """libjpeg's tables, as Pillow writes them."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "JPEG", quality=quality)
    tables = Image.open(file).quantization
    steps = np.stack([np.reshape(tables[n], (8, 8)) for n in (0, 1, 1)], -1)
    np.testing.assert_allclose(
        dct_error.weights(3, quality), (1 / steps) / np.mean(1 / steps), rtol=1e-12
    )
    grey = 1 / steps[..., :1]
    np.testing.assert_allclose(dct_error.weights(1, quality), grey / grey.mean(), rtol=1e-12)


def test_best_quality_is_the_squared_error(x64):
    error = jax.random.normal(jax.random.key(0), (3, 16, 8, 1))
    np.testing.assert_allclose(
        dct_error.squared(error, quality=100), jnp.mean(error**2, (1, 2, 3)), rtol=1e-12
    )


@pytest.mark.parametrize("quality", [30, 85])
def test_one_frequency_has_its_weight(x64, quality):
    """An image of one cosine, of amplitude 1 in the DCT, in one of its two blocks."""
    for row, column in ((0, 0), (0, 1), (1, 0), (5, 3), (7, 7)):
        u = np.zeros((8, 8))
        u[row, column] = 1.0
        image = np.concatenate([np.zeros((8, 8)), scipy.fft.idctn(u, norm="ortho")])
        found = dct_error.squared(jnp.asarray(image[None, ..., None]), quality=quality)
        expected = dct_error.weights(1, quality)[row, column, 0] / 128
        np.testing.assert_allclose(found, [expected], rtol=1e-10)


def test_colours_are_ycbcr(x64):
    """At the best quality it is the mean of the squares of Y, Cb and Cr, as Pillow converts them."""
    rgb = np.array([[255, 0, 0], [0, 255, 0], [30, 60, 200], [128, 128, 128]], np.uint8)
    ycc = np.asarray(Image.fromarray(rgb[None]).convert("YCbCr"), float)[0] - [0, 128, 128]
    flat = jnp.broadcast_to(jnp.asarray(rgb, float)[:, None, None], (4, 8, 8, 3))
    found = dct_error.squared(flat, quality=100)
    # Pillow rounds each to a whole number.
    np.testing.assert_allclose(found, np.mean(ycc**2, -1), atol=np.abs(ycc).max())
    grey = dct_error.squared(jnp.ones((1, 8, 8, 3)), quality=100)
    np.testing.assert_allclose(grey, 1 / 3, rtol=1e-12)
