"""Layers of the U-Nets: blocks, attention, resampling and embeddings. NHWC; parameters float32, computation in `dtype`."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True)
class Initializer:
    """How a linear or convolutional layer is born: U(-b, b) for kernel and bias alike, b = sqrt(scale / fan_in)."""

    scale: float = 1.0

    def kernel(self, key: Array, shape: tuple[int, ...], dtype=jnp.float32) -> Array:
        """Draws a kernel, inputs before outputs in its shape."""
        return self._uniform(key, shape, math.prod(shape[:-1]), dtype)

    def bias(self, fan_in: int):
        """The function that draws the bias of a layer with so many inputs an output."""
        return lambda key, shape, dtype=jnp.float32: self._uniform(key, shape, fan_in, dtype)

    def _uniform(self, key, shape, fan_in, dtype):
        bound = math.sqrt(self.scale / fan_in)
        return jax.random.uniform(key, shape, dtype, -bound, bound) if bound else jnp.zeros(shape, dtype)


DEFAULT, ZERO = Initializer(1.0), Initializer(0.0)


def conv(c_in: int, c_out: int, kernel: int, *, init: Initializer = DEFAULT, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.Conv:
    """A kernel x kernel convolution that keeps the size."""
    bias_init = init.bias(c_in * kernel**2)
    return nnx.Conv(c_in, c_out, (kernel, kernel), kernel_init=init.kernel, bias_init=bias_init, dtype=dtype, rngs=rngs)


def linear(
    c_in: int, c_out: int, *, init: Initializer = DEFAULT, use_bias: bool = True, dtype: jnp.dtype, rngs: nnx.Rngs
) -> nnx.Linear:
    """A dense layer."""
    kwargs = {"kernel_init": init.kernel, "bias_init": init.bias(c_in), "use_bias": use_bias}
    return nnx.Linear(c_in, c_out, dtype=dtype, rngs=rngs, **kwargs)


def group_norm(channels: int, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.GroupNorm:
    """Group normalisation over min(32, channels // 4) groups; its statistics are float32 whatever `dtype` is."""
    groups = max(1, min(32, channels // 4))
    return nnx.GroupNorm(channels, num_groups=groups, epsilon=1e-5, dtype=dtype, rngs=rngs)


def downsample(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """Means of 2 x 2 pixels, which is resampling with the filter [1, 1]."""
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))


def upsample(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """Nearest-neighbour repetition, which is resampling with the filter [1, 1]."""
    return x.repeat(2, 1).repeat(2, 2)


RESAMPLE = {"down": downsample, "up": upsample, None: lambda x: x}


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


def positional_embedding(label: Float[Array, " b"], channels: int) -> Float[Array, "b c"]:
    """cos and sin of the label times frequencies 10000^(-i / (n / 2)), i < n / 2."""
    frequency = (1 / 10000) ** (jnp.arange(channels // 2) / (channels // 2))
    angle = label[:, None] * frequency[None, :]
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=1)


class Attention(nnx.Module):
    """Self-attention over all pixels; returns what is added to the block's output. Softmax in float32."""

    def __init__(self, channels: int, heads: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.heads = heads
        self.norm = group_norm(channels, dtype=dtype, rngs=rngs)
        self.qkv = conv(channels, 3 * channels, 1, dtype=dtype, rngs=rngs)
        self.proj = conv(channels, channels, 1, init=ZERO, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Attends over all pixels of each image."""
        b, h, w, c = x.shape
        # The projection's channels are read as (head, channel in head, [q, k, v]), as in the published weights.
        qkv = self.qkv(self.norm(x)).reshape(b, h * w, self.heads, c // self.heads, 3)
        attended = jax.nn.dot_product_attention(*jnp.moveaxis(qkv, -1, 0))
        return self.proj(attended.reshape(b, h, w, c))


class Block(nnx.Module):
    """A residual block of ADM: resample, two convolutions modulated by the embedding, and attention where `heads` > 0.

    Args:
      emb_channels: width of the embedding.
      heads: attention heads; 0 for none.
      resample: 'down', 'up' or None.
      dropout: rate, between the convolutions, active when `rngs` is given to the call.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        emb_channels: int,
        *,
        heads: int = 0,
        resample: str | None = None,
        dropout: float = 0.0,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        kwargs = {"dtype": dtype, "rngs": rngs}
        self.resample = resample
        self.norm0 = group_norm(c_in, **kwargs)
        self.conv0 = conv(c_in, c_out, 3, **kwargs)
        self.affine = linear(emb_channels, 2 * c_out, **kwargs)
        self.norm1 = group_norm(c_out, **kwargs)
        self.dropout = nnx.Dropout(dropout)
        self.conv1 = conv(c_out, c_out, 3, init=ZERO, **kwargs)
        self.skip = conv(c_in, c_out, 1, **kwargs) if c_in != c_out else None
        self.attention = Attention(c_out, heads, **kwargs) if heads else None

    def __call__(
        self, x: Float[Array, "b h w c"], emb: Float[Array, "b e"], rngs: nnx.Rngs | None = None
    ) -> Float[Array, "b h2 w2 c2"]:
        """Runs the block on x with the embedding of each image; `rngs` switches dropout on."""
        resample = RESAMPLE[self.resample]
        h = self.conv0(resample(nnx.silu(self.norm0(x))))
        scale, shift = jnp.split(self.affine(emb)[:, None, None, :], 2, axis=-1)
        h = nnx.silu(self.norm1(h) * (1 + scale) + shift)
        h = self.conv1(self.dropout(h, deterministic=rngs is None, rngs=rngs))
        x = resample(x)
        h = h + (x if self.skip is None else self.skip(x))
        return h if self.attention is None else h + self.attention(h)
