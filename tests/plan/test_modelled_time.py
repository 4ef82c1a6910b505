"""The modelled time of programs for a TPU against what is known of the chip; needs libtpu."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from rdm_jax.plan import modelled_time
from rdm_jax.plan.tpu_compile import one_chip
from rdm_jax.runtime import sharding

pytest.importorskip("libtpu")
SIDE = 4096


@functools.cache
def v5e():
    return one_chip("v5e")


def operations(function, *arrays):
    """Of the function's program for one v5e; `arrays` are (shape, dtype)."""
    chip, device = v5e()
    placed = sharding.replicated(sharding.make_mesh(devices=[device]))
    abstract = [jax.ShapeDtypeStruct(*array, sharding=placed) for array in arrays]
    text = jax.jit(function).lower(*abstract).compile().as_text()
    return modelled_time.operations(text, chip, package="tests")


def seconds(function, *arrays):
    return modelled_time.seconds(operations(function, *arrays), v5e()[0])


def product(a, b):
    return a @ b


SQUARE = ((SIDE, SIDE), jnp.bfloat16)


def test_large_matrix_product_takes_nearly_the_peak():
    found = operations(product, SQUARE, SQUARE)
    chip = v5e()[0]
    utilisation = 2 * SIDE**3 / modelled_time.seconds(found, chip) / chip.bfloat16
    assert 0.9 < utilisation <= 1
    assert list(modelled_time.by_kind(found)) == ["matrix product"]
    assert found[0].line.startswith("test_modelled_time.py:")
    assert found[0].line.endswith(" product")


def test_sum_of_large_arrays_is_bound_by_memory():
    array = ((8192, 8192), jnp.float32)
    bandwidth = 3 * 4 * 8192**2 / seconds(jnp.add, array, array)
    assert 0.4 < bandwidth / v5e()[0].bandwidth < 1


def test_loop_counts_its_trips():
    def looped(a, b):
        return jax.lax.scan(lambda a, _: (a @ b, None), a, None, length=7)[0]

    once, found = seconds(product, SQUARE, SQUARE), operations(looped, SQUARE, SQUARE)
    products = [operation for operation in found if operation.kind == "matrix product"]
    assert modelled_time.seconds(products, v5e()[0]) == pytest.approx(7 * once, rel=0.1)


def test_conditional_counts_its_costliest_branch():
    def branched(take, a, b):
        return jax.lax.cond(take, product, lambda a, b: a, a, b)

    once = seconds(product, SQUARE, SQUARE)
    assert once <= seconds(branched, ((), jnp.bool_), SQUARE, SQUARE) < 1.5 * once


def test_kernel_is_counted_by_its_own_cost():
    """A Pallas kernel carries no estimate of the compiler; it is at its roofline."""
    chip = v5e()[0]

    def kernel(a, out):
        out[...] = a[...] * 2

    def call(flops, size, a):
        cost = pl.CostEstimate(flops=flops, bytes_accessed=size, transcendentals=0)
        shape = jax.ShapeDtypeStruct(a.shape, a.dtype)
        return pl.pallas_call(kernel, out_shape=shape, cost_estimate=cost)(a)

    small = ((128, 128), jnp.float32)
    for flops, size, expected in ((10**12, 1, 10**12 / chip.bfloat16), (1, 10**9, 10**9 / 819e9)):
        found = seconds(functools.partial(call, flops, size), small)
        assert found == pytest.approx(expected, rel=0.1)
