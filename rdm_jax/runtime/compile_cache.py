"""Where compiled XLA programs are cached between runs."""

import jax

from rdm_jax.runtime.files import cache_folder


def keep_compiled() -> None:
    """Caches compiled programs, in the user's cache folder or JAX_COMPILATION_CACHE_DIR."""
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))
