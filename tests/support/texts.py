"""What text to image needs, in small: an encoder of words, a condition, and captioned images."""

import contextlib
import dataclasses
import hashlib
import types
import typing
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rdm_jax.checkpoints import store
from rdm_jax.config import Config, Stage, extend, to_dict
from rdm_jax.data.image_sets import ImageSet
from rdm_jax.runtime.errors import InputError
from rdm_jax.sampling import prompts
from rdm_jax.sampling.captions import Captions
from rdm_jax.workdir import Workdir
from tests.support.configs import tiny_config

TOKENS, WIDTH = 4, 6


class Encoded(NamedTuple):
    tokens: np.ndarray
    lengths: np.ndarray


class Spec(NamedTuple):
    encoder: str = "words"
    weights_hash: str = "of words"
    tokens: int = TOKENS
    width: int = WIDTH


TEXT = Spec()._asdict()


@dataclasses.dataclass
class Words:
    """Encodes each word by its hash, and counts the texts that it has encoded."""

    tokens: int = TOKENS
    width: int = WIDTH
    name: str = "words"
    weights_hash: str = "of words"
    encoded: list = dataclasses.field(default_factory=list)

    def __call__(self, texts) -> Encoded:
        self.encoded += texts
        tokens = np.zeros((len(texts), self.tokens, self.width), np.float16)
        for row, text in enumerate(texts):
            if not 0 < len(text.split()) <= self.tokens:
                raise InputError(f"the text {text!r} is too long", "Shorten it.")
            for place, word in enumerate(text.split()):
                seed = int(hashlib.sha256(word.encode()).hexdigest()[:8], 16)
                tokens[row, place] = np.random.default_rng(seed).standard_normal(self.width)
        return Encoded(tokens, np.asarray([len(text.split()) for text in texts], np.int32))


@dataclasses.dataclass(frozen=True)
class Sentence:
    """A condition: the mean of a caption's tokens, and of `classes` the one-hot class."""

    classes: bool = False
    count: int = 0

    def bound(self, classes: int) -> "Sentence":
        return dataclasses.replace(self, count=classes if self.classes else 0)

    @property
    def spec(self):
        return jax.ShapeDtypeStruct((WIDTH + self.count,), jnp.float32)

    @property
    def inputs(self):
        shapes = {"text": ((TOKENS, WIDTH), jnp.float16), "text_length": ((), jnp.int32)}
        return {name: jax.ShapeDtypeStruct(*each) for name, each in shapes.items()}

    def encode(self, batch):
        lengths = jnp.maximum(batch["text_length"], 1)[:, None]
        mean = batch["text"].astype(jnp.float32).sum(1) / lengths
        return jnp.concatenate([mean, jax.nn.one_hot(batch["label"], self.count)], 1)

    def null(self, condition):
        return jnp.zeros_like(condition)

    def drop(self, condition, keys, rate):
        dropped = jax.vmap(jax.random.uniform)(keys) < rate
        return jnp.where(dropped[:, None], 0, condition)


class Captioned(ImageSet):
    """Images with captions: `caption` and the encoder's output in a batch."""

    def __init__(self, items, image_shape, class_names, captions):
        super().__init__(items, image_shape, class_names)
        self.cache("reading")
        self.text, self._captions, self._words = Spec(), captions, Words()

    def caption(self, indices) -> list[str]:
        return [self._captions[int(i)] for i in indices]

    def batch(self, indices):
        encoded = self._words(self.caption(indices))
        text = {"text": encoded.tokens, "text_length": encoded.lengths}
        return super().batch(indices) | text


@contextlib.contextmanager
def known(monkeypatch) -> typing.Iterator[Words]:
    """Configs know `Sentence`, and the encoder that they open is `Words`."""
    words = Words()
    opened = types.SimpleNamespace(open_encoder=lambda spec, tokens, field: words)
    monkeypatch.setattr(prompts, "encoders", opened)
    extend("condition", Sentence)
    try:
        yield words
    finally:
        Stage.__dataclass_fields__["condition"].metadata["kinds"].remove(Sentence)


def config_of(classes: bool = False, **sampling) -> Config:
    """Two stages that are conditioned on text."""
    config = tiny_config("images")
    for number in (1, 2):
        config = config.with_stage(number, condition=Sentence(classes))
    return dataclasses.replace(config, sampling=dataclasses.replace(config.sampling, **sampling))


def write_run(folder: Path, config: Config, text=TEXT, **captions) -> Path:
    """Checkpoints of random parameters that depend on the condition, and captions.json."""
    for number, stage in enumerate(config.stages, 1):
        leaves, tree = jax.tree.flatten(stage.build(3, 2).abstract)
        random = np.random.default_rng(number)
        params = [0.2 * random.standard_normal(x.shape).astype("f4") for x in leaves]
        checkpoints = store.Checkpoints(folder / f"stage{number}/checkpoints")
        about = {"stage": to_dict(config)[f"stage{number}"], "classes": ["a", "b"], "seed": 0}
        checkpoints.save_ema(1, tree.unflatten(params), about | ({"text": text} if text else {}))
        checkpoints.close()
    Workdir(folder).write_config(config)
    if captions:
        Captions(**captions).write(Workdir(folder).captions)
    return folder
