"""The ADM U-Net (arXiv 2105.05233) in the form of EDM's and RDM's published weights."""

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from rdm_jax.models import layers
from rdm_jax.models.backbone import Shapes
from rdm_jax.models.captions import Caption, sizes_of
from rdm_jax.models.initializers import FanIn
from rdm_jax.models.unet import UNet, UNetNetwork
from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.fields import at_least

DEFAULT, ZERO = FanIn(1.0), FanIn(0.0)
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
    """Size and options of ADM. Published are ADM-64 and ADM-256; the defaults are ADM-64's.

    Attributes:
      head_channels: channels of an attention head; a level with fewer channels does not attend.
    """

    head_channels: int = at_least(1, default=64)

    def build(self, shapes: Shapes, *, rngs: nnx.Rngs) -> "ADMNetwork":
        """The network; its condition is none, a vector per image, such as a class, or `Text`."""
        return ADMNetwork(self, shapes, rngs=rngs)

    def check(self, path: str) -> None:
        """Widths must divide into groups and heads, and levels exist. Raises InputError."""
        super().check(path)
        # The deepest level always attends, if it is wide enough.
        for level in sorted({*self.attention_levels, len(self.channel_mult) - 1}):
            width, head = self.channels * self.channel_mult[level], self.head_channels
            if width < head:
                fits = level not in self.attention_levels
            else:
                fits = width % (width // head) == 0
            if not fits:
                raise InputError(
                    f"{path}.head_channels={head} does not divide the width of level {level}",
                    f"Use a divisor of {width}.",
                )


class ADMNetwork(UNetNetwork):
    """ADM: the embedding scales and shifts, every block of an attending level attends."""

    config: ADM

    def __init__(self, config: ADM, shapes: Shapes, *, rngs: nnx.Rngs):
        emb, labels = config.emb_mult * config.channels, config.augment_labels
        sizes = sizes_of(shapes.condition)
        self.map_layer0 = layers.linear(config.channels, emb, init=DEFAULT, rngs=rngs)
        self.map_layer1 = layers.linear(emb, emb, init=DEFAULT, rngs=rngs)
        self.map_label = _unit_linear(sizes.classes, emb, 1.0, rngs) if sizes.classes else None
        self.map_augment = (
            layers.linear(labels, config.channels, init=ZERO, use_bias=False, rngs=rngs)
            if labels
            else None
        )
        if sizes.tokens:
            self.map_text = _unit_linear(sizes.width, emb, sizes.width**-0.5, rngs)
        super().__init__(config, STYLE, shapes, config.channels * config.channel_mult[0], rngs=rngs)

    def _heads(self, half: str, level: int, block: int, channels: int) -> int:
        attends = half == "middle" or level in self.config.attention_levels
        return channels // self.config.head_channels if attends else 0

    def _embedding(
        self,
        noise_label: Float[Array, " b"],
        classes: Float[Array, "b k"] | None,
        caption: Caption | None,
        augment_label: Float[Array, "b a"] | None,
    ) -> Float[Array, "b e"]:
        emb = layers.positional_embedding(noise_label, self.config.channels)
        if self.map_augment is not None and augment_label is not None:
            emb = emb + self.map_augment(augment_label)
        emb = self.map_layer1(nnx.silu(self.map_layer0(emb)))
        if self.map_label is not None and classes is not None:
            emb = emb + self.map_label(classes)
        if caption is not None:
            emb = emb + self.map_text(caption.vector)
        return nnx.silu(emb)


def _unit_linear(c_in: int, c_out: int, deviation: float, rngs: nnx.Rngs) -> nnx.Linear:
    """An embedding of unit variance in float32, of vectors of norm 1 / deviation."""
    return nnx.Linear(
        c_in,
        c_out,
        kernel_init=nnx.initializers.normal(deviation),
        use_bias=False,
        dtype=jnp.dtype("float32"),
        rngs=rngs,
    )
