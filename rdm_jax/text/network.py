"""A text network with its tokenizer, as an encoder uses it."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Array


@dataclass(frozen=True)
class TextNetwork:
    """A published network, whose weights are read when they are first used.

    Attributes:
      name: its kind, such as 'minilm'.
      width: of its tokens.
      longest: the most tokens that it takes; None if any number.
      tokenizer: a `tokenizers.Tokenizer` that neither pads nor truncates.
      load: reads `params`.
      digest: finds `weights_hash`.
      apply: (params, token ids int32 (b, t), mask bool (b, t)) -> float32 (b, t, width), the
        last layer's tokens. It is pure and gets compiled; tokens behind the mask do not change the
        others.
    """

    name: str
    width: int
    longest: int | None
    tokenizer: Any = field(repr=False)
    load: Callable[[], Any] = field(repr=False)
    digest: Callable[[], str] = field(repr=False)
    apply: Callable[[Any, Array, Array], Array] = field(repr=False)

    @functools.cached_property
    def params(self) -> Any:
        """The first argument of `apply`; a tree of arrays. Raises InputError for damaged files."""
        return self.load()

    @functools.cached_property
    def weights_hash(self) -> str:
        """A SHA-256 in hexadecimal digits, of all that the tokens of a text depend on."""
        return self.digest()
