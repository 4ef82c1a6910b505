"""JiT, a transformer on patches of pixels (arXiv 2511.13720), with a stem and a head on pixels.

With `stem_blocks=0` and `head_blocks=0` it is the published network.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from rdm_jax.models import layers, pixel_blocks, resampling, transformer_layers
from rdm_jax.models.attention import Context
from rdm_jax.models.backbone import Shapes
from rdm_jax.models.captions import Caption, CaptionContext, parts_of, sizes_of
from rdm_jax.models.positions import Rotary, sine_cosine
from rdm_jax.models.transformer_layers import dense
from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.fields import at_least, below, one_of

# What a block's forward pass keeps for its backward pass.
REMAT: dict[str, Callable[[Callable[..., Array]], Callable[..., Array]]] = {
    "none": lambda block: block,
    "block": jax.checkpoint,
    "products": functools.partial(
        jax.checkpoint, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    ),
}
FREQUENCIES = 256  # values of the time's embedding before its first layer
SMALL, UNIT = nnx.initializers.normal(0.02), nnx.initializers.normal(1.0)


@dataclasses.dataclass(frozen=True)
class JiT:
    """Size and options. The defaults are JiT-B/16's (arXiv 2511.13720, table 9).

    Attributes:
      patch: side of the pixel patches that are tokens; images of any height and width that it
        divides.
      hidden, depth, heads: width of a token, number of blocks, attention heads per block.
      bottleneck: width between the patch's values and the token.
      class_tokens, class_tokens_from: copies of the class's embedding that stand before the
        image's tokens from this block (counted from 0) on.
      text: of a caption, which blocks see from that block on, too: 'context' puts its tokens among
        the image's; in 'cross' the image's tokens attend to them, between attention and SwiGLU.
      mlp_ratio: width of SwiGLU's hidden layer is 2/3 of this in units of `hidden`.
      multiple: that width is rounded up to a multiple of this. 1 is published; 128 fills the matrix
        units of TPUs and GPUs.
      dropout: rate after attention and in SwiGLU, in the middle half of the blocks.
      stem_blocks: convolutional blocks on pixels before the patches are embedded.
      head_blocks: blocks on pixels after the transformer, each modulated by its patch's token, as
        in DeCo (arXiv 2511.19365); 0 for a linear layer from token to patch.
      pixel_channels: width of the blocks on pixels.
      pixel_fold: side of the cells that these blocks see as one pixel (space-to-depth); it divides
        `patch`.
      head_kernel: 1, or 3 for convolutions, which see over the borders of patches.
      init: 'published': gates begin at 0 and embeddings near 0, so that blocks join in slowly; or
        'open': gates begin at 1 and embeddings have unit variance, which learns faster where
        trainings are short.
      augment_labels: values of the augmentation label; 0 for none, 9 for EDM's augmentation.
      dtype: 'float32' or 'bfloat16', of the computation on tokens. Parameters, embeddings of time
        and class and their modulation, normalisation and softmax, and the output are float32.
      remat: what training computes again in the backward pass: 'none'; 'products' for all but
        matrix products (little more time); 'block' for all but the inputs of blocks.
    """

    condition_parameters: ClassVar[tuple[str, ...]] = ("class_table",)

    patch: int = at_least(1, default=16)
    hidden: int = at_least(8, default=768)
    depth: int = at_least(1, default=12)
    heads: int = at_least(1, default=12)
    bottleneck: int = at_least(1, default=128)
    class_tokens: int = at_least(0, default=32)
    class_tokens_from: int = at_least(0, default=4)
    text: str = one_of("context", "cross", default="context")
    mlp_ratio: float = at_least(1, default=4.0)
    multiple: int = at_least(1, default=1)
    dropout: float = below(1, default=0.0)
    stem_blocks: int = at_least(0, default=0)
    head_blocks: int = at_least(0, default=0)
    pixel_channels: int = at_least(8, default=32)
    pixel_fold: int = at_least(1, default=1)
    head_kernel: int = one_of(1, 3, default=1)
    init: str = one_of("published", "open", default="published")
    augment_labels: int = at_least(0, default=0)
    dtype: str = one_of("float32", "bfloat16", default="float32")
    remat: str = one_of(*REMAT, default="none")

    @property
    def stride(self) -> int:
        """Height and width of an image must be divisible by this."""
        return self.patch

    @property
    def mlp_width(self) -> int:
        """Width of SwiGLU's hidden layer."""
        width = int(int(self.hidden * self.mlp_ratio) * 2 / 3)
        return -(-width // self.multiple) * self.multiple

    def check(self, path: str) -> None:
        """Heads must divide the width, and rotation needs four channels. Raises InputError."""
        if self.hidden % (4 * self.heads):
            raise InputError(
                f"{path}.hidden={self.hidden} is not {path}.heads={self.heads} times a multiple "
                "of 4",
                f"Use a multiple of {4 * self.heads}.",
            )
        if self.patch % self.pixel_fold:
            raise InputError(
                f"{path}.pixel_fold={self.pixel_fold} does not divide {path}.patch={self.patch}",
                "Use 1, or another divisor of the patch.",
            )
        if self.class_tokens:
            self._check_first_block(path, ", or class_tokens=0")

    def _check_first_block(self, path: str, otherwise: str = "") -> None:
        if self.class_tokens_from >= self.depth:
            raise InputError(
                f"{path}.class_tokens_from={self.class_tokens_from} is not one of "
                f"{path}.depth={self.depth} blocks",
                f"Use 0 to {self.depth - 1}{otherwise}.",
            )

    def build(self, shapes: Shapes, *, rngs: nnx.Rngs) -> "JiTNetwork":
        """The network for such images. Raises InputError if no block would see captions."""
        if sizes_of(shapes.condition).tokens:
            self._check_first_block("network")
        return JiTNetwork(self, shapes, rngs=rngs)


class _Others(NamedTuple):
    """What a block gets besides tokens and embedding; see `transformer_layers.Block`."""

    rotary: Rotary
    lengths: Int[Array, " b"] | None = None
    context: Context | None = None


class JiTNetwork(nnx.Module):
    """F(x, c_noise, condition, augmentation label); published: c_noise is the time in [0, 1]."""

    def __init__(self, config: JiT, shapes: Shapes, *, rngs: nnx.Rngs):
        self.config, self.dtype = config, jnp.dtype(config.dtype)
        wide = functools.partial(dense, dtype=jnp.dtype("float32"), rngs=rngs)
        tokens = functools.partial(dense, dtype=self.dtype, rngs=rngs)
        hidden, labels = config.hidden, config.augment_labels
        patch, cell = (config.patch // config.pixel_fold) ** 2, config.pixel_fold**2

        gate = float(config.init == "open")
        in_time, in_class = (None, UNIT) if gate else (SMALL, SMALL)
        self.time0 = wide(FREQUENCIES, hidden, init=in_time)
        self.time1 = wide(hidden, hidden, init=in_time)
        # The last row is the null class.
        self.sizes = sizes_of(shapes.condition)
        rows = self.sizes.classes + 1
        self.class_table = nnx.Param(in_class(rngs.params(), (rows, hidden)))
        self.augment = (
            wide(labels, hidden, init=nnx.initializers.zeros, use_bias=False) if labels else None
        )
        in_pixel, out_pixel = shapes.channels_in * cell, shapes.channels_out * cell
        if config.stem_blocks or config.head_blocks:
            self.pixels = pixel_blocks.Pixels(
                in_pixel,
                out_pixel,
                channels=config.pixel_channels,
                conditions=hidden,
                stem_blocks=config.stem_blocks,
                head_blocks=config.head_blocks,
                head_kernel=config.head_kernel,
                gate=gate,
                dtype=self.dtype,
                rngs=rngs,
            )
            if config.stem_blocks:
                in_pixel = config.pixel_channels
            if config.head_blocks:
                out_pixel = config.pixel_channels
        self.embed0 = tokens(in_pixel * patch, config.bottleneck, use_bias=False)
        self.embed1 = tokens(config.bottleneck, hidden)
        # Without classes their tokens would be constants; a network without captions has them, as
        # published.
        has_classes = self.sizes.classes or not self.sizes.tokens
        self.class_tokens = config.class_tokens if has_classes else 0
        if self.class_tokens:
            shape = (self.class_tokens, hidden)
            self.class_positions = nnx.Param(SMALL(rngs.params(), shape))
        cross = bool(self.sizes.tokens) and config.text == "cross"
        for i in range(config.depth):
            in_middle = config.depth // 4 <= i < config.depth // 4 * 3
            block = transformer_layers.Block(
                hidden,
                config.heads,
                config.mlp_width,
                dropout=config.dropout if in_middle else 0.0,
                gate=gate,
                cross=cross and i >= config.class_tokens_from,
                dtype=self.dtype,
                rngs=rngs,
            )
            setattr(self, f"block{i}", block)
        self.out_norm = transformer_layers.RMSNorm(hidden, dtype=self.dtype, rngs=rngs)
        self.out_modulation = wide(hidden, 2 * hidden, init=nnx.initializers.zeros)
        # A head on pixels has a last layer of zeros of its own.
        last = None if config.head_blocks else nnx.initializers.zeros
        self.out = tokens(hidden, out_pixel * patch, init=last)
        if self.sizes.tokens:
            width = self.sizes.width
            self.text_vector = wide(width, hidden, init=in_time, use_bias=False)
            self.text = CaptionContext(width, hidden, dtype=self.dtype, rngs=rngs)

    def _embeddings(
        self,
        time: Float[Array, " b"],
        condition: Float[Array, "b k"] | None,
        caption: Caption | None,
        augment_label: Float[Array, "b a"] | None,
    ) -> tuple[Float[Array, "b e"], Float[Array, "b e"]]:
        """Of the class; of class, caption, time and augmentation together."""
        table = self.class_table[...]
        classes = jnp.broadcast_to(table[-1], (len(time), table.shape[1]))
        if condition is not None:  # an all-zero condition is the null class
            null = 1 - condition.sum(1, keepdims=True)
            classes = jnp.concatenate([condition, null], axis=1) @ table
        embedded = layers.positional_embedding(time, FREQUENCIES)
        total = self.time1(nnx.silu(self.time0(embedded))) + classes
        if caption is not None:
            total = total + self.text_vector(caption.vector)
        if self.augment is not None and augment_label is not None:
            total = total + self.augment(augment_label)
        return classes, total

    def _run(
        self,
        number: int,
        x: Float[Array, "b n c"],
        emb: Float[Array, "b e"],
        others: _Others,
        keys: Key[Array, " b"] | None,
    ) -> Float[Array, "b n c"]:
        block = getattr(self, f"block{number}")

        def run(x: Array, emb: Array, keys: Any, lengths: Any, context: Any) -> Array:
            keys = transformer_layers.folded(keys, number)
            return block(x, emb, others.rotary, keys, lengths, context)

        return REMAT[self.config.remat](run)(x, emb, keys, others.lengths, others.context)

    def _tokens(
        self,
        patches: Float[Array, "b h w k"],
        classes: Float[Array, "b c"],
        emb: Float[Array, "b e"],
        caption: Caption | None,
        keys: Key[Array, " b"] | None,
    ) -> Float[Array, "b h w c"]:
        """Runs the blocks on the patches' values.

        Tokens are the class's, the image's, then the caption's, of which some may be padding.
        """
        config, first = self.config, 0
        b, h, w, _ = patches.shape
        x = self.embed1(self.embed0(patches.reshape(b, h * w, -1)))
        x = x + sine_cosine(h, w, config.hidden).astype(x.dtype)
        others = _Others(Rotary.of(h, w, config.hidden // config.heads))
        for i in range(config.depth):
            if i == config.class_tokens_from:
                x, others = self._joined(x, (h, w), classes, caption)
                first = self.class_tokens
            x = self._run(i, x, emb, others, keys)
        return x[:, first : first + h * w].reshape(b, h, w, -1)

    def _joined(
        self,
        x: Float[Array, "b n c"],
        grid: tuple[int, int],
        classes: Float[Array, "b c"],
        caption: Caption | None,
    ) -> tuple[Float[Array, "b m c"], _Others]:
        """The image's tokens, a grid row by row, with those of class and caption."""
        before, after, lengths = self.class_tokens, 0, None
        context = None if caption is None else self.text(caption)
        if before:
            tokens = classes[:, None] + self.class_positions[...]
            x = jnp.concatenate([tokens.astype(x.dtype), x], axis=1)
        if context is not None and self.config.text == "context":
            after, lengths = context.tokens.shape[1], x.shape[1] + context.lengths
            x, context = jnp.concatenate([x, context.tokens], axis=1), None
        width = self.config.hidden // self.config.heads
        rotary = Rotary.of(*grid, width, before=before, after=after)
        return x, _Others(rotary, lengths, context)

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
          condition: a one-hot vector per image, or the tree of `conditions.Text`; all zero (or
            None) is the null condition.
          augment_label: None is the label of an image that was not augmented.
          dropout_keys: one key per image, for training; None switches dropout off.

        Returns:
          float32 of x's height and width, with `Shapes.channels_out` channels.
        """
        config = self.config
        condition, caption = parts_of(condition, self.sizes, len(x))
        classes, emb = self._embeddings(noise_label, condition, caption, augment_label)
        emb = nnx.silu(emb)
        fold, patch = config.pixel_fold, config.patch // config.pixel_fold
        x = resampling.space_to_depth(x.astype(self.dtype), fold)
        has_pixels = bool(config.stem_blocks or config.head_blocks)
        pixels = self.pixels.before(x, emb) if has_pixels else x
        patches = pixels if config.stem_blocks else x
        patches = resampling.space_to_depth(patches, patch)
        h = self._tokens(patches, classes, emb, caption, dropout_keys)
        shift, scale = jnp.split(self.out_modulation(emb), 2, axis=-1)
        h = self.out(self.out_norm(h, scale, shift))
        if config.head_blocks:
            out = self.pixels.after(pixels, resampling.depth_to_space(h, patch))
        else:
            out = resampling.depth_to_space(h.astype(jnp.float32), patch)
            out = out + self.pixels.after(pixels) if config.stem_blocks else out
        return resampling.depth_to_space(out, fold)
