"""Self-attention on TPUs: a Pallas kernel whose logits never leave the chip's vector memory.

Queries, keys and values of a group of heads lie side by side in the 128 lanes of the matrix unit,
as the projection writes them, so that nothing is copied or transposed around the kernel. The heads
of a group are told apart by setting the others' lanes to zero, which costs no matrix operations: a
product over fewer than 128 lanes takes as long as one over 128.

The forward pass needs softmax(q k^T / sqrt(d)) v of whole rows of logits; the backward pass
computes them again from its inputs and needs no other residuals (arXiv 2205.14135, section 3.1,
without the tiling over keys: the networks here have few enough pixels).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

LANES = 128
_LOGITS = 2**19  # values of the logits of one head that are in vector memory at a time
_MOST_PIXELS = 4096
_VECTOR_MEMORY = 64 * 2**20


@dataclasses.dataclass(frozen=True)
class HeadGroups:
    """Heads of `width` channels, as many to a group as 128 lanes hold.

    Attributes:
      heads: their number.
      width: channels of a head, at most 128.
    """

    heads: int
    width: int

    @property
    def size(self) -> int:
        """Heads in a group."""
        return LANES // self.width

    @property
    def count(self) -> int:
        """Groups; the last may have heads of zeros."""
        return -(-self.heads // self.size)

    def columns(self, x: Float[Array, "*k c3"]) -> Float[Array, "*k g3"]:
        """From columns (head, channel, [q, k, v]) to (group, [q, k, v], lane); others are zero."""
        *lead, _ = x.shape
        x = x.reshape(*lead, self.heads, self.width, 3)
        x = self._padded(x, x.ndim - 3, self.count * self.size)
        x = jnp.moveaxis(x.reshape(*lead, self.count, self.size * self.width, 3), -1, -2)
        return self._padded(x, x.ndim - 1, LANES).reshape(*lead, 3 * self.count * LANES)

    def rows(self, x: Float[Array, "*k c d"]) -> Float[Array, "*k g d"]:
        """From rows (head, channel) to (group, lane); others are zero."""
        *lead, _, d = x.shape
        x = x.reshape(*lead, self.heads, self.width, d)
        x = self._padded(x, x.ndim - 3, self.count * self.size)
        x = x.reshape(*lead, self.count, self.size * self.width, d)
        return self._padded(x, x.ndim - 2, LANES).reshape(*lead, self.count * LANES, d)

    @staticmethod
    def _padded(x: Array, axis: int, size: int) -> Array:
        return jnp.pad(x, [(0, size - s if i == axis else 0) for i, s in enumerate(x.shape)])


def applies(dtype: Any, pixels: int, heads: HeadGroups) -> bool:
    """Whether the kernel takes such heads: bfloat16, and pixels that fill the matrix unit.

    Below 256 pixels the logits are small, and XLA's attention is as fast.
    """
    return (
        dtype == jnp.bfloat16
        and heads.width <= LANES
        and pixels % LANES == 0
        and 2 * LANES <= pixels <= _MOST_PIXELS
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def attention(
    qkv: Float[Array, "b n g3"], heads: HeadGroups, interpret: bool = False
) -> Float[Array, "b n g"]:
    """softmax(q k^T / sqrt(d)) v of each head, softmax and sums in float32.

    Args:
      qkv: columns (group, [q, k, v], lane), see `HeadGroups.columns`.
      heads: of the columns.
      interpret: runs the kernel on any device, slowly, for tests.

    Returns:
      Of qkv's dtype, columns (group, lane).
    """
    return _call(_forward_kernel, (qkv,), qkv.shape[-1] // 3, heads, interpret, products=2)


def _attention_forward(
    qkv: Array, heads: HeadGroups, interpret: bool
) -> tuple[Array, tuple[Array, Array]]:
    out = attention(qkv, heads, interpret)
    return out, (qkv, out)


def _attention_backward(
    heads: HeadGroups, interpret: bool, residuals: tuple[Array, Array], gradient: Array
) -> tuple[Array]:
    qkv, out = residuals
    arrays, width = (qkv, out, gradient), qkv.shape[-1]
    return (_call(_backward_kernel, arrays, width, heads, interpret, products=5),)


attention.defvjp(_attention_forward, _attention_backward)


def _call(
    kernel: Any,
    arrays: tuple[Array, ...],
    width: int,
    heads: HeadGroups,
    interpret: bool,
    products: int,
) -> Array:
    """Runs a kernel on each image and group; the result has `width` columns."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    (b, n, _), groups = arrays[0].shape, heads.count
    result = jax.ShapeDtypeStruct((b, n, width), arrays[0].dtype)

    def block(array: Any) -> pl.BlockSpec:
        return pl.BlockSpec((1, n, array.shape[-1] // groups), lambda i, j: (i, 0, j))

    sums = [pltpu.VMEM((n, LANES), jnp.float32)] * 2 if kernel is _backward_kernel else []
    # The products as the matrix unit sees them, each over all 128 lanes.
    cost = pl.CostEstimate(
        flops=2 * products * b * groups * heads.size * n * n * LANES,
        bytes_accessed=sum(x.size * x.dtype.itemsize for x in arrays)
        + result.size * result.dtype.itemsize,
        transcendentals=b * groups * heads.size * n * n,
    )
    return pl.pallas_call(
        functools.partial(kernel, heads=heads, rows=_rows(n)),
        grid=(b, groups),
        in_specs=[block(array) for array in arrays],
        out_specs=block(result),
        out_shape=result,
        scratch_shapes=sums,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=_VECTOR_MEMORY
        ),
        cost_estimate=cost,
        interpret=interpret,
        name="attend",
    )(*arrays)


def _rows(n: int) -> int:
    """Rows of logits at a time: a divisor of n."""
    return next(r for r in range(n, 0, -LANES) if n % r == 0 and r * n <= _LOGITS)


def _forward_kernel(qkv: Any, out: Any, *, heads: HeadGroups, rows: int) -> None:
    k, v = qkv[0, :, LANES : 2 * LANES], qkv[0, :, 2 * LANES :]

    def attend(start: Any) -> None:
        q = qkv[0, _slice(start, rows), :LANES]
        result = jnp.zeros((rows, LANES), jnp.float32)
        for lanes in _lanes_of_heads(rows, heads):
            weights, total = _softmax(jnp.where(lanes, q, 0), k, heads)
            result = jnp.where(lanes, _product(weights.astype(v.dtype), v, 1, 0) / total, result)
        out[0, _slice(start, rows), :] = result.astype(out.dtype)

    _for_each(attend, qkv.shape[1], rows)


def _backward_kernel(
    qkv: Any, out: Any, gradient: Any, d_qkv: Any, dk: Any, dv: Any, *, heads: HeadGroups, rows: int
) -> None:
    k, v = qkv[0, :, LANES : 2 * LANES], qkv[0, :, 2 * LANES :]
    dk[...], dv[...] = jnp.zeros_like(dk), jnp.zeros_like(dv)

    def attend(start: Any) -> None:
        q, g = qkv[0, _slice(start, rows), :LANES], gradient[0, _slice(start, rows), :]
        g_out = g.astype(jnp.float32) * out[0, _slice(start, rows), :].astype(jnp.float32)
        dq = jnp.zeros((rows, LANES), jnp.float32)
        for lanes in _lanes_of_heads(rows, heads):
            q_head, g_head = jnp.where(lanes, q, 0), jnp.where(lanes, g, 0)
            weights, total = _softmax(q_head, k, heads)
            weights = weights / total
            # The softmax's own gradient: g_p - sum(p g_p), where the sum is that of g and out.
            mean = jnp.sum(jnp.where(lanes, g_out, 0), axis=1, keepdims=True)
            d_logits = weights * (_product(g_head, v, 1, 1) - mean) * heads.width**-0.5
            d_logits = d_logits.astype(q.dtype)
            dv[...] += _product(weights.astype(q.dtype), g_head, 0, 0)
            dk[...] += _product(d_logits, q_head, 0, 0)
            dq = jnp.where(lanes, _product(d_logits, k, 1, 0), dq)
        d_qkv[0, _slice(start, rows), :LANES] = dq.astype(d_qkv.dtype)

    _for_each(attend, qkv.shape[1], rows)
    d_qkv[0, :, LANES : 2 * LANES] = dk[...].astype(d_qkv.dtype)
    d_qkv[0, :, 2 * LANES :] = dv[...].astype(d_qkv.dtype)


def _softmax(q: Array, k: Array, heads: HeadGroups) -> tuple[Array, Array]:
    """exp(logits - their maximum), and its sum over each row."""
    logits = _product(q, k, 1, 1)
    most = jnp.max(logits, axis=1, keepdims=True)
    weights = jnp.exp((logits - most) * heads.width**-0.5)
    return weights, jnp.sum(weights, axis=1, keepdims=True)


def _product(a: Array, b: Array, axis_a: int, axis_b: int) -> Array:
    """A matrix product over the named axes, in float32."""
    numbers = (((axis_a,), (axis_b,)), ((), ()))
    return jax.lax.dot_general(a, b, numbers, preferred_element_type=jnp.float32)


def _lanes_of_heads(rows: int, heads: HeadGroups) -> list[Array]:
    """For each head of a group, which of (rows, 128) values are in its lanes."""
    lane = jax.lax.broadcasted_iota(jnp.int32, (rows, LANES), 1)
    width = heads.width
    return [(lane >= i * width) & (lane < (i + 1) * width) for i in range(heads.size)]


def _slice(start: Any, rows: int) -> Any:
    from jax.experimental import pallas as pl

    return pl.ds(start, rows)


def _for_each(function: Any, n: int, rows: int) -> None:
    """Calls a function for the first of every `rows` rows; a few are unrolled."""
    count = n // rows
    if count <= 2:
        for i in range(count):
            function(i * rows)
    else:
        jax.lax.fori_loop(0, count, lambda i, _: function(i * rows), None)
