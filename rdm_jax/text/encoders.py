"""Text encoders: from texts to tokens, by a network that stays as it was published."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Float16, Int32

from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.files import local_path
from rdm_jax.text import minilm, t5
from rdm_jax.text.network import TextNetwork

FIELD = "config.data.text_encoder"
BATCH_SIZE = 32  # every batch has this shape, so that a network is compiled once
TOKENISED = 4096  # texts that are tokenised at a time
QUOTED = 80  # characters of a text in a message


class Encoded(NamedTuple):
    """Encoded texts.

    Attributes:
      tokens: the last layer's, zeros behind the end.
      lengths: numbers of tokens, the special ones included; at least 2.
    """

    tokens: Float16[np.ndarray, "n t w"]
    lengths: Int32[np.ndarray, " n"]


@runtime_checkable
class TextEncoder(Protocol):
    """Encodes texts of at most `tokens` tokens.

    Attributes:
      name: the kind of the network, such as 'minilm'.
      width: of a token.
      tokens: the size of the second axis of what is returned.
      weights_hash: identifies the weights and all else that the tokens of a text depend on.
    """

    name: str
    width: int
    tokens: int

    @property
    def weights_hash(self) -> str: ...  # noqa: D102

    def __call__(self, texts: Sequence[str]) -> Encoded:
        """Encodes each text by itself.

        Raises:
          InputError: a text is empty, longer than `tokens`, or not valid Unicode.
        """
        ...

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Numbers of tokens, the special ones included, of texts of any length; 0 for empty ones.

        The texts are valid Unicode. The network's weights are not needed.
        """
        ...


def open_encoder(spec: str, tokens: int, field: str = FIELD) -> TextEncoder:
    """Opens a published encoder. Its weights are read when it first encodes a text.

    Args:
      spec: 'minilm', or 't5:PATH' with the folder of a T5 v1.1 or Flan-T5 network.
      tokens: the most tokens of a text.
      field: that holds `spec`, for messages.

    Raises:
      InputError: there is no such encoder, a library or a file is missing, damaged or another
        model's, or the network takes fewer tokens.
    """
    kind, _, path = spec.partition(":")
    if spec == "minilm":
        network = minilm.open_network(field)
    elif kind == "t5" and path:
        network = t5.open_network(local_path(path, field), field)
    else:
        raise InputError(f"{field}={spec!r} is not known", "Use minilm or t5:PATH.")
    if network.longest is not None and tokens > network.longest:
        raise InputError(
            f"{field}={spec} takes at most {network.longest} tokens, not {tokens}",
            f"Use at most {network.longest} tokens.",
        )
    return NetworkEncoder(network, tokens)


class NetworkEncoder:
    """A `TextEncoder` that runs a network in batches of one shape, in float32.

    Args:
      network: to run.
      tokens: the most tokens of a text.
    """

    def __init__(self, network: TextNetwork, tokens: int):
        self.name, self.width, self.tokens = network.name, network.width, tokens
        self._network, self._tokenizer = network, network.tokenizer
        self._apply = jax.jit(network.apply)
        self._special = len(self._tokenizer.encode("").ids)

    @property
    def weights_hash(self) -> str:
        """See `TextEncoder`."""
        return self._network.weights_hash

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """See `TextEncoder`."""
        lengths: list[int] = []
        for first in range(0, len(texts), TOKENISED):
            part = self._tokenizer.encode_batch(list(texts[first : first + TOKENISED]))
            lengths += [len(each.ids) for each in part]
        return [length if length > self._special else 0 for length in lengths]

    def __call__(self, texts: Sequence[str]) -> Encoded:
        """See `TextEncoder`. Raises InputError also where the network's tokens are not finite."""
        ids = [self._ids(text) for text in texts]
        lengths = np.array([len(each) for each in ids], np.int32)
        tokens = np.zeros((len(ids), self.tokens, self.width), np.float16)
        for first in range(0, len(ids), BATCH_SIZE):
            batch = slice(first, first + BATCH_SIZE)
            tokens[batch] = self._encode(ids[batch])
        finite = np.isfinite(tokens).all((1, 2))
        if not finite.all():
            raise InputError(
                f"the encoder {self.name} gives tokens that are not finite for the text "
                f"{_quoted(texts[int(finite.argmin())])}",
                "Use intact weights.",
            )
        return Encoded(tokens, lengths)

    def _encode(self, ids: list[list[int]]) -> np.ndarray:
        """The tokens (b, t, w) of at most one batch; float16, zeros behind the end."""
        padded = np.zeros((BATCH_SIZE, self.tokens), np.int32)
        mask = np.zeros((BATCH_SIZE, self.tokens), bool)
        for row, each in enumerate(ids):
            padded[row, : len(each)], mask[row, : len(each)] = each, True
        tokens = np.asarray(self._apply(self._network.params, padded, mask))
        with np.errstate(over="ignore"):  # an infinite token is refused
            return np.where(mask[..., None], tokens, 0)[: len(ids)].astype(np.float16)

    def _ids(self, text: str) -> list[int]:
        """The token ids of a text."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"the text {_quoted(text)} is not valid Unicode ({error.reason})",
                "Use text that UTF-8 can encode.",
            ) from error
        ids = self._tokenizer.encode(text).ids
        if len(ids) <= self._special:
            raise InputError(f"the text {_quoted(text)} is empty", "Use a text with words in it.")
        if len(ids) > self.tokens:
            raise InputError(
                f"the text {_quoted(text)} has {len(ids)} tokens, more than {self.tokens}",
                f"Shorten it to at most {self.tokens} tokens.",
            )
        return ids


def _quoted(text: str) -> str:
    return repr(text if len(text) <= QUOTED else text[:QUOTED] + "...")
