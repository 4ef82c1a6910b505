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
EPSILON = 1e-6  # of the norms of queries and keys
_PARTS = tuple(slice(i * LANES, (i + 1) * LANES) for i in range(3))  # q, k, v of a group
_ROWS = 16  # of bfloat16 values in a vector register
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
        x = jnp.moveaxis(x.reshape(*x.shape[:-1], self.heads * self.width, 3), -1, -2)
        return self.columns_of_parts(x.reshape(*x.shape[:-2], -1))

    def columns_of_parts(self, x: Float[Array, "*k c3"]) -> Float[Array, "*k g3"]:
        """From columns ([q, k, v], head, channel) to (group, [q, k, v], lane); others are zero."""
        *lead, _ = x.shape
        x = x.reshape(*lead, 3, self.heads, self.width)
        x = self._padded(x, x.ndim - 2, self.count * self.size)
        x = self._padded(x.reshape(*lead, 3, self.count, -1), x.ndim - 1, LANES)
        return jnp.moveaxis(x, -3, -2).reshape(*lead, 3 * self.count * LANES)

    def lanes(self, x: Float[Array, "*k d"]) -> Float[Array, "*k 128"]:
        """Values of a head's channels for the lanes of a group; others are zero."""
        x = jnp.tile(x, (1,) * (x.ndim - 1) + (self.size,))
        return self._padded(x, x.ndim - 1, LANES)

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
        and pixels % _ROWS == 0
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
    (out,) = _call(_forward_kernel, (qkv,), (), heads, interpret)
    return out


def _attention_forward(
    qkv: Array, heads: HeadGroups, interpret: bool
) -> tuple[Array, tuple[Array, Array]]:
    out = attention(qkv, heads, interpret)
    return out, (qkv, out)


def _attention_backward(
    heads: HeadGroups, interpret: bool, residuals: tuple[Array, Array], gradient: Array
) -> tuple[Array]:
    (d_qkv,) = _call(_backward_kernel, (*residuals, gradient), (), heads, interpret)
    return (d_qkv,)


attention.defvjp(_attention_forward, _attention_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def positioned_attention(
    qkv: Float[Array, "b n g3"],
    scales: Float[Array, "2 128"],
    turns: Float[Array, "2 n 128"],
    heads: HeadGroups,
    interpret: bool = False,
) -> Float[Array, "b n g"]:
    """`attention` of queries and keys that the kernel normalises and turns, in float32.

    They are divided by their root mean square over a head's channels, multiplied by `scales`, and
    turned: neighbours (x1, x2) become (x1 cos - x2 sin, x2 cos + x1 sin). Their gradients pass
    through all of it in the kernel, so that nothing of it is ever in memory.

    Args:
      qkv: see `attention`.
      scales: float32, of queries and of keys, for the lanes of a group.
      turns: float32, of each token and lane of a group: cos; sin, negative in even lanes. They have
        no gradient.
      heads, interpret: see `attention`.
    """
    (out,) = _call(_positioned_forward_kernel, (qkv,), (scales, turns), heads, interpret)
    return out


def _positioned_forward(
    qkv: Array, scales: Array, turns: Array, heads: HeadGroups, interpret: bool
) -> tuple[Array, tuple[Array, Array, Array, Array]]:
    out = positioned_attention(qkv, scales, turns, heads, interpret)
    return out, (qkv, out, scales, turns)


def _positioned_backward(
    heads: HeadGroups, interpret: bool, residuals: tuple[Array, Array, Array, Array], gradient: Array
) -> tuple[Array, Array, Array]:
    qkv, out, *shared = residuals
    arrays = (qkv, out, gradient)
    d_qkv, d_scales = _call(_positioned_backward_kernel, arrays, tuple(shared), heads, interpret)
    d_scales = d_scales.reshape(-1, 2, heads.count, LANES).sum((0, 2))
    return d_qkv, d_scales, jnp.zeros_like(shared[1])


positioned_attention.defvjp(_positioned_forward, _positioned_backward)


def _call(
    kernel: Any,
    arrays: tuple[Array, ...],
    shared: tuple[Array, ...],
    heads: HeadGroups,
    interpret: bool,
) -> list[Array]:
    """Runs a kernel on each image and group; `shared` are the same for all of them."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    (b, n, _), groups, dtype = arrays[0].shape, heads.count, arrays[0].dtype
    backward = kernel in (_backward_kernel, _positioned_backward_kernel)
    results = [jax.ShapeDtypeStruct((b, n, groups * LANES * (3 if backward else 1)), dtype)]
    if shared and backward:  # gradients of `scales`
        results.append(jax.ShapeDtypeStruct((b, 2, groups * LANES), jnp.float32))
    scratch = [pltpu.VMEM((n, 2 * LANES), dtype)] if shared else []
    if backward:
        scratch += [pltpu.VMEM((n, 2 * LANES), jnp.float32), pltpu.VMEM((n, LANES), jnp.float32)]

    def block(array: Any) -> pl.BlockSpec:
        return pl.BlockSpec((1, array.shape[1], array.shape[2] // groups), lambda i, j: (i, 0, j))

    def whole(array: Any) -> pl.BlockSpec:
        return pl.BlockSpec(array.shape, lambda i, j: (0,) * array.ndim)

    # The products as the matrix unit sees them, each over all 128 lanes of channels and keys.
    logits = b * groups * heads.size * n * -(-n // LANES) * LANES
    cost = pl.CostEstimate(
        flops=2 * (5 if backward else 2) * logits * LANES,
        bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*arrays, *shared, *results)),
        transcendentals=logits,
    )
    return pl.pallas_call(
        functools.partial(kernel, heads=heads, rows=_rows(n)),
        grid=(b, groups),
        in_specs=[block(array) for array in arrays] + [whole(array) for array in shared],
        out_specs=[block(result) for result in results],
        out_shape=results,
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=_VECTOR_MEMORY
        ),
        cost_estimate=cost,
        interpret=interpret,
        name="attend",
    )(*arrays, *shared)


def _rows(n: int) -> int:
    """Rows of logits at a time: a divisor of n."""
    return next(r for r in range(n, 0, -_ROWS) if n % r == 0 and r * n <= _LOGITS)


def _forward_kernel(qkv: Any, out: Any, *, heads: HeadGroups, rows: int) -> None:
    _forward(qkv.at[0], qkv, out, heads, rows)


def _positioned_forward_kernel(
    qkv: Any, scales: Any, turns: Any, out: Any, qk: Any, *, heads: HeadGroups, rows: int
) -> None:
    for i, lanes in enumerate(_PARTS[:2]):
        unit, _ = _unit(qkv[0, :, lanes], heads)
        qk[:, lanes] = _turned(unit * scales[i : i + 1], turns[0], turns[1]).astype(qk.dtype)
    _forward(qk, qkv, out, heads, rows)


def _forward(qk: Any, qkv: Any, out: Any, heads: HeadGroups, rows: int) -> None:
    q_lanes, k_lanes, v_lanes = _PARTS
    k, v = qk[:, k_lanes], qkv[0, :, v_lanes]

    def attend(start: Any) -> None:
        q = qk[_slice(start, rows), q_lanes]
        result = jnp.zeros((rows, LANES), jnp.float32)
        for lanes in _lanes_of_heads(rows, heads):
            weights, total = _softmax(jnp.where(lanes, q, 0), k, heads)
            result = jnp.where(lanes, _product(weights.astype(v.dtype), v, 1, 0) / total, result)
        out[0, _slice(start, rows), :] = result.astype(out.dtype)

    _for_each(attend, qkv.shape[1], rows)


def _backward_kernel(
    qkv: Any, out: Any, gradient: Any, d_qkv: Any, d_qk: Any, dv: Any, *, heads: Any, rows: int
) -> None:
    _backward(qkv.at[0], qkv, out, gradient, d_qk, dv, heads, rows)
    d_qkv[0, :, : 2 * LANES] = d_qk[...].astype(d_qkv.dtype)
    d_qkv[0, :, 2 * LANES :] = dv[...].astype(d_qkv.dtype)


def _positioned_backward_kernel(
    qkv: Any,
    out: Any,
    gradient: Any,
    scales: Any,
    turns: Any,
    d_qkv: Any,
    d_scales: Any,
    qk: Any,
    d_qk: Any,
    dv: Any,
    *,
    heads: HeadGroups,
    rows: int,
) -> None:
    for i, lanes in enumerate(_PARTS[:2]):
        unit, _ = _unit(qkv[0, :, lanes], heads)
        qk[:, lanes] = _turned(unit * scales[i : i + 1], turns[0], turns[1]).astype(qk.dtype)
    _backward(qk, qkv, out, gradient, d_qk, dv, heads, rows)
    for i, lanes in enumerate(_PARTS[:2]):
        unit, factor = _unit(qkv[0, :, lanes], heads)
        back = _turned(d_qk[:, lanes], turns[0], -turns[1])
        d_scales[0, i : i + 1, :] = jnp.sum(back * unit, axis=0, keepdims=True)
        back = back * scales[i : i + 1]
        back = factor * (back - unit * _mean_of_head(back * unit, heads))
        d_qkv[0, :, lanes] = back.astype(d_qkv.dtype)
    d_qkv[0, :, 2 * LANES :] = dv[...].astype(d_qkv.dtype)


def _backward(
    qk: Any, qkv: Any, out: Any, gradient: Any, d_qk: Any, dv: Any, heads: HeadGroups, rows: int
) -> None:
    """Writes the gradients of what `qk` holds and of v."""
    q_lanes, k_lanes, v_lanes = _PARTS
    k, v = qk[:, k_lanes], qkv[0, :, v_lanes]
    d_qk[...], dv[...] = jnp.zeros_like(d_qk), jnp.zeros_like(dv)

    def attend(start: Any) -> None:
        q, g = qk[_slice(start, rows), q_lanes], gradient[0, _slice(start, rows), :]
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
            d_qk[:, k_lanes] += _product(d_logits, q_head, 0, 0)
            dq = jnp.where(lanes, _product(d_logits, k, 1, 0), dq)
        d_qk[_slice(start, rows), q_lanes] = dq

    _for_each(attend, qkv.shape[1], rows)


def _unit(x: Array, heads: HeadGroups) -> tuple[Array, Array]:
    """x divided by its root mean square over a head's lanes, float32; and 1 over that."""
    x = x.astype(jnp.float32)
    factor = jax.lax.rsqrt(_mean_of_head(x * x, heads) + EPSILON)
    return x * factor, factor


def _mean_of_head(x: Array, heads: HeadGroups) -> Array:
    """The mean over a head's lanes, in each of them."""
    mean = jnp.zeros_like(x)
    for lanes in _lanes_of_heads(x.shape[0], heads):
        total = jnp.sum(jnp.where(lanes, x, 0), axis=1, keepdims=True)
        mean = jnp.where(lanes, total / heads.width, mean)
    return mean


def _turned(x: Array, cos: Array, sin: Array) -> Array:
    """x cos + neighbour sin, where lanes 2 i and 2 i + 1 are neighbours."""
    from jax.experimental.pallas import tpu as pltpu

    lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    after, before = pltpu.roll(x, LANES - 1, 1), pltpu.roll(x, 1, 1)
    return x * cos + jnp.where(lane % 2 == 0, after, before) * sin


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
