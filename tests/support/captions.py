"""Conditions with captions, small networks that take them, and small sets that have them."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from rdm_jax.data.image_sets import ImageSet
from rdm_jax.models.adm import ADM
from rdm_jax.models.backbone import Shapes
from rdm_jax.models.conditions import Text
from rdm_jax.models.functional import functional
from rdm_jax.models.song import Song
from rdm_jax.models.transformer import JiT

TOKENS, WIDTH, CLASSES, CHANNELS = 5, 12, 3, 2
TEXT = Text(tokens=TOKENS, width=WIDTH).bound(0)
TEXT_AND_CLASSES = Text(tokens=TOKENS, width=WIDTH, classes=True).bound(CLASSES)

_JIT = JiT(patch=2, hidden=32, depth=2, heads=2, bottleneck=8, class_tokens=3, class_tokens_from=1)
_UNET = {"channels": 16, "channel_mult": (1, 2), "blocks": 1, "attention_levels": (1,)}
NETWORKS = {
    "context": _JIT,
    "cross": JiT(**{**vars(_JIT), "text": "cross"}),
    "adm": ADM(**_UNET, head_channels=16, emb_mult=2, dropout=0.0),
    "song": Song(**_UNET, emb_mult=2, dropout=0.0),
}


def text_network(config, condition=TEXT):
    shapes = Shapes(CHANNELS, CHANNELS, condition.spec)
    return functional(lambda rngs: config.build(shapes, rngs=rngs))


def text_batch(lengths, labels=None, seed=0):
    """'text', 'text_length' and 'label' of a batch."""
    rng, lengths = np.random.default_rng(seed), np.asarray(lengths, np.int32)
    text = rng.standard_normal((len(lengths), TOKENS, WIDTH))
    text *= (np.arange(TOKENS) < lengths[:, None])[:, :, None]
    labels = np.full(len(lengths), -1) if labels is None else labels
    return {
        "text": jnp.asarray(text, jnp.float16),
        "text_length": jnp.asarray(lengths),
        "label": jnp.asarray(labels, jnp.int32),
    }


def images(batch, seed=0):
    """Images and noise labels."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((batch, 4, 8, CHANNELS))
    return jnp.asarray(x, jnp.float32), jnp.asarray(rng.standard_normal(batch), jnp.float32)


class TextSpec(NamedTuple):
    """What an image set says of its captions."""

    encoder: str = "words"
    weights_hash: str = "0123"
    tokens: int = TOKENS
    width: int = WIDTH


class CaptionedSet(ImageSet):
    """Flat images of 4x4 pixels: black ones with one caption, white ones with another."""

    def batch(self, indices, *, text=False):
        """As that of the package."""
        batch, kinds = super().batch(indices), np.asarray(indices) % 2
        if not text:
            return batch
        made = text_batch([2, 3])
        return batch | {name: np.asarray(made[name])[kinds] for name in ("text", "text_length")}


SPEC = TextSpec()


def captioned_set(text=SPEC, count=24) -> CaptionedSet:
    """Such a set in memory, of two classes that say nothing about the images."""
    items = [(np.full((4, 4, 3), 255 * (i % 2), np.uint8), i // 2 % 2) for i in range(count)]
    images = CaptionedSet(items, (4, 4, 3), ("a", "b"))
    images.cache("decoding")
    images.text = text
    return images
