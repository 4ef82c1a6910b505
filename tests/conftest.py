"""Eight virtual devices for every test, so that sharding is exercised on any machine."""

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
