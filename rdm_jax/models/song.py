"""DDPM++ and NCSN++ (Song et al., arXiv 2011.13456), in the form in which EDM published their
weights."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from rdm_jax.models import layers
from rdm_jax.models.unet import UNet, UNetNetwork

DEFAULT, SMALL = layers.Xavier(1.0), layers.Xavier(1e-5)


@dataclasses.dataclass(frozen=True)
class Song(UNet):
    """Size and options of the networks. The defaults are DDPM++'s as EDM trained it on CIFAR-10.

    NCSN++ is `embedding='fourier', noise_mult=2, residual=True, filter=(1, 3, 3, 1)`.

    Attributes:
      embedding: of the noise level, 'positional' or 'fourier' (random frequencies, which are kept
        with the parameters but not trained).
      noise_mult: width of that embedding in units of `channels`.
      residual: every level of the encoder is fed the shrunken input image.
      filter: taps of the resampling filter, an even number of them.
    """

    channels: int = 128
    channel_mult: tuple[int, ...] = (2, 2, 2)
    blocks: int = 4
    attention_levels: tuple[int, ...] = (1,)
    embedding: str = "positional"
    noise_mult: int = 1
    residual: bool = False
    filter: tuple[int, ...] = (1, 1)

    def build(
        self, image_channels: int, classes: int, *, outputs: int = 1, given: int = 0, rngs: nnx.Rngs
    ) -> "SongNetwork":
        """The network for images of so many channels and classes (0: none).

        Its output has `outputs` times as many channels, its input `given` more: what it is told of
        each pixel.
        """
        return SongNetwork(
            self, (image_channels + given, outputs * image_channels), classes, rngs=rngs
        )


class SongNetwork(UNetNetwork):
    """DDPM++ or NCSN++: the embedding is added, the decoder attends in the last block of a level
    only, with one head."""

    def __init__(self, config: Song, in_out: tuple[int, int], classes: int, *, rngs: nnx.Rngs):
        kwargs = {"init": DEFAULT, "rngs": rngs}
        emb, width = config.emb_mult * config.channels, config.noise_mult * config.channels
        labels = config.augment_labels
        fourier = config.embedding == "fourier"
        self.frequencies = (
            nnx.Param(16 * jax.random.normal(rngs.params(), (width // 2,))) if fourier else None
        )
        self.map_label = layers.linear(classes, width, **kwargs) if classes else None
        self.map_augment = (
            layers.linear(labels, width, use_bias=False, **kwargs) if labels else None
        )
        self.map_layer0 = layers.linear(width, emb, **kwargs)
        self.map_layer1 = layers.linear(emb, emb, **kwargs)
        style = layers.Style(
            init=DEFAULT,
            init_last=SMALL,
            init_qkv=layers.Xavier(0.2**0.5),
            epsilon=1e-6,
            scale_shift=False,
            skip_scale=0.5**0.5,
            project_resampled=True,
            filter=config.filter,
        )
        super().__init__(config, style, in_out, config.channels, rngs=rngs)

    def _heads(self, half: str, level: int, block: int, channels: int) -> int:
        last = half != "decoder" or block == self.config.blocks
        return int(half == "middle" or (level in self.config.attention_levels and last))

    def _add_residual(self, level: int, c_in: int, c_out: int, kwargs: dict) -> None:
        if self.config.residual:
            # The 3x3 comes before the filter and is computed where the filter looks beyond the
            # image, too.
            margin = (len(self.config.filter) - 1) // 2
            setattr(
                self,
                f"residual{level}",
                layers.conv(c_in, c_out, 3, init=DEFAULT, margin=margin, **kwargs),
            )

    def _embedding(
        self,
        noise_label: Float[Array, " b"],
        class_label: Float[Array, "b classes"] | None,
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
        if self.map_label is not None and class_label is not None:
            emb = emb + self.map_label(class_label * class_label.shape[-1] ** 0.5)
        elif self.map_label is not None:
            emb = emb + self.map_label.bias[...]  # the null label's embedding
        if self.map_augment is not None and augment_label is not None:
            emb = emb + self.map_augment(augment_label)
        return nnx.silu(self.map_layer1(nnx.silu(self.map_layer0(emb))))

    def _encode(
        self, x: Float[Array, "b h w c"], emb: Float[Array, "b e"], keys: Key[Array, " b"] | None
    ) -> list[Array]:
        outputs, residual = [self.stem(x)], x
        for name in self.encoder:
            h = self._run(name, outputs[-1], emb, keys)
            if self.config.residual and name.startswith("down"):
                conv = getattr(self, name.replace("down", "residual"))
                h = residual = (
                    layers.downsample(conv(residual), self.config.filter, padded=True) + h
                ) * self.style.skip_scale
            outputs.append(h)
        return outputs
