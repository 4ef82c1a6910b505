"""From the values of a config file to a `Config`, and to JSON."""

import json
from typing import Any

from ml_collections import ConfigDict

from rdm_jax.config.codec import from_plain
from rdm_jax.config.schema import Config
from rdm_jax.config.stage import Stage
from rdm_jax.runtime.errors import InputError


def parse(values: Config | ConfigDict | dict[str, Any]) -> Config:
    """A Config from a ConfigDict or a nested dict (such as `saved.read_saved` returns); a Config as
    it is.

    Raises:
      InputError: a field is missing, unknown or of the wrong type, or a stage is missing.
    """
    if isinstance(values, Config):
        return values
    values = values.to_dict() if isinstance(values, ConfigDict) else dict(values)
    names = sorted((k for k in values if stage_number(k)), key=stage_number)
    if [stage_number(name) for name in names] != list(range(1, len(names) + 1)) or not names:
        raise InputError(
            f"config has the stages {', '.join(names) or 'none'}",
            "Use stage1, stage2 and so on without a gap.",
        )
    values["stages"] = tuple(
        from_plain(Stage, values.pop(name), f"config.{name}") for name in names
    )
    return from_plain(Config, values, "config")


def stage_number(name: str) -> int:
    """3 for 'stage3', 0 for a text that is not a stage's name."""
    number = name.removeprefix("stage")
    return int(number) if number != name and number.isdecimal() and len(number) < 4 else 0


def to_dict(config: Config) -> dict[str, Any]:
    """A nested dict of JSON's types, as `parse` takes it and a saved config is read."""
    return json.loads(json.dumps(config.to_config_dict().to_dict()))
