"""The ADM U-Net (Dhariwal and Nichol, arXiv 2105.05233), in the form in which EDM and RDM published their weights."""

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from rdm_jax.models import layers


@dataclasses.dataclass(frozen=True)
class ADM:
    """Size and options of the network. The published ones are ADM-64 and ADM-256; the defaults here are ADM-64's.

    Attributes:
      channels: width of level 0.
      channel_mult: width of each level in units of `channels`; each level has half the resolution of the one before.
      blocks: residual blocks a level.
      attention_levels: levels (0 is the finest) whose blocks attend.
      head_channels: channels of an attention head.
      emb_mult: width of the embedding in units of `channels`.
      dropout: rate in every block.
      patch: side of the pixel patches that are folded into channels before level 0 (space-to-depth), and unfolded at the end.
      dtype: 'float32' or 'bfloat16' for the computation; parameters are float32 always.
    """

    channels: int = 192
    channel_mult: tuple[int, ...] = (1, 2, 3, 4)
    blocks: int = 3
    attention_levels: tuple[int, ...] = (1, 2, 3)
    head_channels: int = 64
    emb_mult: int = 4
    dropout: float = 0.1
    patch: int = 1
    dtype: str = "float32"

    @property
    def stride(self) -> int:
        """What height and width of an image must be divisible by."""
        return self.patch * 2 ** (len(self.channel_mult) - 1)

    def build(self, image_channels: int, classes: int, augment: int, *, rngs: nnx.Rngs) -> "ADMNetwork":
        """The network for images of so many channels, classes (0: none) and augmentation labels (0: none)."""
        return ADMNetwork(self, image_channels, classes, augment, rngs=rngs)


class ADMNetwork(nnx.Module):
    """F(x, c_noise, class label, augmentation label); any height and width divisible by the config's `stride`.

    `encoder` and `decoder` hold the names of the blocks in the order in which they run; level 0 is the finest.
    """

    def __init__(self, config: ADM, image_channels: int, classes: int, augment: int, *, rngs: nnx.Rngs):
        self.config, self.dtype = config, jnp.dtype(config.dtype)
        kwargs = {"dtype": self.dtype, "rngs": rngs}
        emb = config.emb_mult * config.channels
        self.map_layer0 = layers.linear(config.channels, emb, **kwargs)
        self.map_layer1 = layers.linear(emb, emb, **kwargs)
        unit = {"kernel_init": nnx.initializers.normal(1.0), "use_bias": False}
        self.map_label = nnx.Linear(classes, emb, **unit, **kwargs) if classes else None
        zero = {"init": layers.ZERO, "use_bias": False}
        self.map_augment = layers.linear(augment, config.channels, **zero, **kwargs) if augment else None

        folded = image_channels * config.patch**2
        self.stem = layers.conv(folded, config.channels, 3, **kwargs)
        self._add_encoder(emb, kwargs)
        self._add_decoder(emb, kwargs)
        self.out_norm = layers.group_norm(config.channels * config.channel_mult[0], **kwargs)
        self.out_conv = layers.conv(config.channels * config.channel_mult[0], folded, 3, init=layers.ZERO, **kwargs)

    def _add_block(self, name: str, c_in: int, c_out: int, emb: int, level: int, kwargs: dict, *, attend=None, resample=None):
        attend = level in self.config.attention_levels if attend is None else attend
        heads = c_out // self.config.head_channels if attend else 0
        block = layers.Block(c_in, c_out, emb, heads=heads, resample=resample, dropout=self.config.dropout, **kwargs)
        setattr(self, name, block)
        return name

    def _add_encoder(self, emb: int, kwargs: dict):
        width, names, skips = self.config.channels, [], [self.config.channels]
        for level, mult in enumerate(self.config.channel_mult):
            if level:
                names.append(self._add_block(f"down{level}", width, width, emb, level, kwargs, attend=False, resample="down"))
                skips.append(width)
            for i in range(self.config.blocks):
                names.append(self._add_block(f"encoder{level}_{i}", width, mult * self.config.channels, emb, level, kwargs))
                width = mult * self.config.channels
                skips.append(width)
        self.encoder, self.skip_channels = tuple(names), tuple(skips)

    def _add_decoder(self, emb: int, kwargs: dict):
        deepest, skips, names = len(self.config.channel_mult) - 1, list(self.skip_channels), []
        width = skips[-1]
        names.append(self._add_block("middle0", width, width, emb, deepest, kwargs, attend=True))
        names.append(self._add_block("middle1", width, width, emb, deepest, kwargs, attend=False))
        for level in range(deepest, -1, -1):
            if level < deepest:
                names.append(self._add_block(f"up{level}", width, width, emb, level, kwargs, attend=False, resample="up"))
            for i in range(self.config.blocks + 1):
                c_out = self.config.channel_mult[level] * self.config.channels
                names.append(self._add_block(f"decoder{level}_{i}", width + skips.pop(), c_out, emb, level, kwargs))
                width = c_out
        self.decoder = tuple(names)

    def _embedding(
        self,
        noise_label: Float[Array, " b"],
        class_label: Float[Array, "b classes"] | None,
        augment_label: Float[Array, "b a"] | None,
    ) -> Float[Array, "b e"]:
        emb = layers.positional_embedding(noise_label, self.config.channels).astype(self.dtype)
        if self.map_augment is not None and augment_label is not None:
            emb = emb + self.map_augment(augment_label)
        emb = self.map_layer1(nnx.silu(self.map_layer0(emb)))
        if self.map_label is not None and class_label is not None:
            emb = emb + self.map_label(class_label)
        return nnx.silu(emb)

    def __call__(
        self,
        x: Float[Array, "b h w c"],
        noise_label: Float[Array, " b"],
        class_label: Float[Array, "b classes"] | None = None,
        augment_label: Float[Array, "b a"] | None = None,
        *,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "b h w c"]:
        """Runs the network.

        Args:
          x: images, preconditioned.
          noise_label: c_noise.
          class_label: one-hot; all zero (or None) is the null label.
          augment_label: None is the label of an image that was not augmented.
          rngs: a stream for dropout in training; None switches dropout off.

        Returns:
          An array like x, in float32.
        """
        emb = self._embedding(noise_label, class_label, augment_label)
        h = self.stem(layers.space_to_depth(x, self.config.patch))
        skips = [h]
        for name in self.encoder:
            h = getattr(self, name)(h, emb, rngs)
            skips.append(h)
        for name in self.decoder:
            if name.startswith("decoder"):
                h = jnp.concatenate([h, skips.pop()], axis=-1)
            h = getattr(self, name)(h, emb, rngs)
        h = self.out_conv(nnx.silu(self.out_norm(h)))
        return layers.depth_to_space(h, self.config.patch).astype(jnp.float32)
