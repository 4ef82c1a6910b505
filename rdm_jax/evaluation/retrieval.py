"""Whether images show what their captions say: the nearest real images have the same caption."""

import collections
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from rdm_jax.sampling.run_captions import folded

AMONG = (1, 5)  # nearest real images that are looked at
TILE = 1024  # images whose distances to all real ones are in memory at a time


def retrieval(
    real: Float[np.ndarray, "n d"],
    real_captions: Sequence[str],
    made: Float[np.ndarray, "m d"],
    captions: Sequence[str],
) -> tuple[dict[str, float], list[str]]:
    """The share of images that have a real one of their caption among their nearest real images.

    Images whose caption no real one has do not count. Distances are Euclidean. Case and spaces of
    captions do not matter, and '' is no caption.

    Args:
      real, real_captions: features and captions of real images.
      made, captions: features and captions of the images that are measured.

    Returns:
      'retrieval_1' and 'retrieval_5' for the nearest and the 5 nearest real images, each with its
      value for real images in a random order, 'retrieval_1_chance' and so on; and notes. Without
      images that count there are notes alone.
    """
    theirs = np.asarray(list(map(folded, real_captions)), object)
    ours = np.asarray(list(map(folded, captions)), object)
    matching = collections.Counter(theirs.tolist())
    del matching[""]  # no caption
    counts = [matching[caption] for caption in ours]
    measured = np.flatnonzero(counts)
    notes = []
    if len(measured) < len(ours):
        notes.append(
            f"retrieval: {len(measured)} of {len(ours)} images have a caption of the reference"
        )
    if not len(measured):
        return {}, notes
    nearest = _nearest(real, made[measured], min(max(AMONG), len(real)))
    same = theirs[nearest] == ours[measured, None]
    found = {}
    for k in AMONG:
        found[f"retrieval_{k}"] = float(same[:, :k].any(1).mean())
        found[f"retrieval_{k}_chance"] = float(
            np.mean([_chance(len(real), count, k) for count in counts if count])
        )
    return found, notes


def _chance(count: int, matching: int, k: int) -> float:
    """The probability that k of `count` images, drawn at random, have one of the `matching`."""
    return 1 - math.comb(count - matching, min(k, count)) / math.comb(count, min(k, count))


def _nearest(
    real: Float[np.ndarray, "n d"], made: Float[np.ndarray, "m d"], k: int
) -> Int[np.ndarray, "m k"]:
    """Indices of the k nearest real images of each image, the nearest first."""
    # Centred, as small numbers have small rounding errors.
    centre = real.mean(0, dtype=np.float64).astype(real.dtype)
    everything = jnp.asarray(real - centre)
    found = []
    for first in range(0, len(made), TILE):
        rows = made[first : first + TILE] - centre
        padded = np.pad(rows, ((0, TILE - len(rows)), (0, 0)))
        found.append(np.asarray(_nearest_of_tile(padded, everything, k))[: len(rows)])
    return np.concatenate(found)


@functools.partial(jax.jit, static_argnums=2)
def _nearest_of_tile(
    rows: Float[Array, "a d"], real: Float[Array, "n d"], k: int
) -> Int[Array, "a k"]:
    products = jnp.matmul(rows, real.T, precision=jax.lax.Precision.HIGHEST)
    return jax.lax.top_k(2 * products - (real**2).sum(1), k)[1]
