"""What the U-Nets of both published families share: the order of blocks, skips and the call."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from rdm_jax.models import layers, resampling
from rdm_jax.models.attention import Context
from rdm_jax.models.backbone import Shapes
from rdm_jax.models.captions import Caption, CaptionContext, parts_of, sizes_of
from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.fields import all_positive, at_least, below, one_of

# What a block's forward pass keeps for its backward pass; the rest is computed again from the
# block's input.
REMAT: dict[str, Callable[[Callable[..., Array]], Callable[..., Array]]] = {
    "none": lambda block: block,
    "block": jax.checkpoint,
    # jax's own dots_* policies do not know convolutions.
    "convolutions": functools.partial(
        jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(layers.CONVOLUTION)
    ),
}


@dataclasses.dataclass(frozen=True)
class UNet:
    """Size and options that both families have.

    Attributes:
      channels: width of level 0.
      channel_mult: width of each level in units of `channels`; each level has half the resolution
        of the one before.
      blocks: residual blocks per level.
      attention_levels: levels (0 is the finest) whose blocks attend, to captions as well.
      emb_mult: width of the embedding in units of `channels`.
      augment_labels: values of the augmentation label that the network is conditioned on; 0 for
        none, 9 for EDM's augmentation.
      dropout: rate in every block.
      patch: side of the pixel patches that are folded into channels before level 0
        (space-to-depth), and unfolded at the end.
      dtype: 'float32' or 'bfloat16', of the computation on images. Parameters, embeddings and their
        modulation, statistics of normalisation and attention, sums over an image in the backward
        pass, and the output are always float32. Gradients of convolutions have this dtype, also in
        the exchange between devices.
      remat: what training computes again in the backward pass instead of keeping it: 'none';
        'convolutions' for all but the outputs of convolutions (little more time); or 'block' for
        all but the inputs of blocks (least memory, a third more time).
    """

    condition_parameters: ClassVar[tuple[str, ...]] = ("map_label",)

    channels: int = at_least(1, default=192)
    channel_mult: tuple[int, ...] = all_positive(default=(1, 2, 3, 4))
    blocks: int = at_least(1, default=3)
    attention_levels: tuple[int, ...] = (1, 2, 3)
    emb_mult: int = at_least(1, default=4)
    augment_labels: int = at_least(0, default=0)
    dropout: float = below(1, default=0.1)
    patch: int = at_least(1, default=1)
    dtype: str = one_of("float32", "bfloat16", default="float32")
    remat: str = one_of(*REMAT, default="none")

    @property
    def stride(self) -> int:
        """Height and width of an image must be divisible by this."""
        return self.patch * 2 ** (len(self.channel_mult) - 1)

    @property
    def widths(self) -> tuple[int, ...]:
        """Widths that skip connections join."""
        return tuple(self.channels * mult for mult in self.channel_mult)

    def check(self, path: str) -> None:
        """Widths must divide into groups, and levels must exist. Raises InputError."""
        joined = {a + b for a in self.widths for b in self.widths}  # by the skip connections
        for width in {*self.widths, *joined}:
            if width % 4 or width % min(32, width // 4):
                raise InputError(
                    f"{path}.channels={self.channels} does not divide into groups of normalisation",
                    "Use a multiple of 32.",
                )
        deepest = len(self.channel_mult) - 1
        if not all(0 <= level <= deepest for level in self.attention_levels):
            raise InputError(
                f"{path}.attention_levels={self.attention_levels} has unknown levels",
                f"Use levels from 0 to {deepest}.",
            )


class UNetNetwork(nnx.Module):
    """F(x, c_noise, condition, augmentation label) for images that the config's `stride` divides.

    A family adds its embedding (`_embedding`) and says where it attends (`_heads`). `encoder` and
    `decoder` hold the names of the blocks in the order in which they run; level 0 is the finest.
    """

    def __init__(
        self,
        config: UNet,
        style: layers.Style,
        shapes: Shapes,
        stem: int,
        *,
        rngs: nnx.Rngs,
    ):
        self.config, self.style, self.dtype = config, style, jnp.dtype(config.dtype)
        kwargs: dict[str, Any] = {"dtype": self.dtype, "rngs": rngs}
        folded_in = shapes.channels_in * config.patch**2
        folded_out = shapes.channels_out * config.patch**2
        width = config.channels * config.channel_mult[0]
        self.sizes = sizes_of(shapes.condition)
        self.stem = layers.conv(folded_in, stem, 3, init=style.init, **kwargs)
        self._add_encoder(folded_in, stem, kwargs)
        self._add_decoder(kwargs)
        self.out_norm = layers.group_norm(width, epsilon=style.epsilon, **kwargs)
        self.out_conv = layers.conv(width, folded_out, 3, init=style.init_last, **kwargs)
        if self.sizes.tokens:
            self._check_attends()
            self.text = CaptionContext(self.sizes.width, 0, **kwargs)

    def _check_attends(self) -> None:
        """Refuses a network that would not see the tokens of captions."""
        blocks = (getattr(self, name) for name in (*self.encoder, *self.decoder))
        if all(block.cross is None for block in blocks):
            raise InputError(
                f"network.attention_levels={self.config.attention_levels} has no block that "
                "attends to captions",
                "Use one level or more, of at least head_channels channels.",
            )

    def _heads(self, half: str, level: int, block: int, channels: int) -> int:
        """Heads of the block's attention, 0 for none; in 'encoder', 'middle' or 'decoder'."""
        raise NotImplementedError

    def _add_block(
        self,
        name: str,
        c_in: int,
        c_out: int,
        kwargs: dict[str, Any],
        *,
        heads: int = 0,
        resample: str | None = None,
    ) -> str:
        emb, dropout = self.config.emb_mult * self.config.channels, self.config.dropout
        block = layers.Block(
            c_in,
            c_out,
            emb,
            self.style,
            heads=heads,
            context=self.sizes.width,
            resample=resample,
            dropout=dropout,
            **kwargs,
        )
        setattr(self, name, block)
        return name

    def _add_residual(self, level: int, c_in: int, c_out: int, kwargs: dict[str, Any]) -> None:
        """For families that feed the downsampled image into each level; none by default."""

    def _add_encoder(self, folded: int, stem: int, kwargs: dict[str, Any]) -> None:
        width, residual, names, skips = stem, folded, [], [stem]
        for level, mult in enumerate(self.config.channel_mult):
            if level:
                names.append(self._add_block(f"down{level}", width, width, kwargs, resample="down"))
                self._add_residual(level, residual, width, kwargs)
                residual = width
                skips.append(width)
            for i in range(self.config.blocks):
                c_out = mult * self.config.channels
                heads = self._heads("encoder", level, i, c_out)
                names.append(
                    self._add_block(f"encoder{level}_{i}", width, c_out, kwargs, heads=heads)
                )
                width = c_out
                skips.append(width)
        self.encoder, self.skip_channels = tuple(names), tuple(skips)

    def _add_decoder(self, kwargs: dict[str, Any]) -> None:
        deepest, skips, names = len(self.config.channel_mult) - 1, list(self.skip_channels), []
        width = skips[-1]
        names.append(
            self._add_block(
                "middle0", width, width, kwargs, heads=self._heads("middle", deepest, 0, width)
            )
        )
        names.append(self._add_block("middle1", width, width, kwargs))
        for level in range(deepest, -1, -1):
            if level < deepest:
                names.append(self._add_block(f"up{level}", width, width, kwargs, resample="up"))
            for i in range(self.config.blocks + 1):
                c_out = self.config.channel_mult[level] * self.config.channels
                heads = self._heads("decoder", level, i, c_out)
                names.append(
                    self._add_block(
                        f"decoder{level}_{i}", width + skips.pop(), c_out, kwargs, heads=heads
                    )
                )
                width = c_out
        self.decoder = tuple(names)

    def _embedding(
        self,
        noise_label: Float[Array, " b"],
        classes: Float[Array, "b k"] | None,
        caption: Caption | None,
        augment_label: Float[Array, "b a"] | None,
    ) -> Float[Array, "b e"]:
        raise NotImplementedError

    def _run(
        self,
        name: str,
        x: Float[Array, "b h w c"],
        emb: Float[Array, "b e"],
        keys: Key[Array, " b"] | None,
        context: Context | None,
        skip: Float[Array, "b h w c3"] | None = None,
    ) -> Float[Array, "b h2 w2 c2"]:
        """The output of a block for x, with the channels of a skip connection appended."""
        block, number = getattr(self, name), (*self.encoder, *self.decoder).index(name)

        def run(x: Array, emb: Array, keys: Any, context: Any, skip: Any) -> Array:
            keys = None if keys is None else jax.vmap(jax.random.fold_in, (0, None))(keys, number)
            # Concatenated in here, so that rematerialisation keeps the two parts, which are kept
            # anyway, and not their copy.
            x = x if skip is None else jnp.concatenate([x, skip], axis=-1)
            return block(x, emb, keys, context)

        return REMAT[self.config.remat](run)(x, emb, keys, context, skip)

    def _encode(
        self,
        x: Float[Array, "b h w c"],
        emb: Float[Array, "b e"],
        keys: Key[Array, " b"] | None,
        context: Context | None,
    ) -> list[Array]:
        """The outputs of the stem and of all blocks of the encoder."""
        outputs = [self.stem(x)]
        for name in self.encoder:
            outputs.append(self._run(name, outputs[-1], emb, keys, context))
        return outputs

    def __call__(
        self,
        x: Float[Array, "b h w c"],
        noise_label: Float[Array, " b"],
        condition: Any = None,
        augment_label: Float[Array, "b a"] | None = None,
        dropout_keys: Key[Array, " b"] | None = None,
    ) -> Float[Array, "b h w c2"]:
        """Runs the network.

        Args:
          x: preconditioned images, followed by the channels of the conditioning.
          noise_label: c_noise.
          condition: a vector per image, or the tree of `conditions.Text`; all zero (or None) is
            the null condition.
          augment_label: None is the label of an image that was not augmented.
          dropout_keys: one key per image, for training; None switches dropout off.

        Returns:
          float32 of x's height and width, with `Shapes.channels_out` channels.
        """
        classes, caption = parts_of(condition, self.sizes, len(x))
        emb = self._embedding(noise_label, classes, caption, augment_label)
        context = None if caption is None else self.text(caption)
        x = resampling.space_to_depth(x, self.config.patch)
        skips = self._encode(x, emb, dropout_keys, context)
        h = skips[-1]
        for name in self.decoder:
            skip = skips.pop() if name.startswith("decoder") else None
            h = self._run(name, h, emb, dropout_keys, context, skip)
        h = self.out_conv(nnx.silu(self.out_norm(h)), wide=True)
        return resampling.depth_to_space(h, self.config.patch)
