"""The interface of networks: shapes in, an nnx module out. A new family is one such dataclass."""

from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

from flax import nnx

from rdm_jax.runtime.errors import InputError


class Shapes(NamedTuple):
    """What a network is built for.

    Attributes:
      channels_in: channels of the input: the noised image's, then the conditioning's.
      channels_out: channels of the output.
      condition: shapes and dtypes of one image's condition (`Condition.spec`); None for none.
    """

    channels_in: int
    channels_out: int
    condition: Any = None


@runtime_checkable
class Backbone(Protocol):
    """Size and options of a network, a frozen dataclass.

    Attributes:
      condition_parameters: names of the top-level parameters that belong to the condition; they
        are re-initialised where parameters trained on other classes are taken over.
      augment_labels: values of the augmentation label; 0 for none.
      dtype: of the computation on images, 'float32' or 'bfloat16'.
      remat: what training computes again in the backward pass: 'none', or a kind of the family.
    """

    condition_parameters: ClassVar[tuple[str, ...]]
    augment_labels: int
    dtype: str
    remat: str

    @property
    def stride(self) -> int:
        """Height and width of an image must be divisible by this."""

    def build(self, shapes: Shapes, *, rngs: nnx.Rngs) -> nnx.Module:
        """A module `(x, noise_label, condition, augment_label, dropout_keys) -> F`.

        The last three may be None; F is float32 of `shapes.channels_out` channels.
        """

    def check(self, path: str) -> None:
        """Checks what concerns several fields; `path` names the network. Raises InputError."""


def vector_size(condition: Any) -> int:
    """Size of the condition's vector, 0 for none. Raises InputError for a tree of another shape."""
    if condition is None:
        return 0
    if len(getattr(condition, "shape", ())) != 1:
        raise InputError(
            f"network.kind takes a condition of one vector per image, and condition.kind gives "
            f"{condition}",
            "Use another network or condition.",
        )
    return condition.shape[0]
