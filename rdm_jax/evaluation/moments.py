"""Mean and covariance of any number of features in one pass, on the devices, in memory that does
not grow with their number."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


class Moments(NamedTuple):
    """Sums over the features seen so far, about a shift, each as a rounded number and what the
    rounding has left.

    The shift is about the features' mean: without it the covariance would be a small difference of
    large numbers. The rests make the sum of many batches as exact as the sum within one.
    """

    shift: Float[Array, " d"]
    total: Float[Array, " d"]
    total_rest: Float[Array, " d"]
    outer: Float[Array, "d d"]
    outer_rest: Float[Array, "d d"]


def start(shift: Float[Array, " d"]) -> Moments:
    """Of no features yet. `shift` is subtracted from all of them: the mean of the first few will
    do."""
    size, shapes = len(shift), {"total": 1, "total_rest": 1, "outer": 2, "outer_rest": 2}
    return Moments(
        shift, **{name: jnp.zeros((size,) * axes, shift.dtype) for name, axes in shapes.items()}
    )


@functools.partial(jax.jit, donate_argnums=0)
def update(moments: Moments, features: Float[Array, "b d"], is_real: Float[Array, " b"]) -> Moments:
    """Adds features, of all devices if they are cut over several.

    Args:
      moments: given away; the result takes its place.
      is_real: 1, or 0 for rows that only fill the batch up.
    """
    x = (features - moments.shift) * is_real[:, None]
    total, total_error = _two_sum(moments.total, x.sum(0))
    outer, outer_error = _two_sum(
        moments.outer, jnp.einsum("bi,bj->ij", x, x, precision=jax.lax.Precision.HIGHEST)
    )
    return Moments(
        moments.shift,
        total,
        moments.total_rest + total_error,
        outer,
        moments.outer_rest + outer_error,
    )


def _two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """a + b rounded, and exactly what that rounding has taken away (Knuth, The Art of Computer
    Programming 2, 4.2.2)."""
    total = a + b
    b_seen = total - a
    return total, (a - (total - b_seen)) + (b - b_seen)


def mean_and_covariance(
    moments: Moments, count: int
) -> tuple[Float[np.ndarray, " d"], Float[np.ndarray, "d d"]]:
    """float64 mean and unbiased covariance of the `count` (at least 2) features that were added."""
    shift, total, total_rest, outer, outer_rest = (np.asarray(x, np.float64) for x in moments)
    mean = (total + total_rest) / count
    covariance = (outer + outer_rest - count * np.outer(mean, mean)) / (count - 1)
    return shift + mean, covariance if count > len(mean) else _of_rank(covariance, count - 1)


def _of_rank(covariance: np.ndarray, rank: int) -> np.ndarray:
    """So few features leave directions without any spread; float32 puts a little there, whose root
    is no longer little."""
    values, vectors = np.linalg.eigh(covariance)
    return (vectors[:, -rank:] * np.maximum(values[-rank:], 0)) @ vectors[:, -rank:].T
