"""The settings of jax (environment variables and `jax.config`) on which results would depend.

`randomness` names its generator, so `jax_default_prng_impl` does not matter. Settings that change
what is drawn are refused. `jax_default_matmul_precision` changes how products are rounded, as
another accelerator does: it is the user's choice, and logged. What changes the last bits at most
  (XLA's flags, `jax_disable_jit`), or fails by itself (`jax_numpy_dtype_promotion`), is left
alone.
"""

import functools

import jax

from rdm_jax.runtime.console import log
from rdm_jax.runtime.errors import InputError

# What each must be, and what it would change.
NEEDED = {
    "jax_enable_x64": (False, "random numbers would be float64, and others"),
    "jax_threefry_partitionable": (True, "every seed would give other random numbers"),
    "jax_random_seed_offset": (0, "every seed would give another one's random numbers"),
}


def check() -> None:
    """Refuses settings under which the same config and seeds give other results. Raises
    InputError."""
    for name, (needed, why) in NEEDED.items():
        value = getattr(jax.config, name, needed)  # not every version of jax has every setting
        if value != needed:
            raise InputError(
                f"{name}={value} (or the variable {name.upper()}) cannot be used, as {why}; {needed} would do."
            )
    _log_precision(jax.config.jax_default_matmul_precision)


@functools.cache  # once
def _log_precision(precision: str | None) -> None:
    if precision is not None:
        log.info(
            "jax_default_matmul_precision=%s: matrix products are rounded as it says, not in the usual way",
            precision,
        )
