"""Changes of resolution inside of a network: filters, and pixels folded into channels. NHWC."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def downsample(
    x: Float[Array, "b h w c"], taps: tuple[int, ...] = (1, 1), *, padded: bool = False
) -> Float[Array, "b h2 w2 c"]:
    """Filters and keeps every second pixel.

    Args:
      x: images.
      taps: of the filter along each axis.
      padded: x already has a margin of (len(taps) - 1) // 2 pixels.
    """
    if taps == (1, 1):
        if x.dtype == jnp.bfloat16:
            return (_cell_sums(x.astype(jnp.float32)) / 4).astype(x.dtype)
        b, h, w, c = x.shape
        return x.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))
    for axis in (1, 2):
        x = x if padded else _pad(x, axis, (len(taps) - 1) // 2)
        last = x.shape[axis] - len(taps)
        slices = [jax.lax.slice_in_dim(x, k, k + last + 1, 2, axis) for k in range(len(taps))]
        filtered: Any = sum(tap / sum(taps) * part for tap, part in zip(taps, slices, strict=True))
        x = filtered
    return x


def upsample(
    x: Float[Array, "b h w c"], taps: tuple[int, ...] = (1, 1)
) -> Float[Array, "b h2 w2 c"]:
    """Puts a zero between any two pixels and filters; constant images stay as they are.

    With the taps (1, 1) it is nearest-neighbour repetition.
    """
    if taps == (1, 1):
        if x.dtype == jnp.bfloat16:
            return _repeated(x)
        b, h, w, c = x.shape  # at once: `repeat` twice would write the image twice
        repeated = jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c))
        return repeated.reshape(b, 2 * h, 2 * w, c)
    margin = (len(taps) - 1) // 2
    for axis in (1, 2):
        shape = (*x.shape[:axis], 2 * x.shape[axis], *x.shape[axis + 1 :])
        even, odd = (_phase(x, taps, axis, margin, r) for r in (0, 1))
        x = jnp.stack([even, odd], axis + 1).reshape(shape)
    return x


# In bfloat16 both are windows over the image: a TPU copies arrays whose pixels are split into or
# joined from two axes, which takes several times as long. On CPUs windows are slower than that.


def _cell_sums(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """The sums of 2x2 pixels."""
    window = (1, 2, 2, 1)
    return jax.lax.reduce_window(x, np.float32(0), jax.lax.add, window, window, "VALID")


@jax.custom_vjp
def _repeated(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """Each pixel as 2x2 pixels: a window of 2x2 over x with zeros between its pixels."""
    window = (1, 2, 2, 1)
    margins = ((0, 0), (1, 1), (1, 1), (0, 0))
    return jax.lax.reduce_window(
        x, x.dtype.type(0), jax.lax.add, window, (1, 1, 1, 1), margins, base_dilation=window
    )


def _repeated_forward(x: Array) -> tuple[Array, None]:
    return _repeated(x), None


def _repeated_backward(_: None, gradient: Array) -> tuple[Array]:
    return (_cell_sums(gradient.astype(jnp.float32)).astype(gradient.dtype),)


_repeated.defvjp(_repeated_forward, _repeated_backward)


def _phase(
    x: Float[Array, "b h w c"], taps: tuple[int, ...], axis: int, margin: int, r: int
) -> Float[Array, "b h w c"]:
    """The pixels 2 j + r of `upsample`'s result: the taps that do not fall on zeros."""
    size, reach = x.shape[axis], len(taps) // 2
    wide = _pad(x, axis, reach)
    terms = [
        (tap, reach + (r + margin - k) // 2)
        for k, tap in enumerate(taps)
        if (r + margin - k) % 2 == 0
    ]
    phase: Any = sum(
        2 * tap / sum(taps) * jax.lax.slice_in_dim(wide, i, i + size, 1, axis) for tap, i in terms
    )
    return phase


def _pad(x: Float[Array, "b h w c"], axis: int, margin: int) -> Float[Array, "b h2 w2 c"]:
    """Zeros on both sides."""
    return jnp.pad(x, [(margin, margin) if i == axis else (0, 0) for i in range(x.ndim)])


RESAMPLE = {"down": downsample, "up": upsample, None: lambda x, taps: x}


def space_to_depth(x: Float[Array, "b h w c"], factor: int) -> Float[Array, "b h2 w2 c2"]:
    """Folds factor x factor pixels into the channels."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // factor, factor, w // factor, factor, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h // factor, w // factor, factor**2 * c)


def depth_to_space(x: Float[Array, "b h w c"], factor: int) -> Float[Array, "b h2 w2 c2"]:
    """The inverse of `space_to_depth`."""
    b, h, w, c = x.shape
    x = x.reshape(b, h, w, factor, factor, c // factor**2)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h * factor, w * factor, c // factor**2)
