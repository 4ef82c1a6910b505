"""The config of an existing run, also one with imported weights: any workdir's config.json.

    python -m rdm_jax.main --config configs/saved.py:runs/digits --workdir runs/digits \\
        --mode sample

`--config runs/digits` does the same.
"""

from rdm_jax.config import parse
from rdm_jax.config.saved import read_saved
from rdm_jax.runtime.files import local_path


def get_config(path: str):
    """The config in a config.json, or in that of a folder, as an ml_collections ConfigDict."""
    return parse(read_saved(local_path(path, "--config"))).to_config_dict()
