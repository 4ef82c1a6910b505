"""The interface of previews and evaluations of a stage during its training."""

from pathlib import Path
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Probe(Protocol):
    """Looks at a stage while it is trained.

    Attributes:
      evaluates: whether there is anything to evaluate with.
    """

    evaluates: bool

    def preview(self, params: Any, path: Path) -> None:
        """Draws images that these EMA parameters generate."""

    def evaluate(self, params: Any, images_seen: int, folder: Path) -> dict[str, float]:
        """Returns metrics of these EMA parameters and writes results to the folder.

        The same call resumes an interrupted evaluation.
        """
