"""A text network with its tokenizer, as an encoder uses it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Array


@dataclass(frozen=True)
class TextNetwork:
    """A published network.

    Attributes:
      name: its kind, such as 'minilm'.
      width: of its tokens.
      longest: the most tokens that it takes; None if any number.
      weights_hash: the SHA-256 of its file of weights, in hexadecimal digits; of several files,
        that of their digits, one after the other.
      tokenizer: a `tokenizers.Tokenizer` that neither pads nor truncates.
      params: the first argument of `apply`; a tree of arrays.
      apply: (params, token ids int32 (b, t), mask bool (b, t)) -> float32 (b, t, width), the
        last layer's tokens. It is pure and gets compiled; tokens behind the mask do not change the
        others.
    """

    name: str
    width: int
    longest: int | None
    weights_hash: str
    tokenizer: Any = field(repr=False)
    params: Any = field(repr=False)
    apply: Callable[[Any, Array, Array], Array] = field(repr=False)
