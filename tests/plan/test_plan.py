"""Plans as a user reads them: hours, targets, verdicts, remedies, the compiler's figures."""

import dataclasses
import os
import re

import jax
import numpy as np
import pytest

from rdm_jax.config import Config, Parallel, Stage, Training
from rdm_jax.diffusion.processes import RelayProcess
from rdm_jax.diffusion.samplers import RelayHeun
from rdm_jax.models.adm import ADM
from rdm_jax.plan.chips import CHIPS, chip_of
from rdm_jax.plan.cost import (
    training_cost,
)
from rdm_jax.plan.tpu_compile import exhausted
from rdm_jax.render.tables import GIB
from rdm_jax.runtime.errors import InputError
from tests.support.configs import tiny_config
from tests.support.plans import CLASSES, V5E, config, cut, program, replaced, show


def hours(text):
    return [
        float(found.replace(",", ""))
        for found in re.findall(r"^\| hours +\| ([\d.e+-]+)", text, re.MULTILINE)
    ]


def test_hours_scale_with_chips_and_utilisation():
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


def test_plan_shows_averages_and_their_snapshots():
    """160 images in batches of 16, with a snapshot every 48 and at the end."""
    shown = show("v5e-8", config(averages=(0.05, 0.1), snapshot_every=48))
    assert "parameters, EMA, 2 further averages, optimizer" in shown
    each, whole = re.search(
        r"disk: 4 snapshots of averages, ([\d.]+) MiB each *\| ([\d.]+) MiB", shown
    ).groups()
    assert float(whole) == pytest.approx(4 * float(each), rel=0.01)
    parameters = training_cost(config(), 1, 8, CLASSES).parameters
    assert float(each) == pytest.approx(2 * 4 * parameters / 2**20, rel=0.01)
    assert "averages" not in show("v5e-8")


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
def test_chip_of_device_kind(kind, name, bfloat16, float32):
    chip = chip_of(kind)
    assert chip.name == name and (chip.peak("bfloat16"), chip.peak("float32")) == (
        bfloat16,
        float32,
    )


def test_chips_are_unique():
    assert chip_of("cpu") is None and chip_of("TPU v2") is None
    kinds = [kind.lower() for chip in CHIPS for kind in chip.kinds]
    assert len(set(kinds)) == len(kinds) and len({chip.name for chip in CHIPS}) == len(CHIPS)


@pytest.mark.parametrize(
    ("target", "changes", "says"),
    [
        ("v9-8", {}, "--target='v9-8'.*Use 'here'.*v5e"),
        ("v5e", {}, "--target='v5e'.*with a number of chips"),
        ("v5e-0", {}, "--target='v5e-0'"),
        ("v5e-many", {}, "--target='v5e-many'"),
        ("v5e-8", {"utilisation": 0.0}, "--utilisation=0.0.*Use a number above 0"),
        ("v5e-8", {"utilisation": 40.0}, "--utilisation=40.0.*up to 1"),
        ("v5e-8", {"classes": -1}, "--classes=-1.*Use 0 for none"),
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
            "mode='pmap'.*--compile.*Use 'pjit'",
        ),
        (
            "v5e-8",
            {"values": config().with_stage(1, network={"dtype": "float16"})},
            "network.dtype='float16'",
        ),
    ],
    ids=lambda part: part if isinstance(part, str) else " ".join(part),
)
def test_plan_refuses_arguments(target, changes, says):
    with pytest.raises(InputError, match=says) as refusal:
        show(target, **changes)
    message = str(refusal.value)
    assert message.endswith(".") and "\n" not in message  # a problem alone has no final stop


def test_compile_needs_libtpu(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"libtpu.*pip install 'jax\[tpu\]'"):
        show("v5e-4", compile=True)


# The text


def test_plan_has_a_table_and_a_verdict_per_stage():
    text = show("v4-8", cut(config(), 2, 4))
    assert "# 8 x v4, parallel.mode=pjit, mesh 2 (data) x 4 (fsdp)" in text
    assert "v4-8 here is v4-16 there" in text  # Google Cloud counts cores
    for number in (1, 2):
        assert f"## stage{number}: adm" in text and f"stage{number} FITS" in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    for row in (
        "parameters ",
        "multiply-adds",
        "FLOPs per step",
        "... activations",
        "reduce-scatter over 4",
        "chip-hours",
    ):
        assert sum(line.startswith(f"| {row}") for line in tables) == 2
    assert f"{training_cost(config(), 1, 8, CLASSES).parameters:,}" in text


def test_plan_of_unknown_chips_has_no_hours():
    text = show("here")
    assert "# 8 x cpu" in text and "hours are left out" in text
    assert hours(text) == [] and "chip-hours" not in text and "| FLOPs per step" in text


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


@pytest.mark.second
def test_remedy_makes_a_stage_fit():
    text = show("v5e-4", large())
    verdict = next(line for line in text.splitlines() if line.startswith("stage1"))
    assert verdict.startswith("stage1 DOES NOT FIT")
    accumulate = int(re.search(r"--config.stage1.training.accumulate=(\d+)", verdict)[1])
    mended = large().with_stage(1, training={"accumulate": accumulate})
    assert "stage1 FITS" in show("v5e-4", mended)
    assert (
        0.2 * V5E.gib * GIB < training_cost(mended, 1, 4, CLASSES).memory
    )  # and not by far too little


def test_plan_shows_the_cost_of_rematerialisation():
    text = show("v5e-8", replaced(config(), 2, remat="block"))
    assert text.count("with rematerialised blocks (x 4/3)") == 1


def test_exhausted_summarises_the_compilers_error():
    words = "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 25.75G of 15.75G hbm."
    said = exhausted(words, 16, int(5.75 * GIB))
    assert (
        "used 25.75 of 15.75 GiB with 16 images" in said and "; 8 may fit" in said
    )  # half of the 20 GiB that grow
    assert "parallel.fsdp" in exhausted(words, 16, 16 * GIB)
    assert "no figures" in exhausted("RESOURCE_EXHAUSTED: no figures", 16, GIB)


# The compiler


@pytest.mark.second
def test_compile_for_an_absent_tpu(monkeypatch):
    pytest.importorskip("libtpu")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    before = dict(os.environ)
    values = cut(config(), 1, 4).with_stage(1, network={"dtype": "bfloat16"})
    values = dataclasses.replace(values, stages=values.stages[:1])
    text = show("v5e-4", values, compile=True)
    assert dict(os.environ) == before
    needs = training_cost(values, 1, 4, CLASSES)
    assert "stage1 FITS, according to the compiler" in text and "### stage1, by XLA for v5e" in text
    arguments = re.search(r"arguments \(state, batch\) +\| ([\d.]+) MiB", text)
    assert float(arguments[1]) * 2**20 >= needs.state  # small arrays are padded to tiles
    flops = re.search(r"each loop body once +\| ([\d.]+) M", text)
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
