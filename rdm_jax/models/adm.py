"""The ADM U-Net (Dhariwal and Nichol, arXiv 2105.05233), in the form in which EDM and RDM published
their weights."""

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from rdm_jax.models import layers
from rdm_jax.models.unet import UNet, UNetNetwork

DEFAULT, ZERO = layers.FanIn(1.0), layers.FanIn(0.0)
STYLE = layers.Style(
    init=DEFAULT,
    init_last=ZERO,
    init_qkv=DEFAULT,
    epsilon=1e-5,
    scale_shift=True,
    skip_scale=1.0,
    project_resampled=False,
)


@dataclasses.dataclass(frozen=True)
class ADM(UNet):
    """Size and options of the network. The published ones are ADM-64 and ADM-256; the defaults are
    ADM-64's.

    Attributes:
      head_channels: channels of an attention head; a level of fewer channels does not attend.
    """

    head_channels: int = 64

    def build(
        self, image_channels: int, classes: int, *, outputs: int = 1, given: int = 0, rngs: nnx.Rngs
    ) -> "ADMNetwork":
        """The network for images of so many channels and classes (0: none).

        Its output has `outputs` times as many channels, its input `given` more: what it is told of
        each pixel.
        """
        return ADMNetwork(
            self, (image_channels + given, outputs * image_channels), classes, rngs=rngs
        )


class ADMNetwork(UNetNetwork):
    """ADM: the embedding scales and shifts, every block of an attending level attends."""

    def __init__(self, config: ADM, in_out: tuple[int, int], classes: int, *, rngs: nnx.Rngs):
        emb, labels = config.emb_mult * config.channels, config.augment_labels
        self.map_layer0 = layers.linear(config.channels, emb, init=DEFAULT, rngs=rngs)
        self.map_layer1 = layers.linear(emb, emb, init=DEFAULT, rngs=rngs)
        unit = {
            "kernel_init": nnx.initializers.normal(1.0),
            "use_bias": False,
            "dtype": jnp.dtype("float32"),
        }
        self.map_label = nnx.Linear(classes, emb, **unit, rngs=rngs) if classes else None
        self.map_augment = (
            layers.linear(labels, config.channels, init=ZERO, use_bias=False, rngs=rngs)
            if labels
            else None
        )
        super().__init__(config, STYLE, in_out, config.channels * config.channel_mult[0], rngs=rngs)

    def _heads(self, half: str, level: int, block: int, channels: int) -> int:
        attends = half == "middle" or level in self.config.attention_levels
        return channels // self.config.head_channels if attends else 0

    def _embedding(
        self,
        noise_label: Float[Array, " b"],
        class_label: Float[Array, "b classes"] | None,
        augment_label: Float[Array, "b a"] | None,
    ) -> Float[Array, "b e"]:
        emb = layers.positional_embedding(noise_label, self.config.channels)
        if self.map_augment is not None and augment_label is not None:
            emb = emb + self.map_augment(augment_label)
        emb = self.map_layer1(nnx.silu(self.map_layer0(emb)))
        if self.map_label is not None and class_label is not None:
            emb = emb + self.map_label(class_label)
        return nnx.silu(emb)
