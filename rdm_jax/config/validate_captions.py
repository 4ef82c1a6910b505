"""Checks of what a config says of captions, without the data."""

from collections.abc import Iterable

from rdm_jax.config.codec import kind_of
from rdm_jax.config.rules import require
from rdm_jax.config.schema import Config
from rdm_jax.config.stage import Stage
from rdm_jax.runtime.errors import InputError


def check_asked(config: Config, numbers: Iterable[int]) -> None:
    """Refuses stages that are conditioned on other captions than the config asks of the data.

    `validate.check_captions` looks at the data, once it is prepared.

    Args:
      config: of the run.
      numbers: of the stages whose images are opened.

    Raises:
      InputError: names the field, its value and the remedy.
    """
    for number in numbers:
        condition, path = config.stage(number).condition, f"config.stage{number}.condition"
        if "text" not in condition.inputs:
            continue
        require(
            config.data.captions != "none",
            "config.data.captions",
            config.data.captions,
            f"Use 'auto' or another rule for {path}.kind={kind_of(type(condition))!r}, or another "
            "condition.",
        )
        tokens = condition.inputs["text"].shape[0]
        require(
            tokens == config.data.text_tokens,
            f"{path}.tokens",
            tokens,
            f"Use {config.data.text_tokens} (config.data.text_tokens).",
        )


def check_network(config: Config, stage: Stage, path: str) -> None:
    """Builds the network of a stage with captions, without arrays: it says whether it can."""
    condition = stage.condition
    if "text" in condition.inputs:
        try:
            stage.build(config.data.channels, stage.some_classes)
        except InputError as error:
            raise InputError(f"{path}.{error.problem}", error.fix) from error
