"""Text encoders behind one interface."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float16, Int


class Encoded(NamedTuple):
    tokens: Float16[np.ndarray, "n t w"]
    lengths: Int[np.ndarray, " n"]


@runtime_checkable
class TextEncoder(Protocol):
    name: str
    width: int
    tokens: int
    weights_hash: str

    def __call__(self, texts: Sequence[str]) -> Encoded: ...


def open_encoder(spec: str, tokens: int, field: str = "config.data.text_encoder") -> TextEncoder:
    raise NotImplementedError
