import json
import math
import re
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.benchmarks import cpu, timing
from rdm_jax.checkpoints import store
from rdm_jax.config import parse, to_dict
from rdm_jax.config.saved import save_config
from tests.support import captioned_runs
from tests.support.commands import python
from tests.support.configs import get_config
from tests.support.paths import ROOT


def tables(
    script: str, *arguments: str, config: str | Path = "tests/support/configs.py:nowhere"
) -> list[list[dict[str, str]]]:
    """What a benchmark of the tiny config prints: for every table its rows, cells by their
    heads."""
    module = f"experiments.benchmarks.{script}"
    timed = [] if script in ("tpu", "hosts") else ["--seconds=0.001"]
    done = python("-m", module, f"--config={config}", *timed, *arguments, devices=2)
    assert done.returncode == 0, done.stderr
    found = []
    for head, body in re.findall(
        r"^(\|.*\|)\n\|(?:---\|)+\n((?:\|.*\|\n)*)", done.stdout, re.MULTILINE
    ):
        rows = body.splitlines()
        found.append([dict(zip(_cells(head), _cells(row), strict=True)) for row in rows])
    return found


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line[1:-1].split("|")]


def numbers(rows: list[dict[str, str]], *heads: str) -> list[float]:
    """Figures of some columns, without their units."""
    return [
        float(re.match(r"[\d.,]+(e[+-]\d+)?", row[head])[0].replace(",", ""))
        for row in rows
        for head in heads
    ]


def test_medians_are_the_times_of_a_call():
    calls = {"short": lambda: time.sleep(0.005), "long": lambda: time.sleep(0.02)}
    found = timing.medians(calls, seconds=0.1)
    assert (
        0.005 <= found["short"] < found["long"] < 0.1 and found["long"] >= 0.02
    )  # sleep is never shorter
    assert [timing.milliseconds(seconds) for seconds in (0.0000213, 0.0213, 0.213, 21.3)] == [
        "0.0213",
        "21.3",
        "213",
        "21,300",
    ]


@pytest.mark.second
def test_speed_with_captions(tmp_path):
    """They are null captions, which take as long as any."""
    asked = ["--stage=1", "--classes=2", "--batch=8", "--nfe=3"]
    save_config(captioned_runs.config_of(classes=True), tmp_path / "config.json")
    training, sampling = tables("speed", *asked, config=tmp_path / "config.json")
    assert min(numbers(training, "images/s") + numbers(sampling, "images/s")) > 0


@pytest.mark.long
def test_hosts():
    asked = ["--stage=1", "--classes=2", "--images=1024", "--fractions=1"]
    counted, measured, saved = tables("hosts", *asked)
    shares = {row["what"]: [row["1"], row["8"], row["64"]] for row in counted}
    assert shares["images measured, of 50,000"] == ["50,000", "6,250", "781"]
    assert shares["images of a batch that it reads"][:2] == ["8", "1"]
    assert [row["memory or files"] for row in measured] == ["8.19 kB", "4 files", ""]
    parameters = parse(get_config("nowhere")).stages[0].build(3, 2).num_parameters
    (size,) = numbers(saved, "size")
    assert abs(size * 1000 - 16 * parameters) < 0.01 * 16 * parameters
    assert min(numbers(saved, "loop stands still, s", "on disk after, s", "read, s")) > 0


@pytest.mark.long
def test_speed():
    asked = ["--stage=2", "--classes=2", "--batch=8", "--nfe=3", "--variants=block+pmap"]
    training, sampling = tables("speed", *asked)
    assert [(row["stage"], row["variant"]) for row in training] == [("2: 8 x 12", "block+pmap")]
    stage = parse(get_config("nowhere")).stages[1]
    (count, milliseconds, rate, flops) = numbers(
        training, "parameters", "ms per step", "images/s", "TFLOP/s"
    )
    assert count == stage.build(3, 2).num_parameters
    assert rate == pytest.approx(8 / (milliseconds / 1e3), rel=0.02)  # of three digits each
    assert flops == pytest.approx(
        3 * 2 * stage.multiply_adds(3, 2) * rate / 2 / 1e12, rel=0.02
    )  # on each of two devices
    assert [(row["stage"], row["variant"]) for row in sampling] == [("2: 8 x 12", "block+pmap")]
    nfe, milliseconds, rate, share = numbers(
        sampling, "NFE", "ms per evaluation", "images/s", "own share"
    )
    assert nfe == 7 and 0 < share < 100  # the shortest noise schedule with three or more
    assert rate == pytest.approx(8 / (7 * milliseconds / 1e3), rel=0.02)
    assert {row["utilisation"] for row in (*training, *sampling)} == {
        "-"
    }  # no peak is known of a CPU


@pytest.mark.second
def test_speed_of_a_guided_stage(tmp_path):
    config = parse(get_config("nowhere"))
    zeros = jax.tree.map(
        lambda leaf: np.zeros(leaf.shape, leaf.dtype), config.stage(1).build(3, 2).abstract
    )
    checkpoints = store.Checkpoints(tmp_path / "stage1/checkpoints")
    about = {"stage": to_dict(config)["stage1"], "classes": ["a", "b"], "seed": 0}
    checkpoints.save_ema(1, zeros, about)
    checkpoints.close()
    auto = {"kind": "autoguidance", "weight": 1.5, "checkpoint": f"{tmp_path}/stage1"}
    guidance = f"--config.stage1.guidance={json.dumps([auto, 2])}"
    (rows,) = tables("speed", "--stage=1", "--classes=2", "--batch=8", "--notraining", guidance)
    assert [row["NFE"] for row in rows] == ["5"]
    milliseconds, rate, share = numbers(rows, "ms per evaluation", "images/s", "own share")
    assert rate == pytest.approx(8 / (5 * milliseconds / 1e3), rel=0.02) and 0 < share < 100


@pytest.mark.second
def test_relay():
    arithmetic, shares = tables("relay", "--batch=2", "--classes=0", "--size=8", "--factor=4")
    updates = ["the sampler's", "DCT, vmapped", "DCT, fused", "matrix, fused"]
    assert [row[""] for row in arithmetic] == ["addition", "addition, flat", *updates, "noise"]
    times, first, second = (
        numbers(arithmetic, head) for head in ("ms", "in additions", "in flat additions")
    )
    for each, in_additions, in_flat_additions in zip(times, first, second, strict=True):
        assert in_additions == pytest.approx(each / times[0], rel=0.02, abs=0.006)
        assert in_flat_additions == pytest.approx(each / times[1], rel=0.02, abs=0.006)
    assert all(float(row["difference"]) < 1e-5 for row in arithmetic if row[""] in updates)
    assert [row[""] for row in shares] == ["network", "update and noise"]
    network, own = numbers(shares, "ms")
    by_operations, by_time = numbers(shares[1:], "share by operations", "share by time")
    assert (
        by_time == pytest.approx(100 * own / (own + network), rel=0.02) and 0 < by_operations < 100
    )


@pytest.mark.second
def test_attention():
    (rows,) = tables("attention", "--batch=1")
    kinds = [("float32", "the library's"), ("float32", "xla"), ("float32", "einsum")]
    kinds += [("bfloat16", name) for _, name in kinds]
    assert [(row["stage"], row["pixels"], row["dtype"], row[""]) for row in rows] == [
        (stage, pixels, *kind)
        for stage, pixels in (("1", "4 x 6"), ("2", "8 x 12"))
        for kind in kinds
    ]
    for row, forward, flops in zip(
        rows, numbers(rows, "forward, ms"), numbers(rows, "FLOP/s"), strict=True
    ):
        n, d = (
            math.prod(map(int, row["pixels"].split(" x "))),
            math.prod(map(int, row["heads"].split(" x "))),
        )
        assert flops * 1e9 == pytest.approx(4 * n**2 * d / (forward / 1e3), rel=0.02)
        limit = 1e-5 if row["dtype"] == "float32" else 5e-2
        assert float(row["difference"]) < limit and float(row["of gradients"]) < limit


@pytest.mark.second
def test_tpu_models_each_block_once():
    """Needs libtpu; the tiny config's blocks compile in seconds."""
    pytest.importorskip("libtpu")
    ((*rows, together),) = tables("tpu", "--stage=2", "--batches=8", "--only=heads")
    blocks = [row["block"] for row in rows]
    assert blocks and len(set(blocks)) == len(blocks)
    assert all(row["batch"] == "8" for row in rows)
    assert all(0 < share < 1 for share in numbers(rows, "utilisation"))
    times, each = numbers(rows, "times"), numbers(rows, "ms")
    total = sum(count * ms for count, ms in zip(times, each, strict=True))
    assert numbers([together], "ms") == [pytest.approx(total, rel=0.02)]
    assert all("%" in row["by kind"] and re.search(r"\.py:\d+", row["costliest"]) for row in rows)


def test_cells_of_cpu_compare_medians_and_best_turns():
    here, other = cpu.HERE, Path("/other")
    times = {("training", here): [(1.0, 4.0), (2.0, 4.0), (9.0, 4.0)]}
    times |= {("training", other): [(3.0, 5.0), (4.0, 6.0), (4.0, 7.0)]}
    times |= {("forward", folder): [(0.5, 0.5)] for folder in (here, other)}
    rows = [
        dict(zip(cpu.COLUMNS, row, strict=True)) for row in cpu.cells(0, [here, other], times, 2)
    ]
    assert [(row["pass"], row["checkout"]) for row in rows] == [
        (name, folder) for name in cpu.PASSES for folder in (here.name, "/other")
    ]
    assert numbers(rows[:2], "images/s", "best", "CPU ms") == [0.5, 1, 8000, 0.25, 0.333, 12000]
    assert numbers(rows, "ratio") == [2, 1, 1, 1]
    assert numbers(rows, "of the best") == [3, 1, 1, 1]


@pytest.mark.long
def test_cpu():
    done = python("-m", "experiments.benchmarks.cpu", "--row=1", "--rounds=1", f"--against={ROOT}")
    assert done.returncode == 0, done.stderr
    rows = [_cells(line) for line in done.stdout.splitlines() if line.startswith("| digits")]
    assert [row[1] for row in rows] == ["training", "training", "forward", "forward"]
    assert all(float(row[3].replace(",", "")) > 0 and float(row[6]) > 0 for row in rows)
