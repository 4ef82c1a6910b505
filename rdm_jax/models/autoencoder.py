"""The autoencoder of latent diffusion (arXiv 2112.10752), as diffusers' AutoencoderKL has it. NHWC.

An encoder gives the mean and the log-variance of a Gaussian over latents, and a decoder makes
images of them. Published files: `rdm_jax.interop.autoencoder_files`.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from rdm_jax.models import layers
from rdm_jax.models.attention import attend
from rdm_jax.models.functional import Parts, split
from rdm_jax.models.initializers import FanIn
from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.fields import all_positive, at_least, one_of, positive

EPSILON = 1e-6  # of group normalisation
LOG_VARIANCES = (-30.0, 20.0)  # their range
# Largest number of attention's weights of an image that are held at a time: 64 MiB in float32.
MOST_WEIGHTS = 2**24


class Moments(NamedTuple):
    """A Gaussian over latents, independent in every value."""

    mean: Float[Array, "b h w c"]
    log_variance: Float[Array, "b h w c"]

    def sample(self, noise: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """A latent from unit noise."""
        return self.mean + jnp.exp(self.log_variance / 2) * noise


@dataclasses.dataclass(frozen=True)
class AutoencoderKL:
    """Size and options of an autoencoder.

    Attributes:
      channels: of the images.
      latent_channels: of the latents.
      widths: of each level; each but the first has half the resolution of the one before.
      blocks: residual blocks per level of the encoder; the decoder has one more.
      groups: of normalisation; they divide the widths.
      quantize: 1x1 convolutions behind the encoder and before the decoder, which newer published
        models leave out.
      scale, shift: diffusion works on (latent - shift) scale.
      dtype: 'float32' or 'bfloat16', of the computation. Parameters, statistics of normalisation,
        attention's softmax, and the outputs are always float32.
    """

    channels: int = at_least(1, default=3)
    latent_channels: int = at_least(1, default=4)
    widths: tuple[int, ...] = all_positive(default=(128, 256, 512, 512))
    blocks: int = at_least(1, default=2)
    groups: int = at_least(1, default=32)
    quantize: bool = True
    scale: float = positive(default=0.18215)
    shift: float = 0.0
    dtype: str = one_of("float32", "bfloat16", default="float32")

    @property
    def factor(self) -> int:
        """Factor by which a latent is smaller than its image, in height and in width."""
        return 2 ** (len(self.widths) - 1)

    def check(self, path: str) -> None:
        """The widths must divide into groups. Raises InputError; `path` names the autoencoder."""
        for width in self.widths:
            if width % self.groups:
                raise InputError(
                    f"{path}.groups={self.groups} does not divide the width {width}",
                    "Use a divisor of all widths.",
                )

    def check_images(self, height: int, width: int, channels: int, field: str) -> None:
        """Refuses images that it has no latents for. Raises InputError; `field` names them."""
        if channels != self.channels:
            raise InputError(
                f"{field}, of images of {channels} channels, does not fit the autoencoder",
                f"Use images of {self.channels} channels, or another autoencoder.",
            )
        if height % self.factor or width % self.factor:
            raise InputError(
                f"{field}, of {height} x {width} pixels, does not divide into latents",
                f"Use a height and width divisible by {self.factor} (the autoencoder's factor).",
            )

    def build(self) -> "Autoencoder":
        """The autoencoder as pure functions."""
        return Autoencoder(self, split(lambda rngs: _Network(self, rngs)))


class Autoencoder(NamedTuple):
    """An autoencoder as pure functions.

    Attributes:
      config: its sizes.
      parts: its parameters' shapes, and what draws them.
    """

    config: AutoencoderKL
    parts: Parts

    def encode(self, params: Any, images: Float[Array, "b h w c"]) -> Moments:
        """The Gaussians over the latents of images in [-1, 1]; float32."""
        mean, log_variance = jnp.split(self.parts.merge(params).encode(images), 2, axis=-1)
        return Moments(mean, jnp.clip(log_variance, *LOG_VARIANCES))

    def decode(self, params: Any, latents: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        """The images of latents, in about [-1, 1]; float32."""
        return self.parts.merge(params).decode(latents)


class _Network(nnx.Module):
    """Both halves, with the 1x1 convolutions between them."""

    def __init__(self, config: AutoencoderKL, rngs: nnx.Rngs):
        dtype, latent = jnp.dtype(config.dtype), config.latent_channels
        self.encoder, self.decoder = _Encoder(config, rngs), _Decoder(config, rngs)
        self.quantize = config.quantize
        if config.quantize:
            self.quant = _conv(2 * latent, 2 * latent, 1, dtype, rngs)
            self.post_quant = _conv(latent, latent, 1, dtype, rngs)

    def encode(self, x: Array) -> Array:
        x = self.encoder(x)
        return self.quant(x, wide=True) if self.quantize else x

    def decode(self, z: Array) -> Array:
        return self.decoder(self.post_quant(z) if self.quantize else z)


class _Half(nnx.Module):
    """Parts that run one after the other, between a stem and an output."""

    order: tuple[str, ...] = ()

    def _add(self, name: str, part: nnx.Module) -> None:
        setattr(self, name, part)
        self.order = (*self.order, name)


class _Encoder(_Half):
    """Images to 2 c channels, the means of the latents and their log-variances."""

    def __init__(self, config: AutoencoderKL, rngs: nnx.Rngs):
        dtype, widths = jnp.dtype(config.dtype), config.widths
        self.stem = _conv(config.channels, widths[0], 3, dtype, rngs)
        width = widths[0]
        for level, c_out in enumerate(widths):
            for i in range(config.blocks):
                self._add(f"block{level}_{i}", _Block(width, c_out, config, rngs))
                width = c_out
            if level < len(widths) - 1:
                self._add(f"down{level}", _halving(width, dtype, rngs))
        for name, part in _middle(width, config, rngs).items():
            self._add(name, part)
        self.out_norm = _norm(width, config, rngs)
        self.out_conv = _conv(width, 2 * config.latent_channels, 3, dtype, rngs)

    def __call__(self, x: Array) -> Array:
        x = self.stem(x)
        for name in self.order:
            part: Any = getattr(self, name)
            x = part(x)
        return self.out_conv(nnx.silu(self.out_norm(x)), wide=True)


class _Decoder(_Half):
    """Latents to images; level 0 is the coarsest here."""

    def __init__(self, config: AutoencoderKL, rngs: nnx.Rngs):
        dtype, widths = jnp.dtype(config.dtype), config.widths[::-1]
        self.stem = _conv(config.latent_channels, widths[0], 3, dtype, rngs)
        width = widths[0]
        for name, part in _middle(width, config, rngs).items():
            self._add(name, part)
        for level, c_out in enumerate(widths):
            for i in range(config.blocks + 1):
                self._add(f"block{level}_{i}", _Block(width, c_out, config, rngs))
                width = c_out
            if level < len(widths) - 1:
                self._add(f"up{level}", _conv(width, width, 3, dtype, rngs))
        self.out_norm = _norm(width, config, rngs)
        self.out_conv = _conv(width, config.channels, 3, dtype, rngs)

    def __call__(self, z: Array) -> Array:
        x = self.stem(z)
        for name in self.order:
            part: Any = getattr(self, name)
            x = part(x, enlarge=True) if name.startswith("up") else part(x)
        return self.out_conv(nnx.silu(self.out_norm(x)), wide=True)


class _Block(nnx.Module):
    """A residual block."""

    def __init__(self, c_in: int, c_out: int, config: AutoencoderKL, rngs: nnx.Rngs):
        dtype = jnp.dtype(config.dtype)
        self.norm0 = _norm(c_in, config, rngs)
        self.conv0 = _conv(c_in, c_out, 3, dtype, rngs)
        self.norm1 = _norm(c_out, config, rngs)
        self.conv1 = _conv(c_out, c_out, 3, dtype, rngs)
        self.skip = _conv(c_in, c_out, 1, dtype, rngs) if c_in != c_out else None

    def __call__(self, x: Array) -> Array:
        h = self.conv0(nnx.silu(self.norm0(x)))
        h = self.conv1(nnx.silu(self.norm1(h)))
        return (x if self.skip is None else self.skip(x)) + h


class _Attention(nnx.Module):
    """Self-attention over all pixels, of one head, with its skip connection."""

    def __init__(self, channels: int, config: AutoencoderKL, rngs: nnx.Rngs):
        dtype = jnp.dtype(config.dtype)
        self.norm = _norm(channels, config, rngs)
        self.q, self.k, self.v, self.proj = (
            _conv(channels, channels, 1, dtype, rngs) for _ in range(4)
        )

    def __call__(self, x: Array) -> Array:
        b, h, w, c = x.shape
        normed = self.norm(x)
        q, k, v = (f(normed).reshape(b, h * w, 1, c) for f in (self.q, self.k, self.v))
        return x + self.proj(attend_in_parts(q, k, v).reshape(b, h, w, c))


def attend_in_parts(
    q: Float[Array, "b n k d"],
    k: Float[Array, "b m k d"],
    v: Float[Array, "b m k d"],
    most: int = MOST_WEIGHTS,
) -> Float[Array, "b n k d"]:
    """`attend`, for as many queries at a time as keep to `most` weights per image and head.

    The backward pass computes the weights of each part again.
    """
    n, part = q.shape[1], max(1, most // k.shape[1])
    if n <= part:
        return attend(q, k, v)
    count = -(-n // part)
    padded = jnp.pad(q, ((0, 0), (0, count * part - n), (0, 0), (0, 0)))
    parts = jnp.moveaxis(padded.reshape(len(q), count, part, *q.shape[2:]), 1, 0)
    attended = jax.lax.map(jax.checkpoint(lambda each: attend(each, k, v)), parts)
    return jnp.moveaxis(attended, 0, 1).reshape(padded.shape)[:, :n]


def _middle(width: int, config: AutoencoderKL, rngs: nnx.Rngs) -> dict[str, nnx.Module]:
    return {
        "middle0": _Block(width, width, config, rngs),
        "attention": _Attention(width, config, rngs),
        "middle1": _Block(width, width, config, rngs),
    }


def _norm(channels: int, config: AutoencoderKL, rngs: nnx.Rngs) -> layers.GroupNorm:
    return layers.GroupNorm(
        channels,
        num_groups=config.groups,
        epsilon=EPSILON,
        dtype=jnp.dtype(config.dtype),
        rngs=rngs,
    )


def _conv(c_in: int, c_out: int, kernel: int, dtype: jnp.dtype, rngs: nnx.Rngs) -> layers.Conv:
    return layers.conv(c_in, c_out, kernel, init=FanIn(), dtype=dtype, rngs=rngs)


def _halving(channels: int, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.Conv:
    """A 3x3 convolution of stride 2 that pads below and to the right alone."""
    return nnx.Conv(
        channels,
        channels,
        (3, 3),
        strides=2,
        padding=[(0, 1), (0, 1)],
        dtype=dtype,
        kernel_init=FanIn().kernel,
        bias_init=FanIn().bias(9 * channels),
        rngs=rngs,
    )
