"""Patch-wise blur and block noise, the two ideas of relay diffusion (arXiv 2309.03350).

Images are NHWC. The blur of stage 2 dissipates heat inside each p x p patch on its own, so that at
full strength only the patch's mean is left: exactly what nearest-neighbour enlargement of a p times
smaller image looks like. Everything here is written for one (p, p) patch and lifted to batches of
images by `over_patches`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

# Accelerators multiply float32 matrices in bfloat16 unless told otherwise; these matrices are p x
# p, so full precision is free.
_PRECISION = jax.lax.Precision.HIGHEST


def dct_matrix(patch: int) -> np.ndarray:
    """The orthonormal DCT-II, (p, p) float64: row k is the cosine of frequency pi k / p."""
    k, n = np.arange(patch)[:, None], np.arange(patch)[None, :]
    matrix = np.sqrt(2 / patch) * np.cos(np.pi * k * (2 * n + 1) / (2 * patch))
    matrix[0] /= np.sqrt(2)
    return matrix


def dct2(x: Float[Array, "p p"]) -> Float[Array, "p p"]:
    """Orthonormal two-dimensional DCT-II of one patch, u = V^T x in the paper's notation."""
    m = jnp.asarray(dct_matrix(x.shape[-1]), x.dtype)
    return jnp.matmul(jnp.matmul(m, x, precision=_PRECISION), m.T, precision=_PRECISION)


def idct2(u: Float[Array, "p p"]) -> Float[Array, "p p"]:
    """The inverse of `dct2`."""
    m = jnp.asarray(dct_matrix(u.shape[-1]), u.dtype)
    return jnp.matmul(jnp.matmul(m.T, u, precision=_PRECISION), m, precision=_PRECISION)


def over_patches(
    function: Callable[..., Float[Array, "p p"]], patch: int
) -> Callable[..., Float[Array, "b h w c"]]:
    """Lifts a function of one patch to images.

    Args:
      function: takes any number of (p, p) patches, then arguments of one image (scalars, (p, p)
        weights), and returns (p, p).
      patch: p; must divide height and width.

    Returns:
      A function `(images, per_image)`: `images` a tuple of (b, h, w, c) arrays, `per_image` a tuple
      of arrays with leading axis b. It returns (b, h, w, c).
    """

    def lifted(images: tuple[Array, ...], per_image: tuple[Any, ...] = ()) -> Array:
        b, h, w, c = images[0].shape
        if h % patch or w % patch:
            raise ValueError(f"images of {h} x {w} do not divide into patches of {patch} x {patch}")
        grids = [x.reshape(b, h // patch, patch, w // patch, patch, c) for x in images]
        # The grid stays in memory order; each vmap removes one of its axes, innermost (channels)
        # first.
        f = function
        for axis in (2, 1, 0):
            f = jax.vmap(f, in_axes=(*[axis] * len(grids), *[None] * len(per_image)), out_axes=axis)
        return jax.vmap(f)(*grids, *per_image).reshape(b, h, w, c)

    return lifted


@functools.partial(jax.jit, static_argnames="patch")
def patch_dct(x: Float[Array, "b h w c"], *, patch: int) -> Float[Array, "b h w c"]:
    """The DCT of every p x p patch; coefficients stay in their patch's place."""
    return over_patches(dct2, patch)((x,))


@functools.partial(jax.jit, static_argnames="patch")
def patch_idct(u: Float[Array, "b h w c"], *, patch: int) -> Float[Array, "b h w c"]:
    """The inverse of `patch_dct`."""
    return over_patches(idct2, patch)((u,))


@functools.partial(jax.jit, static_argnames=("patch", "min_scale"))
def blur_weights(
    blur_sigma: Float[Array, "*b"], *, patch: int, min_scale: float = 1e-3
) -> Float[Array, "*b p p"]:
    """Factor of each DCT coefficient under the blur (arXiv 2309.03350, with the code's floor).

    D_ij = (1 - m) exp(-(f_i^2 + f_j^2) tau) + m with f_k = pi k / p and tau = blur_sigma^2 / 2.

    Args:
      blur_sigma: standard deviation of the equivalent Gaussian blur, in pixels.
      patch: p.
      min_scale: the floor m (from Blurring Diffusion, arXiv 2209.05557), which keeps the process
        invertible.
    """
    frequency = jnp.asarray(np.pi * np.arange(patch) / patch, blur_sigma.dtype)
    squared = frequency[:, None] ** 2 + frequency[None, :] ** 2
    tau = (blur_sigma**2 / 2)[..., None, None]
    return (1 - min_scale) * jnp.exp(-squared * tau) + min_scale


def filter_patch(x: Float[Array, "p p"], weights: Float[Array, "p p"]) -> Float[Array, "p p"]:
    """V W V^T x of one patch, its DCT coefficients multiplied by weights W.

    One matrix product of the patch's p^2 numbers: patches with equal weights share the matrix, and
    transforming back and forth takes several times as long (experiments/benchmarks/relay.py).
    """
    m = dct_matrix(x.shape[-1])
    basis = jnp.asarray(np.einsum("ik,jl->ijkl", m, m), x.dtype)
    matrix = jnp.einsum("ij,ijkl,ijrs->klrs", weights, basis, basis, precision=_PRECISION)
    # The patch comes first: rows of patches times the matrix, not columns.
    return jnp.tensordot(x, matrix, axes=2, precision=_PRECISION)


@functools.partial(jax.jit, static_argnames=("patch", "min_scale"))
def blur(
    x: Float[Array, "b h w c"],
    blur_sigma: Float[Array, " b"],
    *,
    patch: int,
    min_scale: float = 1e-3,
) -> Float[Array, "b h w c"]:
    """Blurs every patch separately, each image by its own `blur_sigma` (pixels)."""
    return over_patches(filter_patch, patch)(
        (x,), (blur_weights(blur_sigma, patch=patch, min_scale=min_scale),)
    )


@functools.partial(jax.jit, static_argnames="block")
def block_noise(white: Float[Array, "*b h w c"], *, block: int) -> Float[Array, "*b h w c"]:
    """White noise summed over block x block pixels and divided by `block` (arXiv 2309.03350).

    `Block[s](e)_{x,y} = (1/s) sum_{i<s} sum_{j<s} e_{x-i,y-j}`, indices on a torus, so that every
    pixel keeps unit variance and

    `Cov = (1/s^2) max(0, s - dx) max(0, s - dy)`, with dx and dy the distances on the torus (of at
    least 2 s - 1 pixels; on a smaller one a block overlaps itself from both sides).
    """
    for axis in (-3, -2):
        summed: Any = sum(jnp.roll(white, i, axis) for i in range(block))
        white = summed
    return white / block


@functools.partial(jax.jit, static_argnames="factor")
def mean_pool(x: Float[Array, "*b h w c"], *, factor: int) -> Float[Array, "*b h2 w2 c"]:
    """Means of factor x factor cells: a stage's images from those of the next stage."""
    *b, h, w, c = x.shape
    return x.reshape(*b, h // factor, factor, w // factor, factor, c).mean((-4, -2))


@functools.partial(jax.jit, static_argnames="factor")
def enlarge(x: Float[Array, "*b h w c"], *, factor: int) -> Float[Array, "*b h2 w2 c"]:
    """Nearest-neighbour enlargement: every factor x factor cell is constant."""
    return x.repeat(factor, -3).repeat(factor, -2)
