"""The JAX settings (environment variables and `jax.config`) that results depend on.

`random_streams` names its generator, so `jax_default_prng_impl` does not matter. Settings that
change what is drawn are refused. `jax_default_matmul_precision` changes how products are rounded,
as another accelerator does: it is the user's choice, and logged. Settings that change at most the
last bits (XLA flags, `jax_disable_jit`), or that raise by themselves
(`jax_numpy_dtype_promotion`), are left alone.
"""

import functools

import jax

from rdm_jax.runtime.console import log
from rdm_jax.runtime.errors import InputError

# The required value of each setting, and the effect of any other.
NEEDED = {
    "jax_enable_x64": (False, "random numbers would be float64 and differ"),
    "jax_threefry_partitionable": (True, "every seed would give different random numbers"),
    "jax_random_seed_offset": (0, "every seed would give another seed's random numbers"),
}


def check() -> None:
    """Refuses settings under which the same config and seeds give different results.

    Raises:
      InputError: names the setting, its value and the required one.
    """
    for name, (needed, effect) in NEEDED.items():
        value = getattr(jax.config, name, needed)  # not every version of JAX has every setting
        if value != needed:
            raise InputError(
                f"{name}={value} (or the variable {name.upper()}) cannot be used, as {effect}",
                f"Set it to {needed}.",
            )
    _log_precision(jax.config.jax_default_matmul_precision)


@functools.cache  # logs once
def _log_precision(precision: str | None) -> None:
    if precision is not None:
        log.info(
            "jax_default_matmul_precision=%s: matrix products do not use JAX's default precision",
            precision,
        )
