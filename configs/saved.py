"""The config of a run that was made, or into which weights were imported: any workdir's config.json.

python -m rdm_jax.main --config configs/saved.py:runs/digits/config.json --workdir runs/digits --mode sample
"""

from pathlib import Path

from rdm_jax.config import parse
from rdm_jax.saved import read_saved


def get_config(path: str):
    """The config in a config.json as an ml_collections ConfigDict."""
    return parse(read_saved(Path(path).expanduser())).to_config_dict()
