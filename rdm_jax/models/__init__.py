"""Networks: flax.nnx modules and their split into pure functions; no knowledge of diffusion."""
