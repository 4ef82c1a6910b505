"""float64 in tests, under the name that it has in each version of jax."""

import importlib

import jax

enable_x64 = (
    jax.enable_x64
    if hasattr(jax, "enable_x64")
    else importlib.import_module("jax.experimental").enable_x64
)
