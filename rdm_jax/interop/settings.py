"""Settings of published networks: values from untrusted files, and refusals of exports."""

import dataclasses
from typing import Any

from rdm_jax.config import Stage
from rdm_jax.runtime.errors import InputError

# Fields of a stage that published weights determine; the others stay as in the config.
FIELDS = ("resolution", "network", "precondition")


@dataclasses.dataclass(frozen=True)
class Described:
    """A network that the original's settings describe.

    Attributes:
      stage: the input stage with other fields, those that the weights determine.
      channels: of the images.
      classes: their number; 0 for an unconditional network.
    """

    stage: Stage
    channels: int
    classes: int


def is_integer(value: Any, least: int, most: int) -> bool:
    """Whether a value is an integer within these bounds, and not a bool."""
    return type(value) is int and least <= value <= most


def integer(settings: dict[str, Any], name: str, least: int, most: int) -> int:
    """A setting that is an integer. Raises InputError if it is missing, or another value."""
    if name not in settings:
        raise InputError(
            f"the weights' settings have no {name!r}", "Use a file as it was published."
        )
    if not is_integer(settings[name], least, most):
        raise unusable(name, settings[name], f"an integer from {least} to {most}")
    return settings[name]


def number(
    settings: dict[str, Any],
    name: str,
    default: float,
    most: float = 1e6,
    *,
    least: float | None = None,
) -> float:
    """A setting that is a number above 0, or from `least` on. Raises InputError for others."""
    value = settings.get(name, default)
    is_number = type(value) in (int, float)
    if not is_number or not (0 < value <= most if least is None else least <= value <= most):
        bounds = "above 0 and at most" if least is None else f"from {least:g} to"
        raise unusable(name, value, f"a number {bounds} {most:g}")
    return float(value)


def unusable(name: str, value: Any, wanted: str) -> InputError:
    """The error for a setting with a value other than `wanted`."""
    return InputError(f"the weights' setting {name}={value!r:.80} cannot be used", f"Use {wanted}.")


def no_export(what: str, published: str) -> InputError:
    """The error for a field `what` with a value that the original does not have."""
    return InputError(
        f"{what} cannot be exported: the only format so far is that of the published networks, "
        f"where it is {published}",
        "Use the checkpoint as it is (stageN.checkpoint=PATH, training.start_from=PATH).",
    )
