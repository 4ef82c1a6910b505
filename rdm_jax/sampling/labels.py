"""The class of each seed's image."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from rdm_jax.data.classes import Classes, parse_labels
from rdm_jax.runtime import random_streams
from rdm_jax.runtime.random_streams import RandomStream


def labels_of(
    seeds: Int[np.ndarray, " b"], rule: str, classes: Classes, *, run_seed: int
) -> Int[np.ndarray, " b"]:
    """int32 class indices of seeds, each from its seed alone; -1 if there are no classes.

    Args:
      seeds: of the images.
      rule: 'balanced', 'random', or a list of classes such as 'cat, dog' or '0,2-5'
        (config.Sampling.labels).
      classes: of the network.
      run_seed: the config's seed.

    Raises:
      InputError: the list has a name that is not a class, or that is ambiguous.
    """
    if not len(classes):
        return np.full(len(seeds), -1, np.int32)
    if rule == "random":
        keys = random_streams.image_keys(
            random_streams.stream_key(run_seed, 0, RandomStream.LABEL),
            jnp.asarray(seeds.astype(np.uint32)),
        )
        return np.asarray(
            jax.vmap(lambda key: jax.random.randint(key, (), 0, len(classes)))(keys), np.int32
        )
    if rule == "balanced":
        listed = np.arange(len(classes))
    else:
        listed = np.asarray(parse_labels(rule, classes, "config.sampling.labels"))
    return listed[seeds % len(listed)].astype(np.int32)
