"""Blocks on pixels, before and after the transformer's blocks on tokens."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from rdm_jax.models import layers
from rdm_jax.models.initializers import Xavier
from rdm_jax.models.transformer_layers import ZERO, RMSNorm, dense, gated, open_gates


class PixelBlock(nnx.Module):
    """Two layers on pixels, normalised, modulated and gated (adaLN-zero)."""

    def __init__(
        self,
        channels: int,
        conditions: int,
        kernel: int,
        *,
        gate: float = 0.0,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        kwargs: dict[str, Any] = {"init": Xavier(), "dtype": dtype, "rngs": rngs}
        self.norm = RMSNorm(channels, dtype=dtype, rngs=rngs)
        self.modulation = dense(
            conditions, 3 * channels, init=ZERO, bias=open_gates(1, gate), dtype=dtype, rngs=rngs
        )
        self.layer0 = layers.conv(channels, 2 * channels, kernel, **kwargs)
        self.layer1 = layers.conv(2 * channels, channels, kernel, **kwargs)

    def __call__(
        self, x: Float[Array, "b h w c"], condition: Float[Array, "b *n k"]
    ) -> Float[Array, "b h w c"]:
        """Runs the block; the condition is of each image, or of each pixel."""
        shift, scale, gate = jnp.split(self.modulation(condition), 3, axis=-1)
        return gated(x, gate, self.layer1(nnx.silu(self.layer0(self.norm(x, scale, shift)))))


class Pixels(nnx.Module):
    """What works on pixels: a stem before the transformer, and a head after it.

    Args:
      c_in, c_out: channels of the network's input and output.
      channels: of the features of a pixel.
      conditions: width of the embedding.
      stem_blocks, head_blocks: numbers of blocks.
      head_kernel: of the head's blocks; the stem's is 3.
      gate: first value of all blocks' gates.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        *,
        channels: int,
        conditions: int,
        stem_blocks: int,
        head_blocks: int,
        head_kernel: int,
        gate: float = 0.0,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        kwargs: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        self.stem_blocks, self.head_blocks = stem_blocks, head_blocks
        kernel = 3 if stem_blocks else head_kernel
        self.first = layers.conv(c_in, channels, kernel, init=Xavier(), **kwargs)
        for i in range(stem_blocks):
            setattr(self, f"stem{i}", PixelBlock(channels, conditions, 3, gate=gate, **kwargs))
        for i in range(head_blocks):
            block = PixelBlock(channels, channels, head_kernel, gate=gate, **kwargs)
            setattr(self, f"head{i}", block)
        self.norm = RMSNorm(channels, **kwargs)
        self.last = layers.conv(channels, c_out, head_kernel, init=Xavier(0.0), **kwargs)

    def before(
        self, x: Float[Array, "b h w c"], emb: Float[Array, "b e"]
    ) -> Float[Array, "b h w k"]:
        """The pixels' features, of the stem."""
        x = self.first(x)
        for i in range(self.stem_blocks):
            x = getattr(self, f"stem{i}")(x, emb)
        return x

    def after(
        self, x: Float[Array, "b h w k"], tokens: Float[Array, "b h w k"] | None = None
    ) -> Float[Array, "b h w c"]:
        """The image, float32, from the pixels' features.

        Args:
          x: the output of `before`.
          tokens: what the transformer adds to each pixel's features; they also modulate the head.
        """
        if tokens is not None:
            condition = nnx.silu(tokens)
            x = x + tokens
            for i in range(self.head_blocks):
                x = getattr(self, f"head{i}")(x, condition)
        return self.last(self.norm(x), wide=True)
