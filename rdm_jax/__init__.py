"""Relay Diffusion in JAX (arXiv 2309.03350): a cascade that continues instead of starting again."""
