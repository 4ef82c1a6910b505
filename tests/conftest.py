"""Eight virtual devices for every test, so that sharding is exercised on any machine."""

import os

# Tests compile much and compute little: XLA's optimising of machine code would take most of their time.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
