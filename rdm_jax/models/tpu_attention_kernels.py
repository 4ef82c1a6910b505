"""What a TPU computes for `tpu_attention`: its kernels, for one image and group of heads.

Logits are in units of log 2, so that 2^x, which the chip has, needs no factors: queries are
multiplied by log2(e) / sqrt(d) before they are rounded.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

LANES = 128
EPSILON = 1e-6  # of the norms of queries and keys
_Q, _K, _V = (slice(i * LANES, (i + 1) * LANES) for i in range(3))  # of a group's columns
_SUBLANES = 8


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


def head_rows(heads: HeadGroups) -> int:
    """Rows of arrays that have one per head of a group."""
    return -(-heads.size // _SUBLANES) * _SUBLANES


def forward(qkv: Any, *refs: Any, heads: HeadGroups, rows: int) -> None:
    """Attention, for some rows of queries at a time."""
    *positions, out, sums, qk, sums_of_lanes = refs
    n = qk.shape[0]
    _for_each(lambda at: _prepare(qkv, positions, qk, None, at, heads), n, rows)
    k, v = qk[:, _K], qkv[0, :, _V]

    def attend(at: Any) -> None:
        q = qk[at, _Q]
        result = jnp.zeros((rows, LANES), jnp.float32)
        most, total = jnp.zeros_like(result), jnp.ones_like(result)
        for lanes in _lanes_of_heads(rows, heads):
            logits = _product(jnp.where(lanes, q, 0), k, 1, 1)
            most_of_head = jnp.max(logits, axis=1, keepdims=True)
            weights = jnp.exp2(logits - most_of_head)
            result = jnp.where(lanes, _product(weights.astype(v.dtype), v, 1, 0), result)
            total = jnp.where(lanes, jnp.sum(weights, axis=1, keepdims=True), total)
            most = jnp.where(lanes, most_of_head, most)
        out[0, at, :] = (result / total).astype(out.dtype)
        sums_of_lanes[at, :] = most + jnp.log(total) * math.log2(math.e)

    _for_each(attend, n, rows)
    first = _lane_table(heads, lambda lane, row: lane == row * heads.width)
    sums[0, 0] = _rows_from_columns(first, sums_of_lanes[...])


def backward(
    qkv: Any, out: Any, sums: Any, gradient: Any, *refs: Any, heads: HeadGroups, rows: int
) -> None:
    """Gradients of attention, for some rows of keys at a time; logits are (keys, queries).

    With a query's sum, and the mean of its weights' gradients, in a lane each, rows of logits need
    no reductions, and of five products one alone is that of a transposed matrix.
    """
    if len(refs) == 3:
        positions: list[Any] = []
        (d_qkv, qk, d_qk), factors, d_scales = refs, None, None
    else:
        *positions, d_qkv, d_scales, qk, d_qk, factors = refs
        d_scales[...] = jnp.zeros_like(d_scales)
    n = qk.shape[0]
    _for_each(lambda at: _prepare(qkv, positions, qk, factors, at, heads), n, rows)
    # The softmax's own gradient: g_p - sum(p g_p), where the sum is that of g and out.
    of_head = _lane_table(
        heads, lambda lane, row: (lane >= row * heads.width) & (lane < (row + 1) * heads.width)
    )
    g_out = gradient[0].astype(jnp.float32) * out[0].astype(jnp.float32)
    means = _rows_from_columns(of_head, g_out)
    d_qk[:, _Q] = jnp.zeros((n, LANES), jnp.float32)

    def attend(at: Any) -> None:
        q, g, k, v = qk[:, _Q], gradient[0], qk[at, _K], qkv[0, at, _V]
        dk, dv, dq = (jnp.zeros((m, LANES), jnp.float32) for m in (rows, rows, n))
        masks = zip(_lanes_of_heads(n, heads), _lanes_of_heads(rows, heads), strict=True)
        for i, (lanes, lanes_of_keys) in enumerate(masks):
            q_head, g_head = jnp.where(lanes, q, 0), jnp.where(lanes, g, 0)
            weights = jnp.exp2(_product(k, q_head, 1, 1) - sums[0, 0, i : i + 1, :])
            d_logits = weights * (_product(v, g_head, 1, 1) - means[i : i + 1])
            d_logits = d_logits.astype(q.dtype)
            dv += _product(weights.astype(q.dtype), g_head, 1, 0)
            dk += _product(d_logits, q_head, 1, 0)
            dq += _product(d_logits, jnp.where(lanes_of_keys, k, 0), 0, 0)
        d_qk[:, _Q] += dq
        d_qk[at, _K] = dk
        d_qkv[0, at, _V] = dv.astype(d_qkv.dtype)

    _for_each(attend, n, rows)

    def finish(at: Any) -> None:
        _gradients(qkv, positions, d_qk, factors, d_qkv, d_scales, at, heads)

    _for_each(finish, n, rows)


def _prepare(qkv: Any, positions: Any, qk: Any, factors: Any, at: Any, heads: HeadGroups) -> None:
    """Queries and keys as the logits need them; `factors` keeps what the norms multiply by."""
    for i, lanes in enumerate((_Q, _K)):
        x, unit_of_logits = qkv[0, at, lanes].astype(jnp.float32), _unit_of_logits(i, heads)
        if positions:
            scales, turns = positions
            factor = jax.lax.rsqrt(_mean_of_head(x * x, heads, qk.dtype) + EPSILON)
            if factors is not None:
                factors[at, lanes] = factor
            x = x * factor * (scales[i : i + 1] * unit_of_logits)
            x = _turned(x, turns[0, at], turns[1, at])
        else:
            x = x * unit_of_logits
        qk[at, lanes] = x.astype(qk.dtype)


def _gradients(
    qkv: Any,
    positions: Any,
    d_qk: Any,
    factors: Any,
    d_qkv: Any,
    d_scales: Any,
    at: Any,
    heads: HeadGroups,
) -> None:
    """The gradients of what `_prepare` reads."""
    for i, lanes in enumerate((_Q, _K)):
        d, unit_of_gradients = d_qk[at, lanes], _unit_of_logits(i, heads) * math.log(2)
        if positions:
            scales, turns = positions
            factor = factors[at, lanes]
            normalised = qkv[0, at, lanes].astype(jnp.float32) * factor
            d = _turned(d, turns[0, at], -turns[1, at])
            total = jnp.sum(d * normalised, axis=0, keepdims=True)
            d_scales[0, 0, i : i + 1, :] += total * unit_of_gradients
            d = d * (scales[i : i + 1] * unit_of_gradients)
            d = factor * (d - normalised * _mean_of_head(d * normalised, heads, d_qkv.dtype))
        else:
            d = d * unit_of_gradients
        d_qkv[0, at, lanes] = d.astype(d_qkv.dtype)


def _unit_of_logits(part: int, heads: HeadGroups) -> float:
    """What queries (part 0) are multiplied by: log2(e) / sqrt(d); keys are left as they are."""
    return 1.0 if part else math.log2(math.e) * heads.width**-0.5


def _mean_of_head(x: Array, heads: HeadGroups, dtype: Any) -> Array:
    """The mean over a head's lanes, in each of them, by the matrix unit.

    In bfloat16 the values are rounded, which the mean of many is hardly affected by.
    """
    row, lane = (
        jax.lax.div(jax.lax.broadcasted_iota(jnp.int32, (LANES, LANES), axis), heads.width)
        for axis in (0, 1)
    )
    same = jnp.where(row == lane, 1.0, 0.0)
    return _product(x.astype(dtype), same.astype(dtype), 1, 0) / heads.width


def _turned(x: Array, cos: Array, sin: Array) -> Array:
    """x cos + neighbour sin, where lanes 2 i and 2 i + 1 are neighbours."""
    from jax.experimental.pallas import tpu as pltpu

    lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    after, before = pltpu.roll(x, LANES - 1, 1), pltpu.roll(x, 1, 1)
    return x * cos + jnp.where(lane % 2 == 0, after, before) * sin


def _product(a: Array, b: Array, axis_a: int, axis_b: int, precision: Any = None) -> Array:
    """A matrix product over the named axes, in float32."""
    return jax.lax.dot_general(
        a,
        b,
        (((axis_a,), (axis_b,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def _lane_table(heads: HeadGroups, holds: Any) -> Array:
    """(rows, 128) float32: 1 where a condition on lane and row holds."""
    shape = (head_rows(heads), LANES)
    row, lane = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    return jnp.where(holds(lane, row), 1.0, 0.0)


def _rows_from_columns(table: Array, x: Array) -> Array:
    """(rows, n): the sums over lanes that the table has, as exact as float32."""
    return _product(table, x, 1, 1, jax.lax.Precision.HIGHEST)


def _lanes_of_heads(rows: int, heads: HeadGroups) -> list[Array]:
    """For each head of a group, which of (rows, 128) values are in its lanes."""
    lane = jax.lax.broadcasted_iota(jnp.int32, (rows, LANES), 1)
    width = heads.width
    return [(lane >= i * width) & (lane < (i + 1) * width) for i in range(heads.size)]


def _for_each(function: Any, n: int, rows: int) -> None:
    """Calls a function for every `rows` rows; a few are unrolled."""
    from jax.experimental import pallas as pl

    count = n // rows
    if count <= 2:
        for i in range(count):
            function(pl.ds(i * rows, rows))
    else:
        jax.lax.fori_loop(0, count, lambda i, _: function(pl.ds(i * rows, rows)), None)
