"""An encoder that needs no weights: a token per word, from the word's own letters."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from rdm_jax.runtime.errors import InputError
from rdm_jax.text.encoders import Encoded


@dataclasses.dataclass(frozen=True)
class FakeEncoder:
    """Embeds a word as random values that follow from its letters.

    Attributes:
      calls: the texts of each call.
    """

    tokens: int = 8
    width: int = 6
    name: str = "fake"
    weights_hash: str = "0" * 64
    calls: list[list[str]] = dataclasses.field(default_factory=list)

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Numbers of words."""
        return [len(text.split()) for text in texts]

    def __call__(self, texts: Sequence[str]) -> Encoded:
        """The tokens of each text, and their number."""
        self.calls.append(list(texts))
        values = np.zeros((len(texts), self.tokens, self.width), np.float16)
        for row, text in zip(values, texts, strict=True):
            words = text.split()
            if not 0 < len(words) <= self.tokens:
                raise InputError(f"{text!r} has {len(words)} tokens", f"Use 1 to {self.tokens}.")
            for place, word in enumerate(words):
                row[place] = np.random.default_rng(list(word.encode())).normal(size=self.width)
        return Encoded(values, np.array([len(text.split()) for text in texts], np.int32))
