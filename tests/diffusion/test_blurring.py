import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft

from rdm_jax.diffusion import blurring
from tests.support.arrays import images

PATCHES = [2, 3, 4, 5, 8]
# A p x p transform sums p^2 products of magnitude below 4 in float32 (6e-8 each).
FLOAT32 = 2e-6


def levels(*values):
    return jnp.asarray(values, jnp.float32)


def each_patch(x, patch):
    """Every patch in a Python loop: (image, slice of rows, slice of columns, channel)."""
    b, h, w, c = x.shape
    for i in np.ndindex(b, h // patch, w // patch, c):
        yield (
            i[0],
            slice(i[1] * patch, (i[1] + 1) * patch),
            slice(i[2] * patch, (i[2] + 1) * patch),
            i[3],
        )


@pytest.mark.parametrize("patch", PATCHES)
def test_dct_matrix_is_orthonormal(patch):
    matrix = blurring.dct_matrix(patch)
    chex.assert_shape(matrix, (patch, patch))
    chex.assert_trees_all_close(matrix @ matrix.T, np.eye(patch), atol=1e-14)  # float64
    chex.assert_trees_all_close(
        matrix, scipy.fft.dct(np.eye(patch), axis=0, norm="ortho"), atol=1e-14
    )


@pytest.mark.parametrize("patch", PATCHES)
def test_dct_matches_scipy(patch):
    x = images((patch, patch))
    u = blurring.dct2(x)
    chex.assert_trees_all_close(
        np.asarray(u), scipy.fft.dctn(np.asarray(x), norm="ortho"), atol=FLOAT32
    )
    chex.assert_trees_all_close(blurring.idct2(u), x, atol=FLOAT32)


@pytest.mark.parametrize("patch", PATCHES)
def test_patch_dct_keeps_norm_and_inverts(patch):
    x = images((2, 3 * patch, 2 * patch, 3))
    u = blurring.patch_dct(x, patch=patch)
    chex.assert_shape(u, x.shape)

    def squares(a):
        return np.sum(np.asarray(a, np.float64) ** 2)

    chex.assert_trees_all_close(squares(u), squares(x), rtol=1e-6)  # float32 coefficients
    chex.assert_trees_all_close(blurring.patch_idct(u, patch=patch), x, atol=FLOAT32)


@pytest.mark.parametrize(
    ("patch", "height", "width"), [(2, 4, 6), (3, 9, 3), (4, 4, 12), (5, 10, 5)]
)
def test_over_patches_matches_loop(patch, height, width):
    x, y = images((2, height, width, 3)), images((2, height, width, 3), seed=1)
    weights, scale = images((2, patch, patch), seed=2), levels(0.5, 3.0)

    # Of rows and columns, arguments and images, none may be exchanged for another.
    def function(x, y, w, s):
        return x.cumsum(0) * w + s * y.T

    expected = np.zeros(x.shape, np.float32)
    for place in each_patch(x, patch):
        arrays = (
            np.asarray(x)[place],
            np.asarray(y)[place],
            np.asarray(weights)[place[0]],
            np.asarray(scale)[place[0]],
        )
        expected[place] = function(*arrays)
    lifted = jax.jit(
        lambda images, per_image: blurring.over_patches(function, patch)(images, per_image)
    )((x, y), (weights, scale))
    chex.assert_trees_all_close(np.asarray(lifted), expected, atol=1e-6)


@pytest.mark.parametrize(("patch", "height", "width"), [(4, 8, 6), (4, 6, 8), (3, 8, 8)])
def test_patches_refuse_indivisible_sizes(patch, height, width):
    x = images((1, height, width, 1))
    with pytest.raises(
        ValueError, match=f"{height} x {width} do not divide into patches of {patch} x {patch}"
    ):
        blurring.patch_dct(x, patch=patch)
    with pytest.raises(ValueError, match="do not divide"):
        blurring.blur(x, levels(1.0), patch=patch)


@pytest.mark.parametrize("min_scale", [0.0, 1e-3, 0.1])
def test_blur_weights_match_formula(min_scale):
    sigma = np.asarray([0.0, 0.3, 1.0, 3.0])
    frequency = np.pi * np.arange(5) / 5
    exponent = -(frequency[:, None] ** 2 + frequency**2) * sigma[:, None, None] ** 2 / 2
    weights = blurring.blur_weights(jnp.asarray(sigma, jnp.float32), patch=5, min_scale=min_scale)
    expected = (1 - min_scale) * np.exp(exponent) + min_scale
    chex.assert_trees_all_close(
        np.asarray(weights), expected.astype(np.float32), atol=1e-6
    )  # float32 exponents up to 57
    assert weights.min() >= min_scale


@pytest.mark.parametrize("patch", PATCHES)
def test_blur_limit_is_enlarged_means(patch):
    x = images((2, 2 * patch, 3 * patch, 3))
    blurred = blurring.blur(
        x, levels(20 * patch, 20 * patch), patch=patch, min_scale=0.0
    )  # the slowest weight is exp(-1974)
    means = blurring.enlarge(blurring.mean_pool(x, factor=patch), factor=patch)
    chex.assert_trees_all_close(blurred, means, atol=FLOAT32)


@pytest.mark.parametrize("patch", PATCHES)
def test_blur_of_zero_is_identity(patch):
    x = images((2, patch, 2 * patch, 3))
    chex.assert_trees_all_close(blurring.blur(x, levels(0, 0), patch=patch), x, atol=FLOAT32)


@pytest.mark.parametrize("blur_sigma", [0.1, 0.7, 1.5, 3.0])
def test_blur_keeps_patch_means(blur_sigma):
    x = images((2, 9, 6, 2))
    blurred = blurring.blur(x, levels(blur_sigma, blur_sigma), patch=3)
    chex.assert_trees_all_close(
        blurring.mean_pool(blurred, factor=3), blurring.mean_pool(x, factor=3), atol=FLOAT32
    )

    def inside(x):
        return np.asarray(x) - np.asarray(
            blurring.enlarge(blurring.mean_pool(x, factor=3), factor=3)
        )

    weights = np.asarray(blurring.blur_weights(jnp.asarray(blur_sigma), patch=3))
    ratio = np.linalg.norm(inside(blurred)) / np.linalg.norm(inside(x))
    assert weights[2, 2] < ratio < weights[0, 1]


def test_blur_composes_without_floor():
    x = images((1, 8, 4, 1))
    once = blurring.blur(x, levels(0.5), patch=4, min_scale=0.0)
    twice = blurring.blur(once, levels(1.2), patch=4, min_scale=0.0)
    # Gaussian blurs add their variances: 0.25 + 1.44 = 1.69.
    chex.assert_trees_all_close(
        twice, blurring.blur(x, levels(1.3), patch=4, min_scale=0.0), atol=FLOAT32
    )


def test_blur_has_one_level_per_image():
    x, sigma = np.asarray(images((4, 6, 9, 2))), (0.0, 0.4, 1.5, 9.0)
    together = blurring.blur(jnp.asarray(x), levels(*sigma), patch=3)
    alone = [blurring.blur(jnp.asarray(x[i : i + 1]), levels(sigma[i]), patch=3) for i in range(4)]
    chex.assert_trees_all_close(np.asarray(together), np.concatenate(alone), atol=FLOAT32)


def test_blur_stays_within_patch():
    x = images((1, 8, 12, 2))
    added = np.zeros(x.shape, np.float32)
    added[:, 4:8, 4:8, 0] = 1
    blur = functools.partial(blurring.blur, blur_sigma=levels(2.0), patch=4)
    difference = np.asarray(blur(jnp.asarray(x + added))) - np.asarray(blur(x))
    np.testing.assert_array_equal(difference != 0, added != 0)


@pytest.mark.parametrize(("height", "width", "block"), [(6, 5, 2), (7, 8, 3), (8, 8, 4), (5, 4, 1)])
def test_block_noise_covariance(height, width, block):
    draws = 4000
    noise = np.asarray(
        blurring.block_noise(images((draws, height, width, 1)), block=block), np.float64
    )[..., 0]
    # All offsets at once: the circular autocorrelation of each draw, averaged over pixels.
    products = np.fft.ifft2(np.abs(np.fft.fft2(noise)) ** 2).real / (height * width)

    def torus(n):
        return np.minimum(np.arange(n), n - np.arange(n))

    overlap = [np.maximum(0, block - torus(n)) / block for n in (height, width)]
    error = products.mean(0) - np.outer(*overlap)
    standard_error = products.std(0) / np.sqrt(draws)
    # 5 standard errors for each of at most 64 offsets: a right covariance fails once in 25,000
    # seeds.
    assert np.all(np.abs(error) < 5 * standard_error), np.max(np.abs(error) / standard_error)
    assert np.max(standard_error) < 0.02, (
        "too few draws to tell neighbouring values of the formula apart"
    )


def test_block_noise_has_unit_variance():
    draws = 20_000
    noise = blurring.block_noise(images((draws, 6, 7, 1)), block=3)
    variance = np.var(np.asarray(noise, np.float64), axis=0)
    chex.assert_trees_all_close(
        variance, np.ones_like(variance), atol=5 * np.sqrt(2 / draws)
    )  # 5 standard errors


@pytest.mark.parametrize("block", [2, 3, 4])
def test_block_noise_wraps_around(block):
    impulse, expected = np.zeros((2, 1, 7, 6, 2), np.float32)
    impulse[0, 6, 4, 1] = 1
    for i, j in np.ndindex(block, block):
        expected[0, (6 + i) % 7, (4 + j) % 6, 1] = 1 / block
    chex.assert_trees_all_close(
        np.asarray(blurring.block_noise(jnp.asarray(impulse), block=block)), expected, rtol=1e-6
    )


def test_block_noise_does_not_mix_channels_or_images():
    white = np.asarray(images((2, 3, 6, 8, 2)))
    together = np.asarray(blurring.block_noise(jnp.asarray(white), block=3))
    for i, j, c in np.ndindex(2, 3, 2):
        alone = blurring.block_noise(jnp.asarray(white[i, j, ..., c : c + 1]), block=3)
        chex.assert_trees_all_close(together[i, j, ..., c : c + 1], np.asarray(alone), atol=1e-6)


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_mean_pool_inverts_enlarge(factor):
    small = images((2, 3, 5, 3))
    large = blurring.enlarge(small, factor=factor)
    chex.assert_shape(large, (2, 3 * factor, 5 * factor, 3))
    np.testing.assert_array_equal(large, np.kron(small, np.ones((1, factor, factor, 1))))
    chex.assert_trees_all_close(
        blurring.mean_pool(large, factor=factor), small, rtol=1e-6, atol=1e-7
    )


def test_mean_pool_averages_patches():
    x = images((2, 6, 9, 3))
    expected = np.zeros((2, 2, 3, 3), np.float32)
    for i, rows, columns, c in each_patch(x, 3):
        expected[i, rows.start // 3, columns.start // 3, c] = np.asarray(x)[
            i, rows, columns, c
        ].mean()
    chex.assert_trees_all_close(np.asarray(blurring.mean_pool(x, factor=3)), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("function", "static", "needs_levels"),
    [
        (blurring.patch_dct, {"patch": 4}, False),
        (blurring.patch_idct, {"patch": 4}, False),
        (blurring.blur, {"patch": 4, "min_scale": 0.0}, True),
        (blurring.block_noise, {"block": 3}, False),
        (blurring.mean_pool, {"factor": 2}, False),
        (blurring.enlarge, {"factor": 2}, False),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_blurring_is_traced_once(function, static, needs_levels):
    once = chex.assert_max_traces(n=1)(function.__wrapped__)
    compiled = jax.jit(once, static_argnames=tuple(static))
    for seed in range(3):
        args = (images((2, 8, 4, 3), seed), *([levels(0.5, 0.5 + seed)] if needs_levels else []))
        chex.assert_trees_all_close(compiled(*args, **static), function(*args, **static), atol=1e-6)


def test_blur_weights_are_traced_once():
    compiled = jax.jit(
        functools.partial(chex.assert_max_traces(n=1)(blurring.blur_weights.__wrapped__), patch=3)
    )
    for value in (0.0, 0.5, 3.0):
        chex.assert_shape(compiled(levels(value, value)), (2, 3, 3))
