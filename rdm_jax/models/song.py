"""DDPM++ and NCSN++ (arXiv 2011.13456) in the form of EDM's published weights."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from rdm_jax.models import layers, resampling
from rdm_jax.models.attention import Context
from rdm_jax.models.backbone import Shapes
from rdm_jax.models.captions import Caption, sizes_of
from rdm_jax.models.initializers import Xavier
from rdm_jax.models.unet import UNet, UNetNetwork
from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.fields import all_positive, at_least, one_of

DEFAULT, SMALL = Xavier(1.0), Xavier(1e-5)


@dataclasses.dataclass(frozen=True)
class Song(UNet):
    """Size and options of the networks. The defaults are DDPM++'s as EDM trained it on CIFAR-10.

    NCSN++ is `embedding='fourier', noise_mult=2, residual=True, filter=(1, 3, 3, 1)`.

    Attributes:
      embedding: of the noise level, 'positional' or 'fourier' (random frequencies, which are stored
        with the parameters but not trained).
      noise_mult: width of that embedding in units of `channels`.
      residual: every level of the encoder also gets the downsampled input image.
      filter: taps of the resampling filter, an even number of them.
    """

    channels: int = at_least(1, default=128)
    channel_mult: tuple[int, ...] = all_positive(default=(2, 2, 2))
    blocks: int = at_least(1, default=4)
    attention_levels: tuple[int, ...] = (1,)
    embedding: str = one_of("positional", "fourier", default="positional")
    noise_mult: int = at_least(1, default=1)
    residual: bool = False
    filter: tuple[int, ...] = (1, 1)

    @property
    def widths(self) -> tuple[int, ...]:
        """Widths of the levels and of the stem."""
        return (*super().widths, self.channels)

    def build(self, shapes: Shapes, *, rngs: nnx.Rngs) -> "SongNetwork":
        """The network; its condition is none, a vector per image, such as a class, or `Text`."""
        return SongNetwork(self, shapes, rngs=rngs)

    def check(self, path: str) -> None:
        """Widths must divide into groups, levels exist, the filter be even. Raises InputError."""
        super().check(path)
        if len(self.filter) % 2 or not self.filter or not sum(self.filter):
            raise InputError(
                f"{path}.filter={self.filter} is not a resampling filter",
                "Use an even number of taps, such as (1, 1) or (1, 3, 3, 1).",
            )


class SongNetwork(UNetNetwork):
    """DDPM++ or NCSN++: the embedding is added, the decoder attends in the last block of a level
    only, with one head."""

    config: Song

    def __init__(self, config: Song, shapes: Shapes, *, rngs: nnx.Rngs):
        emb, width = config.emb_mult * config.channels, config.noise_mult * config.channels
        sizes, labels = sizes_of(shapes.condition), config.augment_labels
        conditions = sizes.classes
        self.frequencies = (
            nnx.Param(16 * jax.random.normal(rngs.params(), (width // 2,)))
            if config.embedding == "fourier"
            else None
        )
        self.map_label = (
            layers.linear(conditions, width, init=DEFAULT, rngs=rngs) if conditions else None
        )
        if sizes.tokens:
            self.map_text = layers.linear(
                sizes.width, width, init=DEFAULT, use_bias=False, rngs=rngs
            )
        self.map_augment = (
            layers.linear(labels, width, init=DEFAULT, use_bias=False, rngs=rngs)
            if labels
            else None
        )
        self.map_layer0 = layers.linear(width, emb, init=DEFAULT, rngs=rngs)
        self.map_layer1 = layers.linear(emb, emb, init=DEFAULT, rngs=rngs)
        style = layers.Style(
            init=DEFAULT,
            init_last=SMALL,
            init_qkv=Xavier(0.2**0.5),
            epsilon=1e-6,
            scale_shift=False,
            skip_scale=0.5**0.5,
            project_resampled=True,
            filter=config.filter,
        )
        super().__init__(config, style, shapes, config.channels, rngs=rngs)

    def _heads(self, half: str, level: int, block: int, channels: int) -> int:
        last = half != "decoder" or block == self.config.blocks
        return int(half == "middle" or (level in self.config.attention_levels and last))

    def _add_residual(self, level: int, c_in: int, c_out: int, kwargs: dict[str, Any]) -> None:
        if self.config.residual:
            # The 3x3 convolution comes before the filter and also covers the margin that the
            # filter reads beyond the image.
            margin = (len(self.config.filter) - 1) // 2
            setattr(
                self,
                f"residual{level}",
                layers.conv(c_in, c_out, 3, init=DEFAULT, margin=margin, **kwargs),
            )

    def _embedding(
        self,
        noise_label: Float[Array, " b"],
        classes: Float[Array, "b k"] | None,
        caption: Caption | None,
        augment_label: Float[Array, "b a"] | None,
    ) -> Float[Array, "b e"]:
        if self.frequencies is None:
            emb = layers.positional_embedding(
                noise_label, self.config.noise_mult * self.config.channels, last=True
            )
        else:
            emb = layers.fourier_embedding(
                noise_label, 2 * jnp.pi * jax.lax.stop_gradient(self.frequencies[...])
            )
        emb = jnp.concatenate(jnp.split(emb, 2, axis=1)[::-1], axis=1)  # sin before cos
        if self.map_label is not None and classes is not None:
            emb = emb + self.map_label(classes * classes.shape[-1] ** 0.5)
        elif self.map_label is not None:
            assert self.map_label.bias is not None
            emb = emb + self.map_label.bias[...]  # the embedding of the null condition
        if caption is not None:
            emb = emb + self.map_text(caption.vector)
        if self.map_augment is not None and augment_label is not None:
            emb = emb + self.map_augment(augment_label)
        return nnx.silu(self.map_layer1(nnx.silu(self.map_layer0(emb))))

    def _encode(
        self,
        x: Float[Array, "b h w c"],
        emb: Float[Array, "b e"],
        keys: Key[Array, " b"] | None,
        context: Context | None,
    ) -> list[Array]:
        outputs, residual = [self.stem(x)], x
        for name in self.encoder:
            h = self._run(name, outputs[-1], emb, keys, context)
            if self.config.residual and name.startswith("down"):
                conv = getattr(self, name.replace("down", "residual"))
                h = residual = (
                    resampling.downsample(conv(residual), self.config.filter, padded=True) + h
                ) * self.style.skip_scale
            outputs.append(h)
        return outputs
