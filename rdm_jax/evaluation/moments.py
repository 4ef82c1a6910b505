"""Mean and covariance of any number of features, in one pass on the devices in constant memory."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


class Moments(NamedTuple):
    """Sums over the features so far, about a shift, each with its compensation for rounding.

    The shift is close to the features' mean: without it the covariance would be a small difference
    of large numbers. The compensations (`_rest`) make the sum over many batches as exact as the sum
    within one.
    """

    shift: Float[Array, " d"]
    total: Float[Array, " d"]
    total_rest: Float[Array, " d"]
    outer: Float[Array, "d d"]
    outer_rest: Float[Array, "d d"]


def start(shift: Float[Array, " d"]) -> Moments:
    """The moments of no features.

    Args:
      shift: subtracted from all features, such as the mean of the first few.
    """
    size = len(shift)
    vector, matrix = jnp.zeros(size, shift.dtype), jnp.zeros((size, size), shift.dtype)
    return Moments(
        shift=shift,
        total=vector,
        total_rest=jnp.zeros_like(vector),
        outer=matrix,
        outer_rest=jnp.zeros_like(matrix),
    )


@functools.partial(jax.jit, donate_argnums=0)
def update(moments: Moments, features: Float[Array, "b d"], is_real: Float[Array, " b"]) -> Moments:
    """Adds features, which may be sharded over devices.

    Args:
      moments: donated; use the result instead.
      features: of a batch.
      is_real: 1, or 0 for rows of padding.
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
    """a + b rounded, and the exact rounding error (Knuth, The Art of Computer Programming 2,
    4.2.2)."""
    total = a + b
    b_seen = total - a
    return total, (a - (total - b_seen)) + (b - b_seen)


class Sums(NamedTuple):
    """The same sums in float64 on the host."""

    shift: Float[np.ndarray, " d"]
    total: Float[np.ndarray, " d"]
    outer: Float[np.ndarray, "d d"]


def exact(moments: Moments) -> Sums:
    """The sums with their compensations."""
    shift, total, total_rest, outer, outer_rest = (np.asarray(x, np.float64) for x in moments)
    return Sums(shift, total + total_rest, outer + outer_rest)


def rounded(sums: Sums) -> Moments:
    """The sums on the devices, each with what float32 leaves of it as its compensation.

    The shift must be one of float32.
    """
    total, outer = sums.total.astype(np.float32), sums.outer.astype(np.float32)
    rests = (sums.total - total).astype(np.float32), (sums.outer - outer).astype(np.float32)
    return Moments(
        *map(jnp.asarray, (sums.shift.astype(np.float32), total, rests[0], outer, rests[1]))
    )


def about(sums: Sums, count: int, shift: Float[np.ndarray, " d"]) -> Sums:
    """The sums of the same `count` features about another shift."""
    by = sums.shift - shift
    cross = np.outer(by, sums.total)
    outer = sums.outer + cross + cross.T + count * np.outer(by, by)
    return Sums(shift, sums.total + count * by, outer)


def mean_and_covariance(
    sums: Sums, count: int
) -> tuple[Float[np.ndarray, " d"], Float[np.ndarray, "d d"]]:
    """float64 mean (d,) and unbiased covariance (d, d) of the `count` >= 2 features added."""
    mean = sums.total / count
    covariance = (sums.outer - count * np.outer(mean, mean)) / (count - 1)
    return sums.shift + mean, covariance if count > len(mean) else _of_rank(covariance, count - 1)


def _of_rank(covariance: np.ndarray, rank: int) -> np.ndarray:
    """The covariance projected to the rank that so few features allow.

    Rounding in float32 leaves small eigenvalues in the other directions, whose square roots are not
    small.
    """
    values, vectors = np.linalg.eigh(covariance)
    return (vectors[:, -rank:] * np.maximum(values[-rank:], 0)) @ vectors[:, -rank:].T
