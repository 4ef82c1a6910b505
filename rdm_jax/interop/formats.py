"""The published formats of networks: which one a stage or a file has."""

from collections.abc import Callable
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np

from rdm_jax.config import Stage, kind_of
from rdm_jax.interop.jit_names import JiTFormat
from rdm_jax.interop.pytorch_names import UNetFormat
from rdm_jax.interop.settings import FIELDS, Described
from rdm_jax.models.conditions import Text
from rdm_jax.runtime.errors import InputError


@runtime_checkable
class Format(Protocol):
    """Settings, parameter names and layouts of a stage's network in the original, and in ours.

    `shapes` are those of all tensors of a file, by the original's names.

    Attributes:
      networks: classes of our networks that are published so.
      class_names: of the original's outermost modules.
      fields: of a stage, which the weights determine.
    """

    networks: ClassVar[tuple[type, ...]]
    class_names: ClassVar[tuple[str, ...]]
    fields: ClassVar[tuple[str, ...]]

    @staticmethod
    def describe(
        class_name: str,
        settings: dict[str, Any],
        shapes: dict[str, tuple[int, ...]],
        stage: Stage,
    ) -> Described:
        """The stage that a file's settings describe. Raises InputError if it is not supported."""

    def settings_of(self, channels: int, classes: int) -> tuple[str, dict[str, Any]]:
        """The original's class and settings. Raises InputError if it has no such network."""

    def original_name(self, path: tuple[str, ...]) -> str:
        """The original's name of a parameter at a path in our tree."""

    def to_ours(self, name: str, array: np.ndarray) -> np.ndarray:
        """A parameter of the original, by its name there, in our layout."""

    def to_theirs(self, name: str, array: np.ndarray) -> np.ndarray:
        """The inverse of `to_ours`."""

    def classes(self, shapes: dict[str, tuple[int, ...]]) -> int:
        """The number of classes of the weights in a file."""

    def buffers(self) -> dict[str, np.ndarray]:
        """Constants that the original stores beside the parameters; float32."""

    def is_buffer(self, name: str) -> bool:
        """Whether a tensor of a file is such a constant, which is not imported."""

    def check_buffers(
        self, shapes: dict[str, tuple[int, ...]], read: Callable[[str], np.ndarray]
    ) -> None:
        """Raises InputError for constants that our network does not have; the problem names one."""


FORMATS: tuple[type[Format], ...] = (UNetFormat, JiTFormat)


def format_of(stage: Stage) -> Format:
    """The format of a stage's network. Raises InputError if it has none; names the field."""
    if isinstance(stage.condition, Text):
        raise InputError(
            f"condition.kind={kind_of(Text)!r} has no published format",
            "Use 'classlabels' or 'nothing'.",
        )
    for known in FORMATS:
        if isinstance(stage.network, known.networks):
            return known(stage)
    kinds = " or ".join(repr(kind_of(cls)) for known in FORMATS for cls in known.networks)
    raise InputError(
        f"network.kind={kind_of(type(stage.network))!r} has no published format", f"Use {kinds}."
    )


def determined(stage: Stage) -> tuple[str, ...]:
    """The fields of a stage that imported weights have determined."""
    for known in FORMATS:
        if isinstance(stage.network, known.networks):
            return known.fields
    return FIELDS


def describe(
    class_name: str, settings: dict[str, Any], shapes: dict[str, tuple[int, ...]], stage: Stage
) -> Described:
    """The stage that a file's settings describe, and its channels and classes.

    Raises:
      InputError: the network is not supported.
    """
    names = {name: known for known in FORMATS for name in known.class_names}
    for name, known in names.items():
        if name.lower() == class_name.lower():
            return known.describe(name, settings, shapes, stage)
    raise InputError(f"the network's class {class_name!r} is unknown", f"Use {' or '.join(names)}.")
