"""Layers of the U-Nets: blocks, attention and embeddings. NHWC.

Parameters and embeddings are float32, images `dtype`. Sums over an image, of statistics and in the
backward pass, are always float32.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Key, UInt32

from rdm_jax.models import convolution, resampling
from rdm_jax.models.attention import (
    Context,
    attend,
    attend_on_tpu,
    contiguous,
    kernel_on_tpu,
)
from rdm_jax.models.initializers import FanIn, Xavier
from rdm_jax.models.tpu_attention_kernels import HeadGroups

# The name of the outputs of convolutions in policies of `jax.checkpoint`.
CONVOLUTION = "convolution"


@dataclasses.dataclass(frozen=True)
class Style:
    """The differences between the blocks of the two families of networks.

    Attributes:
      init, init_last, init_qkv: of layers in general, of the last of each branch, and of
        attention's projection.
      epsilon: of group normalisation.
      scale_shift: the embedding scales and shifts the normalised values; otherwise it is added
        before normalisation.
      skip_scale: factor of every sum of a branch and its skip.
      project_resampled: the skip of a block that resamples has a 1x1 kernel also where the channels
        stay the same.
      filter: taps of the resampling filter, of even number.
    """

    init: FanIn | Xavier
    init_last: FanIn | Xavier
    init_qkv: FanIn | Xavier
    epsilon: float
    scale_shift: bool
    skip_scale: float
    project_resampled: bool
    filter: tuple[int, ...] = (1, 1)


class Conv(nnx.Conv):
    """Flax's layer for NHWC images, with a float32 bias.

    The gradient of the bias, a sum over all pixels, is then float32 too.
    """

    def __call__(  # type: ignore[override]
        self,
        x: Float[Array, "b h w c"],
        *,
        wide: bool = False,
        enlarge: bool = False,
        columns: Callable[[Array], Array] = lambda x: x,
        rows: Callable[[Array], Array] = lambda x: x,
    ) -> Float[Array, "b h2 w2 c2"]:
        """Convolves x in the layer's dtype; the result has it too, or float32 with `wide`.

        Args:
          x: images.
          wide: whether the result is float32.
          enlarge: repeats each pixel to 2x2 before a 3x3 convolution.
          columns: puts the output channels, the last axis of kernel and bias, into another order.
          rows: puts the kernel's input channels, its last axis but one, into that of x.
        """
        assert self.bias is not None
        x, kernel = x.astype(self.dtype), rows(columns(self.kernel[...].astype(self.dtype)))
        bias = columns(self.bias[...])
        margins: Any = self.padding
        padding = tuple(margins)
        if enlarge and self.dtype == jnp.bfloat16:
            return convolution.enlarge_and_convolve(x, kernel, bias)
        x = resampling.upsample(x) if enlarge else x
        return convolution.convolve(x, kernel, bias, padding, wide=wide)


def conv(
    c_in: int,
    c_out: int,
    kernel: int,
    *,
    init: FanIn | Xavier,
    margin: int = 0,
    dtype: jnp.dtype,
    rngs: nnx.Rngs,
) -> Conv:
    """A kernel x kernel convolution that keeps the size, or adds `margin` pixels on every side."""
    return Conv(
        c_in,
        c_out,
        (kernel, kernel),
        padding=[(kernel // 2 + margin,) * 2] * 2,
        dtype=dtype,
        kernel_init=init.kernel,
        bias_init=init.bias(c_in * kernel**2),
        rngs=rngs,
    )


def linear(
    c_in: int, c_out: int, *, init: FanIn | Xavier, use_bias: bool = True, rngs: nnx.Rngs
) -> nnx.Linear:
    """A dense layer of an embedding: always float32, which costs next to nothing."""
    return nnx.Linear(
        c_in,
        c_out,
        use_bias=use_bias,
        dtype=jnp.dtype("float32"),
        kernel_init=init.kernel,
        bias_init=init.bias(c_in),
        rngs=rngs,
    )


class GroupNorm(nnx.GroupNorm):
    """Flax's layer without reshaping images into groups: moments are averaged over groups instead.

    On TPUs the few channels of a group would be padded to 128, and the image copied back and forth.
    """

    def __call__(  # type: ignore[override]
        self,
        x: Float[Array, "b h w c"],
        scale: Float[Array, "b c"] | None = None,
        shift: Float[Array, "b c"] | None = None,
    ) -> Float[Array, "b h w c"]:
        """Normalises x, then multiplies it by 1 + `scale` and adds `shift`, if any.

        The computation is float32 for any dtype of x, and rounded once, to the layer's dtype.
        """
        assert self.scale is not None and self.bias is not None
        assert (scale is None) == (shift is None)
        wide = x.astype(jnp.float32)
        mean, square = (self._over_group(m) for m in (wide.mean((1, 2)), (wide**2).mean((1, 2))))
        factor = self.scale[...] * jax.lax.rsqrt(jnp.maximum(square - mean**2, 0) + self.epsilon)
        offset = self.bias[...] - mean * factor
        if scale is not None and shift is not None and self.dtype != jnp.float32:
            # One multiply-add per value; the backward pass needs x alone.
            factor = factor * (1 + scale)
            offset = offset * (1 + scale) + shift
            scale = None
        normalised = wide * factor[:, None, None] + offset[:, None, None]
        if scale is not None and shift is not None:
            # In float32 one after the other, which keeps earlier results to the last bit.
            normalised = normalised * (1 + scale[:, None, None]) + shift[:, None, None]
        return normalised.astype(self.dtype)

    def _over_group(self, moment: Float[Array, "b c"]) -> Float[Array, "b c"]:
        grouped = moment.reshape(len(moment), self.num_groups, -1)
        return jnp.broadcast_to(grouped.mean(2, keepdims=True), grouped.shape).reshape(moment.shape)


def group_norm(channels: int, *, epsilon: float, dtype: jnp.dtype, rngs: nnx.Rngs) -> GroupNorm:
    """Group normalisation over min(32, channels // 4) groups."""
    groups = max(1, min(32, channels // 4))
    return GroupNorm(channels, num_groups=groups, epsilon=epsilon, dtype=dtype, rngs=rngs)


def positional_embedding(
    label: Float[Array, " b"], channels: int, *, last: bool = False
) -> Float[Array, "b c"]:
    """cos and sin of the label times 10000^(-i / h), i < h = n / 2; h - 1 for h with `last`."""
    half = channels // 2
    return fourier_embedding(label, (1 / 10000) ** (jnp.arange(half) / (half - last)))


def fourier_embedding(
    label: Float[Array, " b"], frequencies: Float[Array, " n"]
) -> Float[Array, "b c"]:
    """cos and sin of the label times each (angular) frequency."""
    angle = label[:, None] * frequencies[None, :]
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=1)


def named(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Marks an output of a convolution or of attention that remat may keep (`unet.REMAT`)."""
    return checkpoint_name(x, CONVOLUTION)


def dropout(
    x: Float[Array, "b h w c"], rate: float, keys: Key[Array, " b"] | None
) -> Float[Array, "b h w c"]:
    """Zeroes a share of the values, of each image by its own key; without keys, none."""
    if keys is None or not rate:
        return x
    threshold = jnp.uint32(round(rate * 2**32))
    keep = _hashed(x.shape, jax.random.key_data(keys)) >= threshold
    return jnp.where(keep, x / (1 - rate), 0)


def _hashed(shape: tuple[int, ...], words: UInt32[Array, "b 2"]) -> UInt32[Array, "b h w c"]:
    """A random 32-bit word for each value, a hash of its index in the image and the image's key.

    A dropout mask needs no more than that, and is drawn up to three times per step, inside of the
    convolutions that use it. Threefry takes some hundred operations per word, this one ten.
    Multiplications and shifts alternate as in MurmurHash3's last step; the constants are odd.
    """
    index = jnp.zeros(shape[1:], jnp.uint32)
    for axis, stride in enumerate((shape[2] * shape[3], shape[3], 1)):
        index += jax.lax.broadcasted_iota(jnp.uint32, shape[1:], axis) * jnp.uint32(stride)
    first, second = (words[:, i, None, None, None] for i in (0, 1))
    x = index * jnp.uint32(0x9E3779B9) + first
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B) ^ second
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


class Attention(nnx.Module):
    """Self-attention over all pixels; returns the residual. Softmax in float32."""

    def __init__(
        self, channels: int, heads: int, style: Style, *, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        self.heads = heads
        self.norm = group_norm(channels, epsilon=style.epsilon, dtype=dtype, rngs=rngs)
        self.qkv = conv(channels, 3 * channels, 1, init=style.init_qkv, dtype=dtype, rngs=rngs)
        self.proj = conv(channels, channels, 1, init=style.init_last, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Attends over all pixels of each image."""
        b, h, w, c = x.shape
        heads = HeadGroups(self.heads, c // self.heads)
        # The projection's channels are (head, channel in head, [q, k, v]), as in the published
        # weights. In bfloat16 its weights are put into the order that attention reads, which costs
        # less than to gather q, k and v from its results.
        if kernel_on_tpu(self.qkv.dtype, h * w, heads):
            qkv = named(self.qkv(self.norm(x), columns=heads.columns))
            attended = named(attend_on_tpu(qkv.reshape(b, h * w, -1), heads))
            return named(self.proj(attended.reshape(b, h, w, -1), rows=heads.rows))
        if self.qkv.dtype == jnp.bfloat16:
            order = functools.partial(contiguous, heads=self.heads)
            qkv = named(self.qkv(self.norm(x), columns=order))
            q, k, v = (a.reshape(b, h * w, self.heads, -1) for a in jnp.split(qkv, 3, axis=-1))
        else:
            qkv = named(self.qkv(self.norm(x)))
            q, k, v = jnp.moveaxis(qkv.reshape(b, h * w, self.heads, -1, 3), -1, 0)
        return named(self.proj(named(attend(q, k, v)).reshape(b, h, w, c)))


class CrossAttention(nnx.Module):
    """Attention of all pixels to other tokens, of `width`; returns the residual."""

    def __init__(
        self,
        channels: int,
        heads: int,
        width: int,
        style: Style,
        *,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.heads = heads
        self.norm = group_norm(channels, epsilon=style.epsilon, dtype=dtype, rngs=rngs)
        self.q = conv(channels, channels, 1, init=style.init_qkv, dtype=dtype, rngs=rngs)
        self.kv = conv(width, 2 * channels, 1, init=style.init_qkv, dtype=dtype, rngs=rngs)
        self.proj = conv(channels, channels, 1, init=style.init_last, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"], context: Context) -> Float[Array, "b h w c"]:
        """Attends over each image's tokens."""
        b, h, w, c = x.shape
        q = named(self.q(self.norm(x))).reshape(b, h * w, self.heads, -1)
        keys_values = named(self.kv(context.tokens[:, :, None]))
        k, v = (
            a.reshape(b, -1, self.heads, c // self.heads)
            for a in jnp.split(keys_values, 2, axis=-1)
        )
        attended = named(attend(q, k, v, context.lengths))
        return named(self.proj(attended.reshape(b, h, w, c)))


class Block(nnx.Module):
    """A residual block: resampling, two convolutions modulated by the embedding, and attention.

    Args:
      emb_channels: width of the embedding.
      style: of the family of networks.
      heads: attention heads; 0 for none.
      context: width of the tokens that a block with heads attends to besides; 0 for none.
      resample: 'down', 'up' or None.
      dropout: rate, between the convolutions, active when keys are given to the call.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        emb_channels: int,
        style: Style,
        *,
        heads: int = 0,
        context: int = 0,
        resample: str | None = None,
        dropout: float = 0.0,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        kwargs: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        self.style, self.resample = style, resample
        self.norm0 = group_norm(c_in, epsilon=style.epsilon, **kwargs)
        self.conv0 = conv(c_in, c_out, 3, init=style.init, **kwargs)
        self.affine = linear(
            emb_channels, c_out * (2 if style.scale_shift else 1), init=style.init, rngs=rngs
        )
        self.norm1 = group_norm(c_out, epsilon=style.epsilon, **kwargs)
        self.dropout = dropout
        self.conv1 = conv(c_out, c_out, 3, init=style.init_last, **kwargs)
        projected = c_in != c_out or (style.project_resampled and resample is not None)
        self.skip = conv(c_in, c_out, 1, init=style.init, **kwargs) if projected else None
        self.attention = Attention(c_out, heads, style, **kwargs) if heads else None
        attends = heads and context
        self.cross = CrossAttention(c_out, heads, context, style, **kwargs) if attends else None

    def __call__(
        self,
        x: Float[Array, "b h w c"],
        emb: Float[Array, "b e"],
        keys: Key[Array, " b"] | None = None,
        context: Context | None = None,
    ) -> Float[Array, "b h2 w2 c2"]:
        """Runs the block on x with each image's embedding; keys, one per image, enable dropout.

        A block with a `context` attends to that.
        """
        resample = functools.partial(resampling.RESAMPLE[self.resample], taps=self.style.filter)
        h = nnx.silu(self.norm0(x))
        if self.resample == "up" and self.style.filter == (1, 1):
            h = named(self.conv0(h, enlarge=True))
        else:
            h = named(self.conv0(resample(h)))
        h = named(self.conv1(dropout(nnx.silu(self._modulated(h, emb)), self.dropout, keys)))
        x = resample(x)
        h = (h + (x if self.skip is None else named(self.skip(x)))) * self.style.skip_scale
        if self.attention is None:
            return h
        total = h + self.attention(h)
        if self.cross is not None and context is not None:
            total = total + self.cross(h, context)
        return total * self.style.skip_scale

    def _modulated(
        self, h: Float[Array, "b h w c"], emb: Float[Array, "b e"]
    ) -> Float[Array, "b h w c"]:
        embedded = self.affine(emb)
        if not self.style.scale_shift:
            return self.norm1(h + embedded[:, None, None, :])  # in float32
        return self.norm1(h, *jnp.split(embedded, 2, axis=-1))
