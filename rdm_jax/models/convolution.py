"""The networks' convolutions: stride 1, NHWC, with the implementation that suits the platform.

XLA's CPU backend computes the kernel's gradient of a 1x1 convolution as a convolution over
transposed images, three times slower than the matrix product that it is. In float32 on CPUs a 1x1
convolution is that product, and so are its gradients. It computes the kernel's gradient of a larger
convolution three times slower where the images do not fit into a core's cache, so it gets them part
by part. Everything else, and all of it on other platforms, is XLA's convolution: with 3x3 kernels
no product over patches (im2col) is as fast there.

In bfloat16 the gradient of the bias is summed by the matrix unit, and a 3x3 convolution of an
enlarged image does not write that image.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Padding = tuple[tuple[int, int], ...]  # before and after each axis

CACHED = 2**18  # values of images whose kernel's gradient a CPU's core computes in its cache
MOST_PARTS = 16  # of a batch, as each is compiled


def convolved(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "kh kw c c2"],
    padding: Padding,
    dtype: jnp.dtype | None = None,
    factor: int = 1,
) -> Float[Array, "b h2 w2 c2"]:
    """The convolution of x with the kernel, which have the same dtype.

    The platform is that which the program is lowered for, not that which runs the trace.

    Args:
      x, kernel: as their shapes say.
      padding: pixels of zeros around x.
      dtype: of the result; None for that of x.
      factor: of x with zeros between its pixels, which take no time.
    """
    if _is_product(x, kernel, padding):
        return jax.lax.platform_dependent(x, kernel, cpu=_product, default=_product_as_convolution)
    if x.dtype == jnp.float32 and factor == 1 and _parts(x, kernel) > 1:
        return _in_parts(x, kernel, padding)
    return _convolution(x, kernel, padding, dtype, factor)


def _is_product(x: Array, kernel: Array, padding: Padding) -> bool:
    return kernel.shape[:2] == (1, 1) and x.dtype == jnp.float32 and not any(map(any, padding))


def _product(x: Array, kernel: Array) -> Array:
    return jnp.einsum("bhwi,io->bhwo", x, kernel[0, 0])


def _product_as_convolution(x: Array, kernel: Array) -> Array:
    return _convolution(x, kernel, ((0, 0), (0, 0)))


def _convolution(
    x: Array,
    kernel: Array,
    padding: Padding,
    dtype: jnp.dtype | None = None,
    factor: int = 1,
) -> Array:
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (1, 1),
        padding,
        lhs_dilation=(factor, factor),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        preferred_element_type=dtype,
    )


def _parts(x: Array, kernel: Array) -> int:
    """The number of parts of a batch; each has images of every device that may share it."""
    batch, height, width, _ = x.shape
    devices = math.gcd(batch, jax.device_count())
    own = batch // devices
    values = own * height * width * max(kernel.shape[2:])
    least = min(-(-values // CACHED), own, MOST_PARTS)
    return next((parts for parts in range(max(least, 1), own) if own % parts == 0), max(own, 1))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _in_parts(
    x: Float[Array, "b h w c"], kernel: Float[Array, "kh kw c c2"], padding: Padding
) -> Float[Array, "b h2 w2 c2"]:
    """The convolution; on CPUs its kernel's gradient is a sum over parts of the batch."""
    return _convolution(x, kernel, padding)


def _in_parts_forward(x: Array, kernel: Array, padding: Padding) -> tuple[Array, Any]:
    return _convolution(x, kernel, padding), (x, kernel)


def _in_parts_backward(padding: Padding, residuals: Any, gradient: Array) -> tuple[Array, Array]:
    x, kernel = residuals
    parts = _parts(x, kernel)

    def whole(x: Array, gradient: Array) -> Array:
        _, backward = jax.vjp(lambda kernel: _convolution(x, kernel, padding), kernel)
        return backward(gradient)[0]

    def in_parts(x: Array, gradient: Array) -> Array:
        # Every so many images, not neighbours: of a batch that devices share, each has its own.
        x, gradient = (a.reshape(-1, parts, *a.shape[1:]) for a in (x, gradient))
        return functools.reduce(jnp.add, (whole(x[:, i], gradient[:, i]) for i in range(parts)))

    _, backward = jax.vjp(lambda x: _convolution(x, kernel, padding), x)
    of_kernel = jax.lax.platform_dependent(x, gradient, cpu=in_parts, default=whole)
    return backward(gradient)[0], of_kernel


_in_parts.defvjp(_in_parts_forward, _in_parts_backward)


def convolve(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "p q c d"],
    bias: Float[Array, " d"],
    padding: Padding,
    *,
    wide: bool = False,
    factor: int = 1,
) -> Float[Array, "b h2 w2 d"]:
    """The convolution of x with the kernel, plus a bias, which is added in float32.

    Args:
      x, kernel: both float32 or bfloat16.
      bias: float32; its gradient, a sum over all pixels, is float32 too.
      padding: of height and width.
      wide: the result is the float32 sums of the accelerator; else it has the dtype of x. The
        gradients are those of a result like x either way.
      factor: of x with zeros between its pixels, which take no time.
    """
    if x.dtype == jnp.bfloat16:
        return _narrow(x, kernel, bias, padding, wide, factor)
    return convolved(x, kernel, padding, factor=factor) + bias


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _narrow(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "p q c d"],
    bias: Float[Array, " d"],
    padding: Padding,
    wide: bool,
    factor: int,
) -> Float[Array, "b h2 w2 d"]:
    """`convolve` of bfloat16 arrays, with gradients as those of a bfloat16 result."""
    y = convolved(x, kernel, padding, jnp.dtype("float32") if wide else x.dtype, factor)
    return (y.astype(jnp.float32) + bias).astype(y.dtype)


def _narrow_forward(
    x: Array, kernel: Array, bias: Array, padding: Padding, wide: bool, factor: int
) -> tuple[Array, tuple[Array, Array]]:
    return _narrow(x, kernel, bias, padding, wide, factor), (x, kernel)


def _narrow_backward(
    padding: Padding,
    wide: bool,
    factor: int,
    residuals: tuple[Array, Array],
    gradient: Array,
) -> tuple[Array, Array, Array]:
    x, kernel = residuals
    _, backward = jax.vjp(
        lambda x, kernel: convolved(x, kernel, padding, x.dtype, factor), x, kernel
    )
    return *backward(gradient.astype(x.dtype)), _pixel_sum(gradient)


_narrow.defvjp(_narrow_forward, _narrow_backward)


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
    return convolve(x, sums, bias, ((2, 2), (2, 2)), factor=2)


def _pixel_sum(gradient: Float[Array, "b h w d"]) -> Float[Array, " d"]:
    """The sum over all pixels, in float32.

    Of bfloat16 values by the matrix unit, which is exact up to the order of the sums: it leaves the
    vector units free, which are what limits a sum over 128 lanes.
    """
    if gradient.dtype != jnp.bfloat16:
        return gradient.sum((0, 1, 2))
    rows = 8  # what the unit takes at once; one row would be compiled as a plain sum
    ones = jnp.ones((*gradient.shape[:-1], rows), gradient.dtype)
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
