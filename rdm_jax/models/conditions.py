"""What a network is conditioned on besides the noise level: nothing, classes, later text.

A condition turns the labels of a batch into a tree of arrays with leading axis b, which the network
gets as it is. A stage's config holds a condition without the data's number of classes; `bound`
completes it.
"""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.fields import at_least


@runtime_checkable
class Condition(Protocol):
    """What a network is conditioned on."""

    def bound(self, classes: int) -> "Condition":
        """The condition for data of so many classes (0: none). Raises InputError if unusable."""

    @property
    def spec(self) -> Any:
        """Shapes and dtypes of the tree for one image (`jax.ShapeDtypeStruct`); None for none."""

    def encode(self, batch: dict[str, Array]) -> Any:
        """The tree of a training batch."""

    def from_labels(self, labels: Int[Array, " b"]) -> Any:
        """The tree of class indices; -1 for the null condition."""

    def null(self, condition: Any) -> Any:
        """The null condition, of the shapes of `condition`."""

    def drop(self, condition: Any, keys: Key[Array, " b"], rate: float) -> Any:
        """Replaces each image's condition by the null one with probability `rate`."""


@dataclasses.dataclass(frozen=True)
class Nothing:
    """No condition: an unconditional network, whatever the data's labels are."""

    def bound(self, classes: int) -> "Nothing":
        """The same for any data."""
        return self

    @property
    def spec(self) -> None:
        """There is no tree."""
        return None

    def encode(self, batch: dict[str, Array]) -> None:
        """Ignores the labels."""

    def from_labels(self, labels: Int[Array, " b"]) -> None:
        """Ignores the labels."""

    def null(self, condition: None) -> None:
        """Nothing is its own null."""

    def drop(self, condition: None, keys: Key[Array, " b"], rate: float) -> None:
        """There is nothing to drop."""


@dataclasses.dataclass(frozen=True)
class ClassLabels:
    """Class indices, one-hot float32 (b, count); the null condition is all-zero.

    Attributes:
      count: number of classes; 0 for that of the data. Data without classes has no condition.
    """

    count: int = at_least(0, default=0)

    def bound(self, classes: int) -> "ClassLabels | Nothing":
        """The condition for so many classes; `Nothing` for 0."""
        if classes and self.count not in (0, classes):
            raise InputError(
                f"condition.count={self.count}, but the data has {classes} classes",
                f"Use {classes}, or 0 for those of the data.",
            )
        return ClassLabels(classes) if classes else Nothing()

    @property
    def spec(self) -> jax.ShapeDtypeStruct:
        """(count,) float32."""
        return jax.ShapeDtypeStruct((self.count,), jnp.float32)

    def encode(self, batch: dict[str, Array]) -> Float[Array, "b classes"]:
        """One-hot of the batch's 'label'."""
        return self.from_labels(batch["label"])

    def from_labels(self, labels: Int[Array, " b"]) -> Float[Array, "b classes"]:
        """One-hot; -1 gives the all-zero null condition."""
        return jax.nn.one_hot(labels, self.count)

    def null(self, condition: Float[Array, "b classes"]) -> Float[Array, "b classes"]:
        """All zeros."""
        return jnp.zeros_like(condition)

    def drop(
        self, condition: Float[Array, "b classes"], keys: Key[Array, " b"], rate: float
    ) -> Float[Array, "b classes"]:
        """All zeros with probability `rate`, from each image's own key."""
        dropped = jax.vmap(jax.random.uniform)(keys) < rate
        return jnp.where(dropped[:, None], self.null(condition), condition)
