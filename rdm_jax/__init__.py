"""Relay Diffusion in JAX (arXiv 2309.03350).

A cascaded diffusion model whose second stage continues from the upsampled output of the first.

    import rdm_jax

    config = rdm_jax.load_config("digits")
    rdm_jax.run(config, "runs/digits")
    pipeline = rdm_jax.load("runs/digits")

Names are imported at their first use, so that `import rdm_jax` is fast and sets nothing up.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rdm_jax.config import Config
    from rdm_jax.config.load import load_config
    from rdm_jax.loading import load
    from rdm_jax.modes import run
    from rdm_jax.sampling.pipeline import RelayPipeline

__version__ = "0.1.0"
__all__ = ["Config", "RelayPipeline", "__version__", "load", "load_config", "run"]

_MODULES = {
    "Config": "rdm_jax.config",
    "RelayPipeline": "rdm_jax.sampling.pipeline",
    "load": "rdm_jax.loading",
    "load_config": "rdm_jax.config.load",
    "run": "rdm_jax.modes",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
