"""Relay Diffusion in JAX (arXiv 2309.03350): a cascade that continues instead of starting again."""

__version__ = "0.1.0"
