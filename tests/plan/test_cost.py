"""The cost of a training against hand counts, the compiler, and real arrays."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest

from rdm_jax.config import Parallel
from rdm_jax.models.adm import ADM
from rdm_jax.models.conditions import Text
from rdm_jax.models.functional import functional, multiply_adds
from rdm_jax.plan.cost import (
    Exchange,
    block_bytes,
    residual_bytes,
    shard_bytes,
    step_seconds,
    training_cost,
)
from rdm_jax.runtime import sharding
from tests.support.plans import CLASSES, V5E, config, cut, program, replaced, shape
from tests.support.small_networks import shapes

# Multiply-adds


def convolve(x, kernel, groups=1):
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, kernel, (2, 2), "SAME", dimension_numbers=numbers, feature_group_count=groups
    )


def test_multiply_adds_of_convolutions_and_matrix_products():
    image = shape(2, 8, 6, 4)
    assert multiply_adds(convolve, image, shape(3, 3, 4, 10)) == (2 * 4 * 3 * 10) * (3 * 3 * 4)
    assert multiply_adds(lambda x, k: convolve(x, k, groups=2), image, shape(3, 3, 2, 10)) == (
        2 * 4 * 3 * 10
    ) * (3 * 3 * 2)

    def attend(q, k):
        return jnp.einsum("bnhd,bmhd->bhnm", q, k)

    assert multiply_adds(attend, shape(2, 5, 3, 7), shape(2, 11, 3, 7)) == 2 * 3 * 5 * 11 * 7
    assert multiply_adds(lambda x: jnp.sin(x) * x, image) == 0


def test_multiply_adds_within_other_functions():
    def product(x):
        return jnp.tanh(x @ x)

    def either(x):
        return jax.lax.cond(x[0, 0] > 0, lambda y: product(product(y)), product, x)

    square, once = shape(6, 6), 6**3
    assert multiply_adds(jax.jit(product), square) == once
    assert multiply_adds(jax.checkpoint(product), square) == once
    assert (
        multiply_adds(
            lambda x: jax.lax.scan(lambda c, _: (product(c), None), x, length=7)[0], square
        )
        == 7 * once
    )
    assert multiply_adds(jax.vmap(product), shape(3, 6, 6)) == 3 * once
    assert multiply_adds(either, square) == 2 * once
    with pytest.raises(ValueError, match="while loop"):
        multiply_adds(lambda x: jax.lax.while_loop(lambda y: y[0, 0] > 0, product, x), square)


def test_multiply_adds_of_backward_and_rematerialised_passes():
    def network(x, w):
        return jnp.sum((jnp.tanh(x @ w[0]) @ w[1]) ** 2)

    args, forward = (shape(5, 6), shape(2, 6, 6)), 2 * 5 * 6 * 6
    assert multiply_adds(network, *args) == forward
    assert multiply_adds(jax.grad(network, (0, 1)), *args) == 3 * forward
    again = multiply_adds(jax.grad(jax.checkpoint(network), (0, 1)), *args)
    assert 3 * forward < again <= 4 * forward  # of the forward pass, what the backward pass needs


@pytest.mark.parametrize(
    ("network", "side", "giga"),
    [
        # DiT's and EDM2's tables give 1120 and 110 Gflops (one a multiply-add) for these networks
        # (arXiv 2212.09748, 2312.02696).
        (
            ADM(
                channels=192,
                channel_mult=(1, 2, 3, 4),
                blocks=3,
                attention_levels=(1, 2, 3),
                remat="block",
            ),
            64,
            110,
        ),
        (
            ADM(
                channels=256, channel_mult=(1, 1, 2, 2, 4, 4), blocks=2, attention_levels=(3, 4, 5)
            ),
            256,
            1120,
        ),
    ],
    ids=["adm-64", "adm-256"],
)
def test_multiply_adds_of_published_networks(network, side, giga):
    net = functional(lambda rngs: network.build(shapes(3, 1000), rngs=rngs))
    counted = multiply_adds(
        net.apply, net.abstract, shape(1, side, side, 3), shape(1), shape(1, 1000)
    )
    assert counted == pytest.approx(giga * 1e9, rel=0.005)
    assert counted == net.multiply_adds((side, side, 3), shapes(3, 1000).condition)


# Memory


def test_cost_of_captions_is_that_of_their_tokens():
    """No data is needed: the condition has the sizes."""
    plain = replaced(config(), 1, attention_levels=(0,))
    costs = {
        tokens: training_cost(plain.with_stage(1, condition=Text(tokens, width=12)), 1, 8, CLASSES)
        for tokens in (4, 8)
    }
    without = training_cost(plain, 1, 8, CLASSES)
    few, many = costs[4], costs[8]
    assert without.parameters < few.parameters == many.parameters
    assert without.multiply_adds < few.multiply_adds < many.multiply_adds
    # Of a token and image: float32 keys and values of 8 channels in each of four blocks, at least.
    least = (many.images * 4) * 4 * (2 * 8) * 4
    assert many.activations - few.activations >= least


@pytest.mark.second
def test_state_bytes_match_the_devices():
    values = cut(config(averages=(0.05, 0.1)), 1, 8)
    needs, state = training_cost(values, 2, 8, CLASSES), program(values).init(jax.random.key(0))
    first = jax.devices()[0]
    there = [
        s.data.nbytes
        for leaf in jax.tree.leaves(state)
        for s in leaf.addressable_shards
        if s.device == first
    ]
    assert needs.state == sum(there)
    assert needs.parameters == sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert training_cost(cut(config(), 2, 4), 2, 8, CLASSES).state == shard_bytes(
        program(cut(config(), 2, 4)).abstract
    )


def test_averages_take_the_memory_of_the_parameters_each():
    usual, more = (
        training_cost(config(averages=widths), 2, 8, CLASSES) for widths in ((), (0.05, 0.1))
    )
    assert more.state - usual.state == 2 * 4 * usual.parameters
    assert more.memory - usual.memory == 2 * 4 * usual.parameters


def test_sharded_kernels_need_copies():
    whole, eighth = (
        training_cost(cut(config(), *sizes), 2, 8, CLASSES) for sizes in ((8, 1), (1, 8))
    )
    assert whole.state / 8 < eighth.state < whole.state / 5  # biases and scales are not cut
    assert whole.copies == 0 and whole.gradients == 4 * whole.parameters
    kernels = eighth.copies / 4  # of float32
    assert eighth.gradients == 4 * (kernels / 8 + (whole.parameters - kernels))
    values = replaced(cut(config(), 1, 8), 2, dtype="bfloat16")
    narrow, params = training_cost(values, 2, 8, CLASSES), program(values).abstract.params

    # Of images' convolutions in bfloat16; embeddings are float32, and biases too, which are used
    # where they are.
    def width(path):
        return 4 if re.search("map_|affine", jax.tree_util.keystr(path)) else 2

    cut_kernels = [
        (path, leaf)
        for path, leaf in jax.tree.leaves_with_path(params)
        if not leaf.sharding.is_fully_replicated
    ]
    whole_kernels = [
        (path, leaf)
        for path, leaf in jax.tree.leaves_with_path(params)
        if leaf.sharding.is_fully_replicated
    ]
    whole_kernels = [
        (path, leaf)
        for path, leaf in whole_kernels
        if path[-1].key == "kernel" and width(path) == 2
    ]
    assert narrow.copies == sum(
        width(path) * leaf.size for path, leaf in [*cut_kernels, *whole_kernels]
    )
    assert narrow.copies < eighth.copies and narrow.state == eighth.state


def test_residuals_of_a_hand_case():
    """tanh keeps its output, a product its inputs; parameters and what is given are not counted."""

    def loss(w, x):
        return jnp.sum(jnp.tanh(x @ w) @ w)

    hidden = 4 * 5 * 6
    kept = residual_bytes(loss, shape(6, 6), shape(5, 6))
    assert hidden <= kept <= 3 * hidden  # the output of tanh, and perhaps its derivative
    assert residual_bytes(lambda w, x: jnp.sum(x @ w), shape(6, 6), shape(5, 6)) == 0
    assert residual_bytes(jax.checkpoint(loss), shape(6, 6), shape(5, 6)) == 0
    assert block_bytes(loss, shape(6, 6), shape(5, 6)) == 0
    assert block_bytes(jax.checkpoint(loss), shape(6, 6), shape(5, 6)) == kept


def test_activations_depend_on_images_remat_and_dtype():
    values = replaced(config(), 2, channels=16, blocks=2)
    needs = {
        remat: training_cost(replaced(values, 2, remat=remat), 2, 8, CLASSES)
        for remat in ("none", "convolutions", "block")
    }
    kept = [needs[remat].activations for remat in ("none", "convolutions", "block")]
    assert kept[0] > 1.5 * kept[1] and kept[0] > 1.5 * kept[2] > 0
    assert (
        training_cost(values, 2, 4, CLASSES).activations == 2 * kept[0]
    )  # twice the images a chip
    accumulated = dataclasses.replace(values.stages[1].training, accumulate=2)
    parts = dataclasses.replace(
        values,
        stages=(values.stages[0], dataclasses.replace(values.stages[1], training=accumulated)),
    )
    halved = training_cost(parts, 2, 8, CLASSES)
    assert halved.activations == kept[0] / 2 and halved.gradients == 2 * needs["none"].gradients
    assert (
        training_cost(replaced(values, 2, dtype="bfloat16"), 2, 8, CLASSES).activations
        < 0.75 * kept[0]
    )


# Communication


@pytest.mark.second
def test_exchanges_match_compiled_collectives():
    needs = training_cost(config(), 2, 8, CLASSES)
    told = sharding.collectives(program(config()).lower().compile())
    (exchange,) = needs.exchanges
    assert (exchange.kind, exchange.chips) == ("all-reduce", 8)
    assert (
        exchange.size == 4 * needs.parameters <= told["all-reduce"] <= exchange.size + 64
    )  # and the loss
    assert needs.sent == exchange.size * 2 * 7 / 8


def test_exchanges_of_sharded_parameters():
    values = cut(config(), 2, 4)
    needs = training_cost(values, 2, 8, CLASSES)
    found = {(e.kind, e.chips): e.size for e in needs.exchanges}
    assert found.keys() == {
        ("all-reduce", 8),
        ("all-gather", 4),
        ("reduce-scatter", 4),
        ("all-reduce", 2),
    }
    params = jax.tree.leaves(program(values).abstract.params)
    kernels = 4 * sum(leaf.size for leaf in params if not leaf.sharding.is_fully_replicated)
    assert (
        found["all-gather", 4] == kernels == needs.copies
    )  # as compiled: training/test_program.py
    assert found["reduce-scatter", 4] == found["all-reduce", 2] == needs.copies / 4
    assert found["all-reduce", 8] == 4 * needs.parameters - needs.copies
    twice = training_cost(cut(config(accumulate=2), 2, 4), 2, 8, CLASSES)
    assert twice.sent == 2 * needs.sent
    assert (
        training_cost(values, 2, 8, CLASSES).sent > 0 == training_cost(config(), 2, 1, CLASSES).sent
    )


def test_exchange_sends_as_a_ring():
    assert (
        Exchange("all-reduce", 800, 4).sent == 1200
    )  # three quarters to reduce, three quarters to gather
    assert Exchange("all-gather", 800, 4).sent == 600
    assert Exchange("reduce-scatter", 200, 4).sent == 600


def test_exchanges_of_pmap():
    values = replaced(config(accumulate=2), 2, dtype="bfloat16")
    mapped = dataclasses.replace(values, parallel=Parallel(mode="pmap"))
    needs = training_cost(mapped, 2, 8, CLASSES)
    assert [e.size for e in needs.exchanges] == [4 * needs.parameters]
    # `jit`: twice, one for each part, of kernels in bfloat16 and of the rest in float32.
    assert (
        2 * 2 * needs.parameters
        < training_cost(values, 2, 8, CLASSES).exchanges[0].size
        < 2 * 4 * needs.parameters
    )


# Time


def test_flops_and_seconds():
    values = config()
    needs = training_cost(values, 2, 8, CLASSES)
    net = values.stages[1].build(3, CLASSES)
    assert needs.flops == 6 * net.multiply_adds((8, 8, 3), shapes(3, CLASSES).condition) * 16
    assert step_seconds(needs, V5E, 8, "float32", 0.5) == pytest.approx(
        needs.flops / (8 * 197e12 * 0.5)
    )


def test_shard_bytes_of_a_tree():
    mesh = sharding.make_mesh(2, 4)
    tree = sharding.by_rules({"kernel": shape(8, 6), "bias": shape(6)}, mesh)
    assert shard_bytes(tree) == 4 * (8 * 6 / 4 + 6)
