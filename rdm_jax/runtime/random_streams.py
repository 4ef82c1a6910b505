"""Every random number follows from the seed by `fold_in`: (root, stage, stream, step or seed of the
image)."""

import enum

import jax
from jaxtyping import Array, Integer, Key

from rdm_jax.runtime import jax_settings


class RandomStream(enum.IntEnum):
    """What a key is for. The values are part of the results: never renumber them."""

    INIT = 0
    TRAIN = 1
    SAMPLE = 2
    VALIDATE = 3
    LABEL = 4


def root_key(seed: int) -> Key[Array, ""]:
    """The key that all others of a seed are folded from; every key of this package comes from here.

    Threefry always, whatever `jax_default_prng_impl` says: under 'rbg' the draws of an image would
      depend on its batch.
    """
    return jax.random.key(seed, impl="threefry2x32")


def stream_key(seed: int, stage: int, stream: RandomStream) -> Key[Array, ""]:
    """The key of one stream of one stage (0 is the first). Raises InputError where jax is set to
    draw other numbers from it."""
    jax_settings.check()
    return jax.random.fold_in(jax.random.fold_in(root_key(seed), stage), int(stream))


def image_keys(key: Key[Array, ""], index: Integer[Array, " b"]) -> Key[Array, " b"]:
    """One key an image, from its index in the global batch or its seed, so that neighbours and
    devices do not matter."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, index)
