"""The distinct blocks of a config's networks, for their modelled time on a TPU."""

import collections
import dataclasses
from typing import Any, Protocol

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from rdm_jax import config as configs
from rdm_jax.models import layers, transformer_layers
from rdm_jax.models.backbone import Shapes
from rdm_jax.models.positions import Rotary
from rdm_jax.models.transformer import JiT
from rdm_jax.runtime.random_streams import root_key


class Block(Protocol):
    """What tells a block of a network from another: it is hashable, and its text names it.

    Attributes:
      emb: channels of the embedding.
    """

    emb: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of its input for one image."""

    @property
    def shape_out(self) -> tuple[int, ...]:
        """Of its output for one image."""

    def build(self, dtype: jnp.dtype) -> nnx.Module:
        """The module."""

    def run(self, module: Any, x: Array, emb: Array, keys: Array | None) -> Array:
        """Its output for a batch; keys enable dropout."""


@dataclasses.dataclass(frozen=True)
class UNetBlock:
    """A block of a U-Net.

    Attributes:
      c_in, c_out: channels.
      side: height and width of its input.
      heads: of attention; 0 for none.
      resample: 'up', 'down' or None.
      emb: channels of the embedding.
      dropout: rate.
      style: of the family.
    """

    c_in: int
    c_out: int
    side: int
    heads: int
    resample: str | None
    emb: int
    dropout: float
    style: layers.Style

    @property
    def side_out(self) -> int:
        """Height and width of its output."""
        return {"up": 2 * self.side, "down": self.side // 2, None: self.side}[self.resample]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of its input."""
        return (self.side, self.side, self.c_in)

    @property
    def shape_out(self) -> tuple[int, ...]:
        """Of its output."""
        return (self.side_out, self.side_out, self.c_out)

    def __str__(self) -> str:
        parts = [f"{self.c_in}->{self.c_out} {self.side} x {self.side}"]
        parts += [self.resample] if self.resample else []
        parts += [f"{self.heads} heads"] if self.heads else []
        return " ".join(parts)

    def build(self, dtype: jnp.dtype) -> layers.Block:
        """The module."""
        return layers.Block(
            self.c_in,
            self.c_out,
            self.emb,
            self.style,
            heads=self.heads,
            resample=self.resample,
            dropout=self.dropout,
            dtype=dtype,
            rngs=nnx.Rngs(root_key(0)),
        )

    def run(self, module: Any, x: Array, emb: Array, keys: Array | None) -> Array:
        """Its output for a batch."""
        return module(x, emb, keys)


@dataclasses.dataclass(frozen=True)
class TokenBlock:
    """A block of a transformer.

    Attributes:
      height, width: of the grid of tokens.
      before: tokens of the class before them.
      channels, heads, mlp_width, dropout: as in `transformer_layers.Block`.
    """

    height: int
    width: int
    before: int
    channels: int
    heads: int
    mlp_width: int
    dropout: float

    @property
    def emb(self) -> int:
        """Channels of the embedding."""
        return self.channels

    @property
    def shape(self) -> tuple[int, ...]:
        """Of its input."""
        return (self.height * self.width + self.before, self.channels)

    shape_out = shape

    def __str__(self) -> str:
        tokens = f"{self.height * self.width}" + (f" + {self.before}" if self.before else "")
        return f"{self.channels}, {tokens} tokens, {self.heads} heads"

    def build(self, dtype: jnp.dtype) -> transformer_layers.Block:
        """The module."""
        return transformer_layers.Block(
            self.channels,
            self.heads,
            self.mlp_width,
            dropout=self.dropout,
            dtype=dtype,
            rngs=nnx.Rngs(root_key(0)),
        )

    def run(self, module: Any, x: Array, emb: Array, keys: Array | None) -> Array:
        """Its output for a batch."""
        width = self.channels // self.heads
        return module(x, emb, Rotary.of(self.height, self.width, width, before=self.before), keys)


def of_stage(stage: configs.Stage, channels: int, classes: int) -> dict[Block, int]:
    """The distinct blocks of a stage's network, in the order in which they run, and how often."""
    if isinstance(stage.network, JiT):
        found = _of_transformer(stage.network, stage.resolution)
    else:
        found = _of_unet(stage, channels, classes)
    return dict(collections.Counter(found))


def _of_transformer(config: JiT, resolution: tuple[int, int]) -> list[Block]:
    height, width = (side // config.patch for side in resolution)
    middle = range(config.depth // 4, config.depth // 4 * 3)
    return [
        TokenBlock(
            height,
            width,
            config.class_tokens if i >= config.class_tokens_from else 0,
            config.hidden,
            config.heads,
            config.mlp_width,
            config.dropout if i in middle else 0.0,
        )
        for i in range(config.depth)
    ]


def _of_unet(stage: configs.Stage, channels: int, classes: int) -> list[Block]:
    config: Any = stage.network
    shapes = Shapes(channels, channels, stage.condition_for(classes).spec)
    network: Any = nnx.eval_shape(lambda: config.build(shapes, rngs=nnx.Rngs(root_key(0))))
    side = stage.resolution[0] // config.patch
    found: list[Block] = []
    for name in (*network.encoder, *network.decoder):
        module = getattr(network, name)
        block = UNetBlock(
            c_in=module.conv0.in_features,
            c_out=module.conv0.out_features,
            side=side,
            heads=module.attention.heads if module.attention else 0,
            resample=module.resample,
            emb=config.emb_mult * config.channels,
            dropout=config.dropout,
            style=network.style,
        )
        side = block.side_out
        found.append(block)
    return found
