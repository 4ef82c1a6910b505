"""The config: frozen dataclasses with bounds, and their way to and from ml_collections and JSON."""

from rdm_jax.config.codec import choices, kind_of, to_plain
from rdm_jax.config.parse import parse, stage_number, to_dict
from rdm_jax.config.schema import (
    Config,
    Data,
    Evaluation,
    Parallel,
    Published,
    Sampling,
)
from rdm_jax.config.stage import Stage, Training, extend

__all__ = [
    "Config",
    "Data",
    "Evaluation",
    "Parallel",
    "Published",
    "Sampling",
    "Stage",
    "Training",
    "choices",
    "extend",
    "kind_of",
    "parse",
    "stage_number",
    "to_dict",
    "to_plain",
]
