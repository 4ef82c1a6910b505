"""Whose latents a set or a checkpoint is of, and how they are normalised."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class LatentSpec(NamedTuple):
    """Latents, as a checkpoint's metadata has them.

    Attributes:
      autoencoder: SHA-256 of its weights.
      mean, deviation: of each channel, over the set.
    """

    autoencoder: str
    mean: tuple[float, ...]
    deviation: tuple[float, ...]

    @property
    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """The mean and the standard deviation of each channel."""
        return self.mean, self.deviation


def spec_of(about: Mapping[str, Any]) -> LatentSpec | None:
    """The latents that a checkpoint was trained on, by its metadata; None for pixels."""
    found = about.get("latents")
    if not found:
        return None
    return LatentSpec(found["autoencoder"], tuple(found["mean"]), tuple(found["deviation"]))


def shown(spec: LatentSpec | None) -> str:
    """What a stage is trained on, for messages."""
    if spec is None:
        return "pixels"
    return f"latents of the autoencoder with SHA-256 {spec.autoencoder[:16]}"
