"""Layers of the U-Nets: blocks, attention, resampling and embeddings. NHWC; parameters and
embeddings float32, images `dtype`.

Whatever that is, sums over an image are float32, of statistics and in the backward pass.
"""

import contextlib
import contextvars
import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Key

CONVOLUTION = (
    "convolution"  # the name under which `jax.checkpoint` knows the outputs of convolutions
)


@dataclasses.dataclass(frozen=True)
class FanIn:
    """ADM's initialisation: U(-b, b) for kernel and bias alike, b = sqrt(scale / fan_in)."""

    scale: float = 1.0

    def kernel(self, key: Array, shape: tuple[int, ...], dtype=jnp.float32) -> Array:
        """Draws a kernel, inputs before outputs in its shape."""
        return self._uniform(key, shape, math.prod(shape[:-1]), dtype)

    def bias(self, fan_in: int):
        """The function that draws the bias of a layer with so many inputs an output."""
        return lambda key, shape, dtype=jnp.float32: self._uniform(key, shape, fan_in, dtype)

    def _uniform(self, key, shape, fan_in, dtype):
        bound = math.sqrt(self.scale / fan_in)
        return (
            jax.random.uniform(key, shape, dtype, -bound, bound)
            if bound
            else jnp.zeros(shape, dtype)
        )


@dataclasses.dataclass(frozen=True)
class Xavier:
    """DDPM++'s and NCSN++'s initialisation: U(-b, b) for the kernel, b = gain sqrt(6 / (fan_in +
    fan_out)), zero for the bias."""

    gain: float = 1.0

    def kernel(self, key: Array, shape: tuple[int, ...], dtype=jnp.float32) -> Array:
        """Draws a kernel, inputs before outputs in its shape."""
        return nnx.initializers.variance_scaling(self.gain**2, "fan_avg", "uniform")(
            key, shape, dtype
        )

    def bias(self, fan_in: int):
        """The function that makes a bias."""
        return nnx.initializers.zeros


@dataclasses.dataclass(frozen=True)
class Style:
    """What tells the blocks of the two families of networks apart.

    Attributes:
      init, init_last, init_qkv: of layers in general, of the last of each branch, and of
        attention's projection.
      epsilon: of group normalisation.
      scale_shift: the embedding scales and shifts what is normalised; otherwise it is added before
        that.
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
    """Flax's layer for NHWC images, with the bias added in float32: its gradient, a sum over all
    pixels, is then float32 too."""

    def __call__(
        self, x: Float[Array, "b h w c"], *, wide: bool = False
    ) -> Float[Array, "b h2 w2 c2"]:
        """Convolves x in the layer's dtype, in which the result is too; with `wide` it is
        float32."""
        x, kernel = x.astype(self.dtype), self.kernel[...].astype(self.dtype)
        padding, dtype = tuple(self.padding), jnp.dtype("float32") if wide else self.dtype
        y = (
            _convolved(x, kernel, padding)
            if dtype == self.dtype
            else _convolved_wide(x, kernel, padding)
        )
        return (y.astype(jnp.float32) + self.bias[...]).astype(dtype)


def _convolved(x: Array, kernel: Array, padding: tuple, dtype: jnp.dtype | None = None) -> Array:
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), padding, dimension_numbers=numbers, preferred_element_type=dtype
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _convolved_wide(x: Array, kernel: Array, padding: tuple) -> Array:
    """The sums of a convolution of narrow numbers as the accelerator has them, in float32.

    Its gradients are those of a narrow result: jax alone would compute them with float32 copies,
      or, in older versions, refuse.
    """
    return _convolved(x, kernel, padding, jnp.dtype("float32"))


def _wide_forward(x, kernel, padding):
    return _convolved_wide(x, kernel, padding), (x, kernel)


def _wide_backward(padding, inputs, gradient):
    _, backward = jax.vjp(lambda x, kernel: _convolved(x, kernel, padding), *inputs)
    return backward(gradient.astype(inputs[0].dtype))


_convolved_wide.defvjp(_wide_forward, _wide_backward)


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
    """A kernel x kernel convolution that keeps the size, or makes it `margin` larger on every
    side."""
    padding = [(kernel // 2 + margin,) * 2] * 2
    inits = {"kernel_init": init.kernel, "bias_init": init.bias(c_in * kernel**2)}
    return Conv(c_in, c_out, (kernel, kernel), padding=padding, dtype=dtype, rngs=rngs, **inits)


def linear(
    c_in: int, c_out: int, *, init: FanIn | Xavier, use_bias: bool = True, rngs: nnx.Rngs
) -> nnx.Linear:
    """A dense layer of an embedding: float32, whatever images are computed in, as it costs next to
    nothing."""
    kwargs = {"kernel_init": init.kernel, "bias_init": init.bias(c_in), "use_bias": use_bias}
    return nnx.Linear(c_in, c_out, dtype=jnp.dtype("float32"), rngs=rngs, **kwargs)


class GroupNorm(nnx.GroupNorm):
    """Flax's layer with images never reshaped into groups: moments of channels are averaged over
    groups instead.

    On TPUs the few channels of a group would be padded to 128, and the image copied there and back.
    """

    def __call__(
        self,
        x: Float[Array, "b h w c"],
        scale: Float[Array, "b c"] | None = None,
        shift: Float[Array, "b c"] | None = None,
    ) -> Float[Array, "b h w c"]:
        """Normalises x, then multiplies it by 1 + `scale` and adds `shift`, if they are given.

        All is float32 whatever x's dtype is, and rounded once, to the layer's.
        """
        wide = x.astype(jnp.float32)
        mean, square = (self._over_group(m) for m in (wide.mean((1, 2)), (wide**2).mean((1, 2))))
        factor = self.scale[...] * jax.lax.rsqrt(jnp.maximum(square - mean**2, 0) + self.epsilon)
        offset = self.bias[...] - mean * factor
        if (
            scale is not None and self.dtype != jnp.float32
        ):  # one multiply-add a value; the backward pass needs x alone
            factor, offset, scale = factor * (1 + scale), offset * (1 + scale) + shift, None
        normalised = wide * factor[:, None, None] + offset[:, None, None]
        if (
            scale is not None
        ):  # in float32 one after the other, so that old results come out again to the last bit
            normalised = normalised * (1 + scale[:, None, None]) + shift[:, None, None]
        return normalised.astype(self.dtype)

    def _over_group(self, moment: Float[Array, "b c"]) -> Float[Array, "b c"]:
        grouped = moment.reshape(len(moment), self.num_groups, -1)
        return jnp.broadcast_to(grouped.mean(2, keepdims=True), grouped.shape).reshape(moment.shape)


def group_norm(channels: int, *, epsilon: float, dtype: jnp.dtype, rngs: nnx.Rngs) -> GroupNorm:
    """Group normalisation over min(32, channels // 4) groups."""
    groups = max(1, min(32, channels // 4))
    return GroupNorm(channels, num_groups=groups, epsilon=epsilon, dtype=dtype, rngs=rngs)


def downsample(
    x: Float[Array, "b h w c"], taps: tuple[int, ...] = (1, 1), *, padded: bool = False
) -> Float[Array, "b h2 w2 c"]:
    """Filters and keeps every second pixel; `padded` tells that x has its margin of (len(taps) - 1)
    // 2 pixels already."""
    if taps == (1, 1):
        b, h, w, c = x.shape
        return x.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))
    for axis in (1, 2):
        x = x if padded else _pad(x, axis, (len(taps) - 1) // 2)
        last = x.shape[axis] - len(taps)
        slices = [jax.lax.slice_in_dim(x, k, k + last + 1, 2, axis) for k in range(len(taps))]
        x = sum(tap / sum(taps) * part for tap, part in zip(taps, slices, strict=True))
    return x


def upsample(
    x: Float[Array, "b h w c"], taps: tuple[int, ...] = (1, 1)
) -> Float[Array, "b h2 w2 c"]:
    """Puts a zero between any two pixels and filters, in a way that keeps a constant image as it
    is; the inverse size change of `downsample`. With the taps (1, 1) it is nearest-neighbour
    repetition.
    """
    if taps == (1, 1):
        return x.repeat(2, 1).repeat(2, 2)
    margin = (len(taps) - 1) // 2
    for axis in (1, 2):
        size, reach = x.shape[axis], len(taps) // 2
        wide = _pad(x, axis, reach)

        def phase(r, wide=wide, size=size, reach=reach, axis=axis):
            """The pixels 2 j + r of the result: those taps of which no zero comes under."""
            terms = [
                (tap, reach + (r + margin - k) // 2)
                for k, tap in enumerate(taps)
                if (r + margin - k) % 2 == 0
            ]
            parts = (
                2 * tap / sum(taps) * jax.lax.slice_in_dim(wide, i, i + size, 1, axis)
                for tap, i in terms
            )
            return sum(parts)

        shape = (*x.shape[:axis], 2 * size, *x.shape[axis + 1 :])
        x = jnp.stack([phase(0), phase(1)], axis + 1).reshape(shape)
    return x


def _pad(x: Float[Array, "b h w c"], axis: int, margin: int) -> Float[Array, "b h2 w2 c"]:
    """Zeros on both sides."""
    return jnp.pad(x, [(margin, margin) if i == axis else (0, 0) for i in range(x.ndim)])


RESAMPLE = {"down": downsample, "up": upsample, None: lambda x, taps: x}


def space_to_depth(x: Float[Array, "b h w c"], factor: int) -> Float[Array, "b h2 w2 c2"]:
    """Folds factor x factor pixels into the channels."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // factor, factor, w // factor, factor, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h // factor, w // factor, factor**2 * c)


def depth_to_space(x: Float[Array, "b h w c"], factor: int) -> Float[Array, "b h2 w2 c2"]:
    """The inverse of `space_to_depth`."""
    b, h, w, c = x.shape
    x = x.reshape(b, h, w, factor, factor, c // factor**2)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h * factor, w * factor, c // factor**2)


def positional_embedding(
    label: Float[Array, " b"], channels: int, *, last: bool = False
) -> Float[Array, "b c"]:
    """cos and sin of the label times frequencies 10000^(-i / (n / 2)), i < n / 2; with `last`,
    10000^(-i / (n / 2 - 1))."""
    half = channels // 2
    return fourier_embedding(label, (1 / 10000) ** (jnp.arange(half) / (half - last)))


def fourier_embedding(
    label: Float[Array, " b"], frequencies: Float[Array, " n"]
) -> Float[Array, "b c"]:
    """cos and sin of the label times each (angular) frequency."""
    angle = label[:, None] * frequencies[None, :]
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=1)


def named(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Marks the output of a convolution, or of attention, as one that rematerialisation may keep
    (`unet.REMAT`)."""
    return checkpoint_name(x, CONVOLUTION)


_target: contextvars.ContextVar[Any] = contextvars.ContextVar("target", default=None)


@contextlib.contextmanager
def compiling_for(device: Any) -> Iterator[None]:
    """What is traced within is for this `jax.Device`, perhaps of a topology, and not for one that
    jax finds here."""
    token = _target.set(device)
    try:
        yield
    finally:
        _target.reset(token)


def attend(
    q: Float[Array, "b n k d"], k: Float[Array, "b n k d"], v: Float[Array, "b n k d"]
) -> Float[Array, "b n k d"]:
    """softmax(q k^T / sqrt(d)) v for each of k heads: cuDNN's fused kernel where it applies, else
    XLA's, softmax in float32."""
    fused = (
        _knows_fused_attention()
        and q.dtype != jnp.float32
        and q.shape[-1] % 8 == 0
        and q.shape[-1] <= 128
    )
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn" if fused else "xla")


def _knows_fused_attention() -> bool:
    """NVIDIA's from Ampere on."""
    device = _target.get() or jax.local_devices()[0]
    capability = getattr(device, "compute_capability", "") if device.platform == "gpu" else ""
    return capability[:1].isdecimal() and float(capability) >= 8


def dropout(
    x: Float[Array, "b h w c"], rate: float, keys: Key[Array, " b"] | None
) -> Float[Array, "b h w c"]:
    """Zeroes a share of the values, each image's by its own key, so that the batch can be cut in
    any way; without keys, none."""
    if keys is None or not rate:
        return x
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:]))(keys)
    return jnp.where(keep, x / (1 - rate), 0)


class Attention(nnx.Module):
    """Self-attention over all pixels; returns what is added to the block's output. Softmax in
    float32."""

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
        # The projection's channels are read as (head, channel in head, [q, k, v]), as in the
        # published weights.
        qkv = named(self.qkv(self.norm(x))).reshape(b, h * w, self.heads, c // self.heads, 3)
        attended = named(attend(*jnp.moveaxis(qkv, -1, 0)))
        return named(self.proj(attended.reshape(b, h, w, c)))


class Block(nnx.Module):
    """A residual block: resample, two convolutions modulated by the embedding, and attention where
    `heads` > 0.

    Args:
      emb_channels: width of the embedding.
      style: of the family of networks.
      heads: attention heads; 0 for none.
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
        resample: str | None = None,
        dropout: float = 0.0,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        kwargs = {"dtype": dtype, "rngs": rngs}
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

    def __call__(
        self,
        x: Float[Array, "b h w c"],
        emb: Float[Array, "b e"],
        keys: Key[Array, " b"] | None = None,
    ) -> Float[Array, "b h2 w2 c2"]:
        """Runs the block on x with the embedding of each image; a key for each image switches
        dropout on."""
        resample = functools.partial(RESAMPLE[self.resample], taps=self.style.filter)
        h = named(self.conv0(resample(nnx.silu(self.norm0(x)))))
        h = named(self.conv1(dropout(nnx.silu(self._modulated(h, emb)), self.dropout, keys)))
        x = resample(x)
        h = (h + (x if self.skip is None else named(self.skip(x)))) * self.style.skip_scale
        return h if self.attention is None else (h + self.attention(h)) * self.style.skip_scale

    def _modulated(
        self, h: Float[Array, "b h w c"], emb: Float[Array, "b e"]
    ) -> Float[Array, "b h w c"]:
        embedded = self.affine(emb)
        if not self.style.scale_shift:
            return self.norm1(h + embedded[:, None, None, :])  # in float32
        return self.norm1(h, *jnp.split(embedded, 2, axis=-1))
