"""Small autoencoders with random parameters."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from rdm_jax.interop import autoencoder_files
from rdm_jax.models.autoencoder import AutoencoderKL

SMALL = AutoencoderKL(widths=(8, 16), blocks=1, groups=4)


@functools.cache
def small_params(config: AutoencoderKL = SMALL):
    """Random parameters, which keep the scale of what goes through; drawn by NumPy, as compiling
    takes long."""
    random = np.random.default_rng(0)

    def draw(keys, leaf):
        z = random.standard_normal(leaf.shape).astype(np.float32)
        match keys[-1].key:
            case "kernel":
                return z / np.float32(np.sqrt(np.prod(leaf.shape[:-1])))
            case "scale":
                return 1 + 0.1 * z
        return 0.1 * z

    drawn = jax.tree.map_with_path(draw, config.build().parts.abstract)
    return jax.tree.map(jnp.asarray, drawn)


def published(folder: Path, config: AutoencoderKL = SMALL) -> None:
    """Writes one into a folder, as it would be published."""
    autoencoder_files.save(config, small_params(config), folder)
