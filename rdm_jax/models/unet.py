"""What the U-Nets of both published families share: the order of blocks, the skips, and the
call."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from rdm_jax.models import layers

# What is kept of a block's forward pass for its backward pass; the rest is computed again from the
# block's input.
REMAT: dict[str, Callable[[Callable], Callable]] = {
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
      blocks: residual blocks a level.
      attention_levels: levels (0 is the finest) whose blocks attend.
      emb_mult: width of the embedding in units of `channels`.
      augment_labels: values of the augmentation label that conditions the network; 0 for none, 9
        for EDM's augmentation.
      dropout: rate in every block.
      patch: side of the pixel patches that are folded into channels before level 0
        (space-to-depth), and unfolded at the end.
      dtype: 'float32' or 'bfloat16' for what images are computed in. Always float32 are parameters,
        embeddings and how they modulate, the statistics of normalisation and attention, sums over
        an image in the backward pass, and the output. Gradients of convolutions are of this dtype,
        also on their way between devices.
      remat: what training computes again in the backward pass instead of keeping it: 'none';
        'convolutions' for all but the outputs of convolutions (little more time); or 'block' for
        all but the inputs of blocks (least memory, a third more time).
    """

    channels: int = 192
    channel_mult: tuple[int, ...] = (1, 2, 3, 4)
    blocks: int = 3
    attention_levels: tuple[int, ...] = (1, 2, 3)
    emb_mult: int = 4
    augment_labels: int = 0
    dropout: float = 0.1
    patch: int = 1
    dtype: str = "float32"
    remat: str = "none"

    @property
    def stride(self) -> int:
        """What height and width of an image must be divisible by."""
        return self.patch * 2 ** (len(self.channel_mult) - 1)


class UNetNetwork(nnx.Module):
    """F(x, c_noise, class label, augmentation label); any height and width divisible by the
    config's `stride`.

    A family adds its embedding of the labels (`_embedding`) and says where it attends (`_heads`).
    `encoder` and `decoder` hold the names of the blocks in the order in which they run; level 0 is
    the finest.
    """

    def __init__(
        self,
        config: UNet,
        style: layers.Style,
        in_out: tuple[int, int],
        stem: int,
        *,
        rngs: nnx.Rngs,
    ):
        self.config, self.style, self.dtype = config, style, jnp.dtype(config.dtype)
        kwargs = {"dtype": self.dtype, "rngs": rngs}
        folded_in, folded_out = (channels * config.patch**2 for channels in in_out)
        width = config.channels * config.channel_mult[0]
        self.stem = layers.conv(folded_in, stem, 3, init=style.init, **kwargs)
        self._add_encoder(folded_in, stem, kwargs)
        self._add_decoder(kwargs)
        self.out_norm = layers.group_norm(width, epsilon=style.epsilon, **kwargs)
        self.out_conv = layers.conv(width, folded_out, 3, init=style.init_last, **kwargs)

    def _heads(self, half: str, level: int, block: int, channels: int) -> int:
        """Heads of the block's attention, 0 for none; `half` is 'encoder', 'middle' or
        'decoder'."""
        raise NotImplementedError

    def _add_block(
        self,
        name: str,
        c_in: int,
        c_out: int,
        kwargs: dict,
        *,
        heads: int = 0,
        resample: str | None = None,
    ) -> str:
        emb, dropout = self.config.emb_mult * self.config.channels, self.config.dropout
        block = layers.Block(
            c_in, c_out, emb, self.style, heads=heads, resample=resample, dropout=dropout, **kwargs
        )
        setattr(self, name, block)
        return name

    def _add_residual(self, level: int, c_in: int, c_out: int, kwargs: dict) -> None:
        """For families that feed the shrunken image into each level; none by default."""

    def _add_encoder(self, folded: int, stem: int, kwargs: dict):
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

    def _add_decoder(self, kwargs: dict):
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
        class_label: Float[Array, "b classes"] | None,
        augment_label: Float[Array, "b a"] | None,
    ) -> Float[Array, "b e"]:
        raise NotImplementedError

    def _run(
        self,
        name: str,
        x: Float[Array, "b h w c"],
        emb: Float[Array, "b e"],
        keys: Key[Array, " b"] | None,
        skip: Float[Array, "b h w c3"] | None = None,
    ) -> Float[Array, "b h2 w2 c2"]:
        """The output of a block, for x and what a skip connection joins to its channels."""
        block, number = getattr(self, name), (*self.encoder, *self.decoder).index(name)

        def run(x, emb, keys, skip):
            keys = None if keys is None else jax.vmap(jax.random.fold_in, (0, None))(keys, number)
            # Joined in here, so that rematerialisation keeps the two, which are kept anyway, and
            # not their copy.
            return block(x if skip is None else jnp.concatenate([x, skip], axis=-1), emb, keys)

        return REMAT[self.config.remat](run)(x, emb, keys, skip)

    def _encode(
        self, x: Float[Array, "b h w c"], emb: Float[Array, "b e"], keys: Key[Array, " b"] | None
    ) -> list[Array]:
        """The outputs of the stem and of all blocks of the encoder."""
        outputs = [self.stem(x)]
        for name in self.encoder:
            outputs.append(self._run(name, outputs[-1], emb, keys))
        return outputs

    def __call__(
        self,
        x: Float[Array, "b h w c"],
        noise_label: Float[Array, " b"],
        class_label: Float[Array, "b classes"] | None = None,
        augment_label: Float[Array, "b a"] | None = None,
        dropout_keys: Key[Array, " b"] | None = None,
    ) -> Float[Array, "b h w c2"]:
        """Runs the network.

        Args:
          x: images, preconditioned, and after their channels those of what is given.
          noise_label: c_noise.
          class_label: one-hot; all zero (or None) is the null label.
          augment_label: None is the label of an image that was not augmented.
          dropout_keys: for dropout in training, one an image; None switches dropout off.

        Returns:
          An array of x's height and width in float32, with as many channels as the network was
          built for.
        """
        emb = self._embedding(noise_label, class_label, augment_label)
        skips = self._encode(layers.space_to_depth(x, self.config.patch), emb, dropout_keys)
        h = skips[-1]
        for name in self.decoder:
            h = self._run(
                name, h, emb, dropout_keys, skips.pop() if name.startswith("decoder") else None
            )
        h = self.out_conv(nnx.silu(self.out_norm(h)), wide=True)
        return layers.depth_to_space(h, self.config.patch)
