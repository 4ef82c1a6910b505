"""Layers of the transformer's blocks of tokens.

Tokens are (b, n, c). Parameters, modulation, normalisation and softmax are float32, tokens `dtype`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float, Int, Key

from rdm_jax.models import layers
from rdm_jax.models.attention import (
    Context,
    attend,
    attend_positioned_on_tpu,
    kernel_on_tpu,
)
from rdm_jax.models.initializers import Xavier
from rdm_jax.models.positions import Rotary, halves
from rdm_jax.models.tpu_attention_kernels import HeadGroups

EPSILON = 1e-6
ZERO = nnx.initializers.zeros


def dense(
    c_in: int,
    c_out: int,
    *,
    init: Any = None,
    bias: Any = ZERO,
    use_bias: bool = True,
    dtype: jnp.dtype,
    rngs: nnx.Rngs,
) -> "Linear":
    """A linear layer with Xavier's uniform kernel, or another, and a bias of 0, or another."""
    return Linear(
        c_in,
        c_out,
        use_bias=use_bias,
        dtype=dtype,
        kernel_init=init or Xavier().kernel,
        bias_init=bias,
        rngs=rngs,
    )


class Linear(nnx.Linear):
    """Flax's layer, in bfloat16 with the gradients of `linear`."""

    def __call__(self, x: Float[Array, "*n c"]) -> Float[Array, "*n c2"]:  # type: ignore[override]
        """Of the layer's dtype."""
        if self.bias is None or self.dtype != jnp.bfloat16:
            return super().__call__(x)
        return linear(x.astype(self.dtype), self.kernel[...], self.bias[...])


@jax.custom_vjp
def linear(
    x: Float[Array, "b *n c"], kernel: Float[Array, "c d"], bias: Float[Array, " d"]
) -> Float[Array, "b *n d"]:
    """x kernel + bias, of x's dtype. The bias, float32, is added in float32.

    Its gradient is a product with ones: the matrix unit sums over tokens while the vector units,
    which limit sums over 128 lanes, are free. In float32 it is, too, up to the order of the sums.
    """
    y = x @ kernel.astype(x.dtype)
    return (y.astype(jnp.float32) + bias).astype(x.dtype)


def _linear_forward(x: Array, kernel: Array, bias: Array) -> tuple[Array, tuple[Array, Array]]:
    return linear(x, kernel, bias), (x, kernel)


def _linear_backward(residuals: tuple[Array, Array], g: Array) -> tuple[Array, Array, Array]:
    x, kernel = residuals
    lead = tuple(range(x.ndim - 1))

    def over_tokens(a: Array) -> Array:
        return jax.lax.dot_general(
            a, g, ((lead, lead), ((), ())), preferred_element_type=jnp.float32
        )

    rows = 8  # what the unit takes at once; one row would be compiled as a plain sum
    d_bias = over_tokens(jnp.ones((*x.shape[:-1], rows), g.dtype))[0]
    return g @ kernel.astype(g.dtype).T, over_tokens(x), d_bias


linear.defvjp(_linear_forward, _linear_backward)


class RMSNorm(nnx.Module):
    """Divides each token by its root mean square (arXiv 1910.07467), in float32."""

    def __init__(self, channels: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.dtype = dtype
        self.scale = nnx.Param(jnp.ones(channels))

    def __call__(
        self,
        x: Float[Array, "b *n c"],
        scale: Float[Array, "b *n2 c"] | None = None,
        shift: Float[Array, "b *n2 c"] | None = None,
    ) -> Float[Array, "b *n c"]:
        """Normalises x, then multiplies it by 1 + `scale` and adds `shift`, if any."""
        normalised = unit_rms(x) * self.scale[...]
        if scale is not None and shift is not None:
            normalised = normalised * (1 + per_token(scale, x)) + per_token(shift, x)
        return normalised.astype(self.dtype)


def unit_rms(x: Float[Array, "*n c"]) -> Float[Array, "*n c"]:
    """x divided by its root mean square over the channels; float32."""
    wide = x.astype(jnp.float32)
    return wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + EPSILON)


def per_token(modulation: Float[Array, "b *n c"], x: Float[Array, "b *m c"]) -> Array:
    """One vector per image for all its tokens or pixels; a modulation of each stays as it is."""
    if modulation.ndim == x.ndim:
        return modulation
    return modulation.reshape(len(x), *(1,) * (x.ndim - 2), -1)


def dropout(
    x: Float[Array, "b n c"], rate: float, keys: Key[Array, " b"] | None
) -> Float[Array, "b n c"]:
    """Zeroes a share of the values, of each image by its own key; without keys, none."""
    return layers.dropout(x[:, :, None], rate, keys)[:, :, 0]


def folded(keys: Key[Array, " b"] | None, number: int) -> Key[Array, " b"] | None:
    """Each image's key for the use of this number."""
    return None if keys is None else jax.vmap(jax.random.fold_in, (0, None))(keys, number)


def open_gates(parts: int, value: float) -> Any:
    """Initializes a bias of [shift, scale, gate] x parts: gates with `value`, all else with 0."""

    def bias(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        one = jnp.asarray([0, 0, value], dtype)
        return jnp.repeat(jnp.tile(one, parts), shape[0] // parts // 3)

    return bias


class Attention(nnx.Module):
    """Self-attention of tokens, with norms of queries and keys, and rotary positions."""

    def __init__(
        self, channels: int, heads: int, *, dropout: float, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        self.heads, self.dropout = heads, dropout
        self.q_norm = RMSNorm(channels // heads, dtype=dtype, rngs=rngs)
        self.k_norm = RMSNorm(channels // heads, dtype=dtype, rngs=rngs)
        self.qkv = dense(channels, 3 * channels, dtype=dtype, rngs=rngs)
        self.proj = dense(channels, channels, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "b n c"],
        rotary: Rotary,
        keys: Key[Array, " b"] | None,
        lengths: Int[Array, " b"] | None = None,
    ) -> Float[Array, "b n c"]:
        """Attends over all tokens of each image, or over its first ones, so many as `lengths`."""
        groups = HeadGroups(self.heads, x.shape[2] // self.heads)
        # The kernel attends over all tokens.
        if lengths is None and kernel_on_tpu(self.qkv.dtype, x.shape[1], groups):
            return dropout(self._on_tpu(x, rotary, groups), self.dropout, keys)
        q, k, v = (a.reshape(*a.shape[:2], self.heads, -1) for a in self._projected(x))
        q = self._positioned(q, self.q_norm, rotary)
        k = self._positioned(k, self.k_norm, rotary)
        out = self.proj(attend(q, k, v, lengths).reshape(x.shape))
        return dropout(out, self.dropout, keys)

    def _on_tpu(
        self, x: Float[Array, "b n c"], rotary: Rotary, heads: HeadGroups
    ) -> Float[Array, "b n c"]:
        """Columns of the weights are put into the order of the kernel, which does the rest."""
        assert self.qkv.bias is not None and self.proj.bias is not None
        # Else the optimizer's state takes the layout of the new order, by copies in every step.
        kernel = with_layout_constraint(self.qkv.kernel[...], Layout(major_to_minor=(0, 1)))
        kernel, bias = (heads.columns_of_parts(a) for a in (kernel, self.qkv.bias[...]))
        scales = jnp.stack([heads.lanes(norm.scale[...]) for norm in (self.q_norm, self.k_norm)])
        turns = jnp.stack([heads.lanes(jnp.asarray(a)) for a in rotary.neighbours()])
        out = attend_positioned_on_tpu(linear(x, kernel, bias), scales, turns, heads)
        return linear(out, heads.rows(self.proj.kernel[...]), self.proj.bias[...])

    def _projected(self, x: Float[Array, "b n c"]) -> list[Array]:
        """Queries, keys and values. Columns are ([q, k, v], head, channel), as published.

        Products of q and k do not depend on the order of their channels, and rotation wants
        `halves`.
        """
        assert self.qkv.bias is not None
        dtype = self.qkv.dtype
        kernels = jnp.split(self.qkv.kernel[...].astype(dtype), 3, axis=-1)
        biases = jnp.split(self.qkv.bias[...].astype(dtype), 3, axis=-1)
        order = [lambda a: halves(a, self.heads)] * 2 + [lambda a: a]
        kernel = jnp.concatenate([f(a) for f, a in zip(order, kernels, strict=True)], axis=-1)
        bias = jnp.concatenate([f(a) for f, a in zip(order, biases, strict=True)], axis=-1)
        return jnp.split(x @ kernel + bias, 3, axis=-1)

    def _positioned(
        self, x: Float[Array, "b n k d"], norm: RMSNorm, rotary: Rotary
    ) -> Float[Array, "b n k d"]:
        return rotary(unit_rms(x) * halves(norm.scale[...])).astype(norm.dtype)


class CrossAttention(nnx.Module):
    """Attention of tokens to those of a caption, with norms of queries and keys.

    Args:
      gate: 0 for a last layer of zeros, so that captions join in slowly; 1 for a random one.
    """

    def __init__(self, channels: int, heads: int, *, gate: float, dtype: jnp.dtype, rngs: nnx.Rngs):
        kwargs: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        self.heads = heads
        self.norm = RMSNorm(channels, **kwargs)
        self.q_norm = RMSNorm(channels // heads, **kwargs)
        self.k_norm = RMSNorm(channels // heads, **kwargs)
        self.q = dense(channels, channels, **kwargs)
        self.kv = dense(channels, 2 * channels, **kwargs)
        self.proj = dense(channels, channels, init=None if gate else ZERO, **kwargs)

    def __call__(self, x: Float[Array, "b n c"], context: Context) -> Float[Array, "b n c"]:
        """The residual of x, for the caption's tokens of the same width."""

        def by_head(a: Array) -> Array:
            return a.reshape(*a.shape[:2], self.heads, -1)

        q = self.q_norm(by_head(self.q(self.norm(x))))
        k, v = map(by_head, jnp.split(self.kv(context.tokens), 2, axis=-1))
        attended = attend(q, self.k_norm(k), v, context.lengths)
        return self.proj(attended.reshape(x.shape))


class SwiGLU(nnx.Module):
    """w3(silu(a) b), [a, b] = w12(x) (arXiv 2002.05202)."""

    def __init__(
        self, channels: int, width: int, *, dropout: float, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        self.dropout = dropout
        self.w12 = dense(channels, 2 * width, dtype=dtype, rngs=rngs)
        self.w3 = dense(width, channels, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b n c"], keys: Key[Array, " b"] | None
    ) -> Float[Array, "b n c"]:
        """Of each token by itself."""
        if x.dtype == jnp.bfloat16:
            # Else a TPU computes the gradients' halves anew for each tile of a product with them.
            assert self.w12.bias is not None
            kernels, biases = (jnp.split(p[...], 2, -1) for p in (self.w12.kernel, self.w12.bias))
            a, b = map(functools.partial(linear, x), kernels, biases)
        else:
            a, b = jnp.split(self.w12(x), 2, axis=-1)
        return self.w3(dropout(nnx.silu(a) * b, self.dropout, keys))


class Block(nnx.Module):
    """Attention and SwiGLU, each normalised, modulated by the embedding and gated (adaLN-zero,
    arXiv 2212.09748).

    Args:
      gate: first value of the gates; 0 in adaLN-zero.
      cross: whether it attends to a caption in between.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        mlp_width: int,
        *,
        dropout: float,
        gate: float = 0.0,
        cross: bool = False,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        kwargs: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        self.norm1 = RMSNorm(channels, **kwargs)
        self.attention = Attention(channels, heads, dropout=dropout, **kwargs)
        self.norm2 = RMSNorm(channels, **kwargs)
        self.mlp = SwiGLU(channels, mlp_width, dropout=dropout, **kwargs)
        wide = jnp.dtype("float32")
        self.modulation = dense(
            channels, 6 * channels, init=ZERO, bias=open_gates(2, gate), dtype=wide, rngs=rngs
        )
        self.cross = CrossAttention(channels, heads, gate=gate, **kwargs) if cross else None

    def __call__(
        self,
        x: Float[Array, "b n c"],
        emb: Float[Array, "b c"],
        rotary: Rotary,
        keys: Key[Array, " b"] | None = None,
        lengths: Int[Array, " b"] | None = None,
        context: Context | None = None,
    ) -> Float[Array, "b n c"]:
        """Runs the block.

        Args:
          x: tokens.
          emb: modulates them.
          rotary: their positions.
          keys: one per image; they enable dropout.
          lengths: numbers of each image's tokens, its first ones, if they are not all of x.
          context: what a block with `cross` attends to.
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(self.modulation(emb), 6, axis=-1)
        attended = self.attention(self.norm1(x, scale1, shift1), rotary, folded(keys, 0), lengths)
        x = gated(x, gate1, attended)
        if self.cross is not None and context is not None:
            x = x + self.cross(x, context)
        return gated(x, gate2, self.mlp(self.norm2(x, scale2, shift2), folded(keys, 1)))


def gated(
    x: Float[Array, "b *n c"], gate: Float[Array, "b *m c"], branch: Float[Array, "b *n c"]
) -> Float[Array, "b *n c"]:
    """x + gate branch, in float32, rounded to x's dtype."""
    total = x.astype(jnp.float32) + per_token(gate, x) * branch.astype(jnp.float32)
    return total.astype(x.dtype)
