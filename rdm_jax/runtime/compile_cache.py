"""What XLA has compiled, kept for the next time."""

import jax

from rdm_jax.runtime.files import cache_folder


def keep_compiled() -> None:
    """Keeps programs among the user's caches, unless JAX has been told where
    (JAX_COMPILATION_CACHE_DIR)."""
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))
