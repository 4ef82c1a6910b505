"""The networks' convolutions: stride 1, NHWC, with the implementation that suits the platform.

XLA's CPU backend computes the kernel's gradient of a 1x1 convolution as a convolution over
transposed images, three times slower than the matrix product that it is. In float32 on CPUs a 1x1
convolution is that product, and so are its gradients. Everything else, and all of it on other
platforms, is XLA's convolution: with 3x3 kernels no product over patches (im2col) is as fast there.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Padding = tuple[tuple[int, int], ...]  # before and after each axis


def convolved(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "kh kw c c2"],
    padding: Padding,
    dtype: jnp.dtype | None = None,
) -> Float[Array, "b h2 w2 c2"]:
    """The convolution of x with the kernel, which have the same dtype.

    The platform is that which the program is lowered for, not that which runs the trace.

    Args:
      x, kernel: as their shapes say.
      padding: pixels of zeros around x.
      dtype: of the result; None for that of x.
    """
    if _is_product(x, kernel, padding):
        return jax.lax.platform_dependent(x, kernel, cpu=_product, default=_product_as_convolution)
    return _convolution(x, kernel, padding, dtype)


def _is_product(x: Array, kernel: Array, padding: Padding) -> bool:
    return kernel.shape[:2] == (1, 1) and x.dtype == jnp.float32 and not any(map(any, padding))


def _product(x: Array, kernel: Array) -> Array:
    return jnp.einsum("bhwi,io->bhwo", x, kernel[0, 0])


def _product_as_convolution(x: Array, kernel: Array) -> Array:
    return _convolution(x, kernel, ((0, 0), (0, 0)))


def _convolution(
    x: Array, kernel: Array, padding: Padding, dtype: jnp.dtype | None = None
) -> Array:
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), padding, dimension_numbers=numbers, preferred_element_type=dtype
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def convolved_wide(
    x: Float[Array, "b h w c"], kernel: Float[Array, "kh kw c c2"], padding: Padding
) -> Float[Array, "b h2 w2 c2"]:
    """A convolution of narrow numbers with the accelerator's float32 sums as its result.

    Its gradients are those of a narrow result: jax alone would compute them with float32 copies or,
    in older versions, refuse.
    """
    return convolved(x, kernel, padding, jnp.dtype("float32"))


def _wide_forward(x: Array, kernel: Array, padding: Padding) -> tuple[Array, tuple[Array, Array]]:
    return convolved_wide(x, kernel, padding), (x, kernel)


def _wide_backward(
    padding: Padding, inputs: tuple[Array, Array], gradient: Array
) -> tuple[Array, Array]:
    _, backward = jax.vjp(lambda x, kernel: convolved(x, kernel, padding), *inputs)
    return backward(gradient.astype(inputs[0].dtype))


convolved_wide.defvjp(_wide_forward, _wide_backward)
