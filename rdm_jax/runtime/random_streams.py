"""Random streams: every key is folded from the seed by (stage, stream, step or image seed)."""

import enum

import jax
from jaxtyping import Array, Integer, Key

from rdm_jax.runtime import jax_settings


class RandomStream(enum.IntEnum):
    """What a key is used for. The values are part of the results: never renumber them."""

    INIT = 0
    TRAIN = 1
    SAMPLE = 2
    VALIDATE = 3
    LABEL = 4


def root_key(seed: int) -> Key[Array, ""]:
    """Returns the key that all other keys of a seed are folded from.

    The generator is always Threefry, whatever `jax_default_prng_impl` says: with 'rbg' the draws
    of an image would depend on its batch.
    """
    return jax.random.key(seed, impl="threefry2x32")


def stream_key(seed: int, stage: int, stream: RandomStream) -> Key[Array, ""]:
    """Returns the key of one stream of one stage (index from 0).

    Raises:
      InputError: a JAX setting changes what is drawn from a key.
    """
    jax_settings.check()
    return jax.random.fold_in(jax.random.fold_in(root_key(seed), stage), int(stream))


def image_keys(key: Key[Array, ""], index: Integer[Array, " b"]) -> Key[Array, " b"]:
    """Returns one key per image, folded from its index in the global batch or its seed.

    So an image's randomness depends neither on its neighbours in the batch nor on its device.
    """
    return jax.vmap(jax.random.fold_in, (None, 0))(key, index)
