"""What a network is conditioned on besides the noise level: nothing, classes, or captions.

A condition turns a batch into a tree of arrays with leading axis b, which the network gets as it
is. A stage's config holds a condition without the data's number of classes; `bound` completes it.
"""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.fields import at_least

LABEL = jax.ShapeDtypeStruct((), jnp.int32)


@runtime_checkable
class Condition(Protocol):
    """What a network is conditioned on."""

    def bound(self, classes: int) -> "Condition":
        """The condition for data of so many classes (0: none). Raises InputError if unusable."""

    @property
    def spec(self) -> Any:
        """Shapes and dtypes of the tree for one image (`jax.ShapeDtypeStruct`); None for none."""

    @property
    def inputs(self) -> dict[str, jax.ShapeDtypeStruct]:
        """What it reads of a batch: shapes and dtypes for one image. 'label' means classes."""

    def encode(self, batch: dict[str, Array]) -> Any:
        """The tree of a batch, which has `inputs`; of 'label', -1 is the null class."""

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

    @property
    def inputs(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Nothing."""
        return {}

    def encode(self, batch: dict[str, Array]) -> None:
        """Ignores the batch."""

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
        return ClassLabels(_counted(self.count, classes)) if classes else Nothing()

    @property
    def spec(self) -> jax.ShapeDtypeStruct:
        """(count,) float32."""
        return jax.ShapeDtypeStruct((self.count,), jnp.float32)

    @property
    def inputs(self) -> dict[str, jax.ShapeDtypeStruct]:
        """'label' int32, -1 for the null class."""
        return {"label": LABEL}

    def encode(self, batch: dict[str, Array]) -> Float[Array, "b classes"]:
        """One-hot of 'label'; -1 gives the all-zero null condition."""
        return jax.nn.one_hot(batch["label"], self.count)

    def null(self, condition: Float[Array, "b classes"]) -> Float[Array, "b classes"]:
        """All zeros."""
        return jnp.zeros_like(condition)

    def drop(
        self, condition: Float[Array, "b classes"], keys: Key[Array, " b"], rate: float
    ) -> Float[Array, "b classes"]:
        """All zeros with probability `rate`, from each image's own key."""
        return _dropped(condition, self.null(condition), keys, rate)


@dataclasses.dataclass(frozen=True)
class Text:
    """Captions, embedded by the encoder of the data; with `classes`, class indices as well.

    The tree: 'tokens' float32 (b, tokens, width), the encoder's, zero behind a caption's end;
    'mask' float32 (b, tokens), 1 for a caption's tokens; 'vector' float32 (b, width + count), the
    mean of its tokens scaled to the norm sqrt(width), then the one-hot class. The null condition is
    all-zero.

    Attributes:
      tokens: the longest caption (`data.text_tokens`).
      width: of the encoder's embedding; 384 for 'minilm'.
      classes: whether the network is conditioned on the data's classes, too.
      count: number of classes; 0 for that of the data.
    """

    tokens: int = at_least(1, default=32)
    width: int = at_least(1, default=384)
    classes: bool = False
    count: int = at_least(0, default=0)

    def bound(self, classes: int) -> "Text":
        """The condition for so many classes, which it counts only with `classes`."""
        if not self.classes:
            return dataclasses.replace(self, count=0)
        if not classes:
            raise InputError(
                "condition.classes=True, but the data has no classes",
                "Use condition.classes=False.",
            )
        return dataclasses.replace(self, count=_counted(self.count, classes))

    @property
    def spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """'tokens', 'mask' and 'vector', float32."""
        shapes = {
            "tokens": (self.tokens, self.width),
            "mask": (self.tokens,),
            "vector": (self.width + self.count,),
        }
        return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}

    @property
    def inputs(self) -> dict[str, jax.ShapeDtypeStruct]:
        """'text' float16 (tokens, width), and 'text_length' int32, 0 for the null caption; with
        `classes` also 'label'."""
        text = {
            "text": jax.ShapeDtypeStruct((self.tokens, self.width), jnp.float16),
            "text_length": jax.ShapeDtypeStruct((), jnp.int32),
        }
        return {"label": LABEL, **text} if self.classes else text

    def encode(self, batch: dict[str, Array]) -> dict[str, Array]:
        """The tree of captions and classes. Raises KeyError for a batch without captions."""
        mask = jnp.arange(self.tokens) < batch["text_length"][:, None]
        mask = mask.astype(jnp.float32)
        text = batch["text"].astype(jnp.float32) * mask[:, :, None]
        total = text.sum(1)
        norm = jnp.sqrt((total**2).sum(1, keepdims=True))
        pooled = total * (self.width**0.5 / jnp.maximum(norm, 1e-12))
        if not self.classes:
            return {"tokens": text, "mask": mask, "vector": pooled}
        vector = jnp.concatenate([pooled, jax.nn.one_hot(batch["label"], self.count)], axis=1)
        return {"tokens": text, "mask": mask, "vector": vector}

    def null(self, condition: dict[str, Array]) -> dict[str, Array]:
        """All zeros."""
        return jax.tree.map(jnp.zeros_like, condition)

    def drop(
        self, condition: dict[str, Array], keys: Key[Array, " b"], rate: float
    ) -> dict[str, Array]:
        """All zeros, caption and class together, with probability `rate`, by each image's key."""
        return _dropped(condition, self.null(condition), keys, rate)


def _counted(count: int, classes: int) -> int:
    """The number of the data's classes. Raises InputError if the config has another one."""
    if count not in (0, classes):
        raise InputError(
            f"condition.count={count}, but the data has {classes} classes",
            f"Use {classes}, or 0 for those of the data.",
        )
    return classes


def _dropped(condition: Any, null: Any, keys: Key[Array, " b"], rate: float) -> Any:
    dropped = jax.vmap(jax.random.uniform)(keys) < rate

    def either(null: Array, condition: Array) -> Array:
        return jnp.where(dropped.reshape(-1, *(1,) * (null.ndim - 1)), null, condition)

    return jax.tree.map(either, null, condition)
