"""Self-attention on TPUs: a Pallas kernel whose logits never leave the chip's vector memory.

Queries, keys and values of a group of heads lie side by side in the 128 lanes of the matrix unit,
as the projection writes them, so that nothing is copied or transposed around the kernel. The heads
of a group are told apart by setting the others' lanes to zero, which costs no matrix operations: a
product over fewer than 128 lanes takes as long as one over 128.

The forward pass needs softmax(q k^T / sqrt(d)) v of whole rows of logits; the backward pass
computes them again from its inputs and needs no other residuals (arXiv 2205.14135, section 3.1,
without the tiling over keys: the networks here have few enough pixels).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rdm_jax.models import tpu_attention_kernels as kernels
from rdm_jax.models.tpu_attention_kernels import LANES, HeadGroups

_ROWS = 16  # of bfloat16 values in a vector register
_LOGITS = 2**19  # values of the logits of one head that are in vector memory at a time
_MOST_PIXELS = 4096
_VECTOR_MEMORY = 64 * 2**20


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
    return _forward(heads, interpret, qkv)[0]


def _attention_forward(qkv: Array, heads: HeadGroups, interpret: bool) -> tuple[Array, Any]:
    out, sums = _forward(heads, interpret, qkv)
    return out, (qkv, out, sums)


def _attention_backward(
    heads: HeadGroups, interpret: bool, residuals: Any, gradient: Array
) -> tuple[Array, ...]:
    return _backward(heads, interpret, (*residuals, gradient))


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
    return _forward(heads, interpret, qkv, scales, turns)[0]


def _positioned_forward(
    qkv: Array, scales: Array, turns: Array, heads: HeadGroups, interpret: bool
) -> tuple[Array, Any]:
    out, sums = _forward(heads, interpret, qkv, scales, turns)
    return out, (qkv, out, sums, scales, turns)


def _positioned_backward(
    heads: HeadGroups, interpret: bool, residuals: Any, gradient: Array
) -> tuple[Array, Array, Array]:
    *arrays, scales, turns = residuals
    d_qkv, d_scales = _backward(heads, interpret, (*arrays, gradient), scales, turns)
    return d_qkv, d_scales.sum((0, 1)), jnp.zeros_like(turns)


positioned_attention.defvjp(_positioned_forward, _positioned_backward)


def _forward(
    heads: HeadGroups, interpret: bool, qkv: Array, *positions: Array
) -> tuple[Array, ...]:
    """The result, and of each row of logits log2(sum(2^logits)), which the gradients need."""
    b, n, _ = qkv.shape
    results = [
        jax.ShapeDtypeStruct((b, n, heads.count * LANES), qkv.dtype),
        jax.ShapeDtypeStruct((b, heads.count, kernels.head_rows(heads), n), jnp.float32),
    ]
    scratch = [((n, 2 * LANES), qkv.dtype), ((n, LANES), jnp.float32)]
    return _call(kernels.forward, (qkv,), positions, results, scratch, heads, interpret, 2)


def _backward(
    heads: HeadGroups, interpret: bool, arrays: tuple[Array, ...], *positions: Array
) -> tuple[Array, ...]:
    """The gradients of qkv and, for each image and group, of `scales`."""
    qkv, (b, n, _) = arrays[0], arrays[0].shape
    results = [jax.ShapeDtypeStruct(qkv.shape, qkv.dtype)]
    scratch = [((n, 2 * LANES), dtype) for dtype in (qkv.dtype, jnp.float32)]
    if positions:
        results.append(jax.ShapeDtypeStruct((b, heads.count, 2, LANES), jnp.float32))
        scratch.append(((n, 2 * LANES), jnp.float32))
    return _call(kernels.backward, arrays, positions, results, scratch, heads, interpret, 5)


def _call(
    kernel: Any,
    arrays: tuple[Array, ...],
    positions: tuple[Array, ...],
    results: list[Any],
    scratch: list[tuple[tuple[int, int], Any]],
    heads: HeadGroups,
    interpret: bool,
    products: int,
) -> tuple[Array, ...]:
    """Runs a kernel on each image and group; `positions` are the same for all of them."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    b, n, _ = arrays[0].shape

    def block(array: Any) -> pl.BlockSpec:
        if array.ndim == 4:  # (b, groups, rows, lanes)
            return pl.BlockSpec((1, 1, *array.shape[2:]), lambda i, j: (i, j, 0, 0))
        return pl.BlockSpec((1, n, array.shape[2] // heads.count), lambda i, j: (i, 0, j))

    def whole(array: Any) -> pl.BlockSpec:
        return pl.BlockSpec(array.shape, lambda i, j: (0,) * array.ndim)

    # The products as the matrix unit sees them, each over all 128 lanes of channels and keys.
    logits = b * heads.count * heads.size * n * -(-n // LANES) * LANES
    cost = pl.CostEstimate(
        flops=2 * products * logits * LANES,
        bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*arrays, *positions, *results)),
        transcendentals=logits,
    )
    call = pl.pallas_call(
        functools.partial(kernel, heads=heads, rows=_rows(n)),
        grid=(b, heads.count),
        in_specs=[block(array) for array in arrays] + [whole(array) for array in positions],
        out_specs=[block(result) for result in results],
        out_shape=results,
        scratch_shapes=[pltpu.VMEM(*of) for of in scratch],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=_VECTOR_MEMORY
        ),
        cost_estimate=cost,
        interpret=interpret,
        name="attend",
    )
    return tuple(call(*arrays, *positions))


def _rows(n: int) -> int:
    """Rows of logits at a time: a divisor of n."""
    return next(r for r in range(n, 0, -_ROWS) if n % r == 0 and r * n <= _LOGITS)
