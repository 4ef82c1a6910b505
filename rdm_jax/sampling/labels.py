"""Which class each seed's image gets."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from rdm_jax import randomness
from rdm_jax.checks import parse_numbers
from rdm_jax.randomness import Stream


def labels_of(seeds: Int[np.ndarray, " b"], rule: str, *, classes: int, run_seed: int) -> Int[np.ndarray, " b"]:
    """int32 classes of seeds, each from its seed alone; -1 where there are no classes.

    Args:
      rule: 'balanced', 'random', or a list such as '0,2-5' (config.Sampling.labels).
      classes: how many there are.
      run_seed: the config's seed.
    """
    if not classes:
        return np.full(len(seeds), -1, np.int32)
    if rule == "random":
        keys = randomness.image_keys(randomness.stream_key(run_seed, 0, Stream.LABEL), jnp.asarray(seeds.astype(np.uint32)))
        return np.asarray(jax.vmap(lambda key: jax.random.randint(key, (), 0, classes))(keys), np.int32)
    listed = np.arange(classes) if rule == "balanced" else np.asarray(parse_numbers(rule, "config.sampling.labels"))
    return listed[seeds % len(listed)].astype(np.int32)
