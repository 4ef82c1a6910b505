"""What a training takes, counted without compiling, against hand counts, the compiler, and arrays
that are there."""

import dataclasses
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rdm_jax.config import Config, Parallel, Stage, Training
from rdm_jax.diffusion.processes import RelayProcess
from rdm_jax.diffusion.samplers import RelayHeun
from rdm_jax.models.adm import ADM
from rdm_jax.models.functional import functional, multiply_adds
from rdm_jax.plan.chips import CHIPS, chip_of
from rdm_jax.plan.cost import (
    Exchange,
    block_bytes,
    residual_bytes,
    shard_bytes,
    step_seconds,
    training_cost,
)
from rdm_jax.plan.plan import plan
from rdm_jax.plan.tpu_compile import exhausted
from rdm_jax.render.tables import GIB
from rdm_jax.runtime import sharding
from rdm_jax.runtime.errors import InputError
from rdm_jax.training.program import PROGRAMS
from tests.support.configs import tiny_config
from tests.support.small_networks import shapes

CLASSES = 2
V5E = next(chip for chip in CHIPS if chip.name == "v5e")


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def config(**training) -> Config:
    """Two tiny stages for eight devices."""
    return tiny_config("images", **{"batch_size": 16, **training})


def cut(values: Config, data: int, fsdp: int) -> Config:
    return dataclasses.replace(values, parallel=Parallel(data=data, fsdp=fsdp))


def program(values: Config, number=2, devices=8):
    mesh = sharding.make_mesh(values.parallel.data, values.parallel.fsdp, jax.devices()[:devices])
    return PROGRAMS[values.parallel.mode](
        values.stage(number), (8, 8, 3), CLASSES, jax.random.key(1), mesh
    )


def show(target, values=None, **kwargs):
    return plan(
        values or config(),
        target,
        **{"utilisation": 0.5, "classes": CLASSES, "compile": False, **kwargs},
    )


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
    attend = lambda q, k: jnp.einsum("bnhd,bmhd->bhnm", q, k)  # noqa: E731
    assert multiply_adds(attend, shape(2, 5, 3, 7), shape(2, 11, 3, 7)) == 2 * 3 * 5 * 11 * 7
    assert multiply_adds(lambda x: jnp.sin(x) * x, image) == 0


def test_multiply_adds_within_other_functions():
    product = lambda x: jnp.tanh(x @ x)  # noqa: E731
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
    either = lambda x: jax.lax.cond(x[0, 0] > 0, lambda y: product(product(y)), product, x)  # noqa: E731
    assert multiply_adds(either, square) == 2 * once
    with pytest.raises(ValueError, match="while loop"):
        multiply_adds(lambda x: jax.lax.while_loop(lambda y: y[0, 0] > 0, product, x), square)


def test_a_backward_pass_is_twice_the_forward_one_and_a_third_more_with_rematerialisation():
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
def test_multiply_adds_of_the_published_networks(network, side, giga):
    net = functional(lambda rngs: network.build(shapes(3, 1000), rngs=rngs))
    counted = multiply_adds(
        net.apply, net.abstract, shape(1, side, side, 3), shape(1), shape(1, 1000)
    )
    assert counted == pytest.approx(giga * 1e9, rel=0.005)
    assert counted == net.multiply_adds((side, side, 3), shapes(3, 1000).condition)


# Memory


def test_state_is_what_lies_on_a_device():
    values = cut(config(), 1, 8)
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


def test_cut_kernels_take_an_eighth_and_come_back_as_copies():
    whole, eighth = (
        training_cost(cut(config(), *sizes), 2, 8, CLASSES) for sizes in ((8, 1), (1, 8))
    )
    assert whole.state / 8 < eighth.state < whole.state / 5  # biases and scales are not cut
    assert whole.copies == 0 and whole.gradients == 4 * whole.parameters
    kernels = eighth.copies / 4  # of float32
    assert eighth.gradients == 4 * (kernels / 8 + (whole.parameters - kernels))
    values = cut(config(), 1, 8).with_stage(2, network={"dtype": "bfloat16"})
    narrow, params = training_cost(values, 2, 8, CLASSES), program(values).abstract.params
    # Of images' convolutions in bfloat16; embeddings are float32, and biases too, which are used
    # where they are.
    width = lambda path: 4 if re.search("map_|affine", jax.tree_util.keystr(path)) else 2  # noqa: E731
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
    loss = lambda w, x: jnp.sum(jnp.tanh(x @ w) @ w)  # noqa: E731
    hidden = 4 * 5 * 6
    kept = residual_bytes(loss, shape(6, 6), shape(5, 6))
    assert hidden <= kept <= 3 * hidden  # the output of tanh, and perhaps its derivative
    assert residual_bytes(lambda w, x: jnp.sum(x @ w), shape(6, 6), shape(5, 6)) == 0
    assert residual_bytes(jax.checkpoint(loss), shape(6, 6), shape(5, 6)) == 0
    assert block_bytes(loss, shape(6, 6), shape(5, 6)) == 0
    assert block_bytes(jax.checkpoint(loss), shape(6, 6), shape(5, 6)) == kept


def test_activations_grow_with_images_and_shrink_with_rematerialisation_and_bfloat16():
    values = config().with_stage(2, network={"channels": 16, "blocks": 2})
    needs = {
        remat: training_cost(values.with_stage(2, network={"remat": remat}), 2, 8, CLASSES)
        for remat in ("none", "convolutions", "block")
    }
    kept = [needs[remat].activations for remat in ("none", "convolutions", "block")]
    assert kept[0] > 1.5 * kept[1] and kept[0] > 1.5 * kept[2] > 0
    assert (
        training_cost(values, 2, 4, CLASSES).activations == 2 * kept[0]
    )  # twice the images a chip
    parts = values.with_stage(2, training={"accumulate": 2})
    halved = training_cost(parts, 2, 8, CLASSES)
    assert halved.activations == kept[0] / 2 and halved.gradients == 2 * needs["none"].gradients
    assert (
        training_cost(
            values.with_stage(2, network={"dtype": "bfloat16"}), 2, 8, CLASSES
        ).activations
        < 0.75 * kept[0]
    )


# Communication


def test_what_devices_tell_each_other_is_what_the_compiler_makes_them_tell():
    needs = training_cost(config(), 2, 8, CLASSES)
    told = sharding.collectives(program(config()).lower().compile())
    (exchange,) = needs.exchanges
    assert (exchange.kind, exchange.chips) == ("all-reduce", 8)
    assert (
        exchange.size == 4 * needs.parameters <= told["all-reduce"] <= exchange.size + 64
    )  # and the loss
    assert needs.sent == exchange.size * 2 * 7 / 8


def test_cut_parameters_are_gathered_once_a_part():
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


def test_a_ring_sends():
    assert (
        Exchange("all-reduce", 800, 4).sent == 1200
    )  # three quarters to reduce, three quarters to gather
    assert Exchange("all-gather", 800, 4).sent == 600
    assert Exchange("reduce-scatter", 200, 4).sent == 600


def test_pmap_averages_float32_once_a_step():
    values = config(accumulate=2).with_stage(2, network={"dtype": "bfloat16"})
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


def hours(text):
    return [
        float(found.replace(",", ""))
        for found in re.findall(r"^\| hours +\| ([\d.e+-]+)", text, re.MULTILINE)
    ]


def test_hours_fall_with_chips_and_utilisation():
    usual = hours(show("v5e-8"))
    assert len(usual) == 2 and min(usual) > 0
    np.testing.assert_allclose(hours(show("v5e-16")), np.divide(usual, 2), rtol=0.01)
    np.testing.assert_allclose(
        hours(show("v5e-8", utilisation=0.25)), np.multiply(usual, 2), rtol=0.01
    )
    np.testing.assert_allclose(
        hours(show("v5e-8", config(images=320))), np.multiply(usual, 2), rtol=0.01
    )
    np.testing.assert_allclose(hours(show("v6e-8")), np.multiply(usual, 197 / 918), rtol=0.01)
    total = float(re.search(r"^All stages.*: ([\d.e+-]+) hours", show("v5e-8"), re.MULTILINE)[1])
    assert total == pytest.approx(sum(usual), rel=0.01)


# Chips and targets


@pytest.mark.parametrize(
    ("kind", "name", "bfloat16", "float32"),
    [
        ("TPU v4", "v4", 275e12, 275e12),
        ("TPU v5 lite", "v5e", 197e12, 197e12),
        ("TPU v5", "v5p", 459e12, 459e12),
        ("TPU v6 lite", "v6e", 918e12, 918e12),
        ("NVIDIA A100-SXM4-80GB", "a100", 312e12, 156e12),
        ("NVIDIA H100 80GB HBM3", "h100", 989e12, 494e12),
        ("NVIDIA H200", "h200", 989e12, 494e12),
        ("Tesla T4", "t4", 8.1e12, 8.1e12),
    ],
)
def test_chips_by_what_jax_calls_them(kind, name, bfloat16, float32):
    chip = chip_of(kind)
    assert chip.name == name and (chip.peak("bfloat16"), chip.peak("float32")) == (
        bfloat16,
        float32,
    )


def test_chips_that_are_not_known_and_names_that_are_unique():
    assert chip_of("cpu") is None and chip_of("TPU v2") is None
    kinds = [kind.lower() for chip in CHIPS for kind in chip.kinds]
    assert len(set(kinds)) == len(kinds) and len({chip.name for chip in CHIPS}) == len(CHIPS)


@pytest.mark.parametrize(
    ("target", "changes", "says"),
    [
        ("v9-8", {}, "--target='v9-8'.*v5e.*'here'|--target='v9-8'.*'here'.*v5e"),
        ("v5e", {}, "--target='v5e'.*with a number of chips"),
        ("v5e-0", {}, "--target='v5e-0'"),
        ("v5e-many", {}, "--target='v5e-many'"),
        ("v5e-8", {"utilisation": 0.0}, "--utilisation=0.0.*above 0"),
        ("v5e-8", {"utilisation": 40.0}, "--utilisation=40.0.*up to 1"),
        ("v5e-8", {"classes": -1}, "--classes=-1"),
        ("v5e-8", {"values": cut(config(), 3, 1)}, "parallel.data, fsdp=.3, 1.*product is 8"),
        ("v5e-32", {}, "stage1.training.batch_size=16.*multiple of 32"),
        (
            "v5e-16",
            {"values": config(accumulate=2)},
            "stage1.training.batch_size=16.*multiple of 32.*accumulate=2",
        ),
        (
            "h100-8",
            {"values": dataclasses.replace(config(), parallel=Parallel("pmap", 4, 2))},
            "fsdp=2.*'pmap'",
        ),
        ("h100-8", {"compile": True}, "--target='h100-8'.*--compile.*v5e"),
        ("here", {"compile": True}, "--target='here'.*--compile.*v5e"),
        ("v5e-2", {"compile": True}, "--target='v5e-2'.*v5e with 1, 4, 8, 16"),
        (
            "v5e-4",
            {"compile": True, "values": dataclasses.replace(config(), parallel=Parallel("pmap"))},
            "mode='pmap'",
        ),
        (
            "v5e-8",
            {"values": config().with_stage(1, network={"dtype": "float16"})},
            "network.dtype='float16'",
        ),
    ],
    ids=lambda part: part if isinstance(part, str) else " ".join(part),
)
def test_refused(target, changes, says):
    with pytest.raises(InputError, match=says) as refusal:
        show(target, **changes)
    assert str(refusal.value).endswith("would do.") and "\n" not in str(refusal.value)


def test_libtpu_is_asked_for_where_it_is_missing(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"libtpu.*pip install 'jax\[tpu\]'"):
        show("v5e-4", compile=True)


# The text


def test_the_text_has_a_table_and_a_verdict_a_stage():
    text = show("v4-8", cut(config(), 2, 4))
    assert "# 8 x v4, parallel.mode=pjit, mesh 2 (data) x 4 (fsdp)" in text
    assert "v4-8 here is v4-16 there" in text  # Google Cloud counts cores
    for number in (1, 2):
        assert f"## stage{number}: adm" in text and f"stage{number} FITS" in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    for row in (
        "parameters ",
        "multiply-adds",
        "FLOPs a step",
        "... activations",
        "a step's reduce-scatter over 4",
        "chip-hours",
    ):
        assert sum(line.startswith(f"| {row}") for line in tables) == 2
    assert f"{training_cost(config(), 1, 8, CLASSES).parameters:,}" in text


def test_here_leaves_hours_out_where_no_peak_is_known():
    text = show("here")
    assert "# 8 x cpu" in text and "hours are left out" in text
    assert hours(text) == [] and "chip-hours" not in text and "| FLOPs a step" in text


def large(**network) -> Config:
    """A stage whose activations do not fit a chip; its state does."""
    stage = Stage((64, 64), ADM(64, (1, 2), 1, (), **network), training=Training(batch_size=8192))
    relay = Stage(
        (128, 128),
        tiny_config("images").stages[1].network,
        process=RelayProcess(patch=2),
        sampler=RelayHeun(),
    )
    return Config(stages=(stage, relay))


def test_what_does_not_fit_is_told_what_would_do_and_that_does():
    text = show("v5e-4", large())
    verdict = next(line for line in text.splitlines() if line.startswith("stage1"))
    assert verdict.startswith("stage1 DOES NOT FIT")
    accumulate = int(re.search(r"--config.stage1.training.accumulate=(\d+)", verdict)[1])
    mended = large().with_stage(1, training={"accumulate": accumulate})
    assert "stage1 FITS" in show("v5e-4", mended)
    assert (
        0.2 * V5E.gib * GIB < training_cost(mended, 1, 4, CLASSES).memory
    )  # and not by far too little


def test_rematerialisation_is_said_to_cost_a_third_more():
    text = show("v5e-8", config().with_stage(2, network={"remat": "block"}))
    assert text.count("with blocks computed again (x 4/3)") == 1


def test_words_of_a_compiler_whose_memory_is_full():
    words = "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 25.75G of 15.75G hbm."
    said = exhausted(words, 16, int(5.75 * GIB))
    assert (
        "used 25.75 of 15.75 GiB with 16 images" in said and "; 8 of them may fit" in said
    )  # half of the 20 GiB that grow
    assert "parallel.fsdp" in exhausted(words, 16, 16 * GIB)
    assert "no figures" in exhausted("RESOURCE_EXHAUSTED: no figures", 16, GIB)


# The compiler


def test_compiled_for_a_tpu_that_is_not_there(monkeypatch):
    pytest.importorskip("libtpu")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    before = dict(os.environ)
    values = cut(config(), 1, 4).with_stage(1, network={"dtype": "bfloat16"})
    values = dataclasses.replace(values, stages=values.stages[:1])
    text = show("v5e-4", values, compile=True)
    assert dict(os.environ) == before
    needs = training_cost(values, 1, 4, CLASSES)
    assert "stage1 FITS, says the compiler" in text and "### stage1, by XLA for v5e" in text
    arguments = re.search(r"arguments \(state, batch\) +\| ([\d.]+) MiB", text)
    assert float(arguments[1]) * 2**20 >= needs.state  # small arrays are padded to tiles
    flops = re.search(r"in one run of every loop's body +\| ([\d.]+) M", text)
    assert float(flops[1]) * 1e6 > 0.5 * needs.flops / 4
    told = {
        kind: float(size) * 1e9
        for kind, size in re.findall(r"([a-z-]+) ([\d.e-]+) GB", text.split("### ")[1])
    }
    params = jax.tree.leaves(program(values, 1, devices=4).abstract.params)
    kernels = 2 * sum(
        leaf.size for leaf in params if not leaf.sharding.is_fully_replicated
    )  # as bfloat16
    assert told["all-gather"] == pytest.approx(kernels, rel=0.01)
    # So small gradients are summed whole, and in part go round; larger ones are a reduce-scatter.
    assert told.get("all-reduce", 0) + 4 * told.get("reduce-scatter", 0) > kernels / 2


def test_shard_bytes_of_a_tree():
    mesh = sharding.make_mesh(2, 4)
    tree = sharding.by_rules({"kernel": shape(8, 6), "bias": shape(6)}, mesh)
    assert shard_bytes(tree) == 4 * (8 * 6 / 4 + 6)
