"""Every field at its default: the published sizes, 64 -> 256, on a folder of images.

    python -m rdm_jax.main --config configs/default.py --workdir runs/images \\
        --config.data.source=folder:images

`rdm_jax/config/schema.py` explains the fields. Hardware, time and result: none yet; a starting
point for your own config, not a run that was made.
"""

from rdm_jax.config import Config


def get_config():
    """The default config as an ml_collections ConfigDict."""
    return Config().to_config_dict()
