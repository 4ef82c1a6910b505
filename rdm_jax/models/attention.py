"""Attention by the fastest implementation that the target has."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rdm_jax.models import target, tpu_attention
from rdm_jax.models.tpu_attention_kernels import HeadGroups


class Context(NamedTuple):
    """Tokens to attend to, of each image the first `lengths`, at least one."""

    tokens: Float[Array, "b n c"]
    lengths: Int[Array, " b"]


def attend(
    q: Float[Array, "b n k d"],
    k: Float[Array, "b m k d"],
    v: Float[Array, "b m k d"],
    lengths: Int[Array, " b"] | None = None,
) -> Float[Array, "b n k d"]:
    """softmax(q k^T / sqrt(d)) v for each head, softmax in float32.

    cuDNN's fused kernel where it applies, else XLA's. With lengths XLA's: cuDNN's mask has not been
    compared with it on a GPU.

    Args:
      q, k, v: queries, keys and values.
      lengths: int32, at least 1: of each image's keys the first so many count; None for all.
    """
    fused = (
        lengths is None
        and _knows_fused_attention()
        and q.dtype != jnp.float32
        and q.shape[-1] % 8 == 0
        and q.shape[-1] <= 128
    )
    return jax.nn.dot_product_attention(
        q, k, v, key_value_seq_lengths=lengths, implementation="cudnn" if fused else "xla"
    )


def kernel_on_tpu(dtype: Any, pixels: int, heads: HeadGroups) -> bool:
    """Whether `attend_on_tpu` is the fastest: on TPUs, for what the kernel takes."""
    return target.device().platform == "tpu" and tpu_attention.applies(dtype, pixels, heads)


def attend_on_tpu(qkv: Float[Array, "b n g3"], heads: HeadGroups) -> Float[Array, "b n g"]:
    """`tpu_attention.attention`, on each device for its own images."""
    return target.per_device(functools.partial(tpu_attention.attention, heads=heads))(qkv)


def attend_positioned_on_tpu(
    qkv: Float[Array, "b n g3"],
    scales: Float[Array, "2 128"],
    turns: Float[Array, "2 n 128"],
    heads: HeadGroups,
) -> Float[Array, "b n g"]:
    """`tpu_attention.positioned_attention`, on each device for its own images."""
    kernel = functools.partial(tpu_attention.positioned_attention, heads=heads)
    return target.per_device(kernel, shared=2)(qkv, scales, turns)


def contiguous(x: Float[Array, "*k c3"], *, heads: int) -> Float[Array, "*k c3"]:
    """From columns (head, channel in head, [q, k, v]) to ([q, k, v], head, channel in head)."""
    *lead, c = x.shape
    return jnp.moveaxis(x.reshape(*lead, heads, c // heads // 3, 3), -1, -3).reshape(x.shape)


def _knows_fused_attention() -> bool:
    """NVIDIA GPUs from Ampere on."""
    device = target.device()
    capability = getattr(device, "compute_capability", "") if device.platform == "gpu" else ""
    return capability[:1].isdecimal() and float(capability) >= 8
