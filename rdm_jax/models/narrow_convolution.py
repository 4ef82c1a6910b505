"""Convolutions in bfloat16 with the gradients that accelerators compute fastest. NHWC, stride 1."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Padding = tuple[tuple[int, int], ...]  # before and after each axis

_SUBLANES = 8


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def convolve(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "p q c d"],
    bias: Float[Array, " d"],
    padding: Padding,
    wide: bool,
    factor: int = 1,
) -> Float[Array, "b h2 w2 d"]:
    """A convolution of x, which is bfloat16, plus a float32 bias, added in float32.

    Args:
      x, kernel: bfloat16.
      bias: float32; its gradient, a sum over all pixels, is float32 too.
      padding: of height and width.
      wide: the result is the float32 sums of the accelerator; else bfloat16. The gradients are
        those of a bfloat16 result either way.
      factor: of x with zeros between its pixels, which take no time.
    """
    y = _convolved(x, kernel, padding, jnp.dtype("float32") if wide else x.dtype, factor)
    return (y.astype(jnp.float32) + bias).astype(y.dtype)


def _forward(
    x: Array, kernel: Array, bias: Array, padding: Padding, wide: bool, factor: int
) -> tuple[Array, tuple[Array, Array]]:
    return convolve(x, kernel, bias, padding, wide, factor), (x, kernel)


def _backward(
    padding: Padding,
    wide: bool,
    factor: int,
    residuals: tuple[Array, Array],
    gradient: Array,
) -> tuple[Array, Array, Array]:
    x, kernel = residuals
    _, backward = jax.vjp(
        lambda x, kernel: _convolved(x, kernel, padding, x.dtype, factor), x, kernel
    )
    return *backward(gradient.astype(x.dtype)), _pixel_sum(gradient)


convolve.defvjp(_forward, _backward)


def _convolved(x: Array, kernel: Array, padding: Padding, dtype: jnp.dtype, factor: int) -> Array:
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (1, 1),
        padding,
        lhs_dilation=(factor, factor),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        preferred_element_type=dtype,
    )


def enlarge_and_convolve(
    x: Float[Array, "b h w c"], kernel: Float[Array, "3 3 c d"], bias: Float[Array, " d"]
) -> Float[Array, "b h2 w2 d"]:
    """The 3x3 convolution of x, each of whose pixels is repeated to 2x2, which are not written.

    Each pixel of the result sees 2x2 pixels of x, by sums of the kernel's taps: 4 instead of 9
    multiply-adds. That is the convolution of x, with zeros between its pixels, with the kernel's
    4x4 sums over 2x2 neighbouring taps.

    Args:
      x: bfloat16.
      kernel: bfloat16; its taps are summed in float32.
      bias: float32.
    """
    sums = jnp.pad(kernel.astype(jnp.float32), ((1, 1), (1, 1), (0, 0), (0, 0)))
    sums = sums[:-1] + sums[1:]
    sums = (sums[:, :-1] + sums[:, 1:]).astype(x.dtype)
    return convolve(x, sums, bias, ((2, 2), (2, 2)), False, 2)


def _pixel_sum(gradient: Float[Array, "b h w d"]) -> Float[Array, " d"]:
    """The sum over all pixels, in float32.

    Of bfloat16 values by the matrix unit, which is exact up to the order of the sums: it leaves the
    vector units free, which are what limits a sum over 128 lanes.
    """
    if gradient.dtype != jnp.bfloat16:
        return gradient.sum((0, 1, 2))
    ones = jnp.ones((*gradient.shape[:-1], _SUBLANES), gradient.dtype)
    # As the gradient of a 1x1 kernel, which takes images in any layout; a matrix product does not.
    numbers = jax.lax.ConvDimensionNumbers((3, 0, 1, 2), (3, 0, 1, 2), (2, 3, 0, 1))
    sums = jax.lax.conv_general_dilated(
        ones,
        gradient,
        (1, 1),
        ((0, 0), (0, 0)),
        dimension_numbers=numbers,
        preferred_element_type=jnp.dtype("float32"),
    )
    return sums[0, 0, 0]
