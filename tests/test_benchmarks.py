import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TINY = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}


def tables(script: str, *arguments: str) -> list[list[dict[str, str]]]:
    """What a benchmark of the tiny config prints: for every table its rows, cells by their heads."""
    command = [sys.executable, "-m", f"experiments.benchmarks.{script}", "--config=tests/tiny.py:nowhere", "--seconds=0.001"]
    done = subprocess.run([*command, *arguments], cwd=ROOT, env={**os.environ, **TINY}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = []
    for head, body in re.findall(r"^(\|.*\|)\n\|(?:---\|)+\n((?:\|.*\|\n)*)", done.stdout, re.MULTILINE):
        cells = lambda line: [cell.strip() for cell in line[1:-1].split("|")]  # noqa: E731
        found.append([dict(zip(cells(head), cells(row), strict=True)) for row in body.splitlines()])
    return found


def numbers(rows: list[dict[str, str]], *heads: str) -> list[float]:
    """Figures of some columns, without their units."""
    return [float(re.match(r"[\d.,]+", row[head])[0].replace(",", "")) for row in rows for head in heads]


@pytest.mark.long
def test_speed():
    asked = ["--stage=2", "--classes=2", "--batch=8", "--evaluations=3", "--variants=block+pmap"]
    training, sampling = tables("speed", *asked)
    assert [(row["stage"], row["variant"]) for row in training] == [("2: 8 x 12", "block+pmap")]
    assert min(numbers(training, "parameters", "ms a step", "images/s", "TFLOP/s")) > 0
    assert [(row["stage"], row["variant"]) for row in sampling] == [("2: 8 x 12", "block+pmap")]
    assert min(numbers(sampling, "evaluations", "ms an evaluation", "images/s", "own share")) > 0
    assert {row["utilisation"] for row in (*training, *sampling)} == {"-"}  # no peak is known of a CPU


def test_relay():
    arithmetic, shares = tables("relay", "--batch=2", "--classes=0", "--size=8", "--factor=4")
    updates = ["the sampler's", "DCT, vmapped", "DCT, fused", "matrix, fused"]
    assert [row[""] for row in arithmetic] == ["adding", "adding, flat", *updates, "noise"]
    assert min(numbers(arithmetic, "ms", "in addings", "in flat addings")) > 0
    assert all(float(row["difference"]) < 1e-5 for row in arithmetic if row[""] in updates)
    assert [row[""] for row in shares] == ["network", "update and noise"]
    assert min(numbers(shares, "ms")) > 0 and all(
        0 < n < 100 for n in numbers(shares[1:], "share by operations", "share by time")
    )


def test_attention():
    (rows,) = tables("attention", "--batch=1")
    kinds = [("float32", "the library's"), ("float32", "xla"), ("float32", "einsum")]
    kinds += [("bfloat16", name) for _, name in kinds]
    assert [(row["stage"], row["pixels"], row["dtype"], row[""]) for row in rows] == [
        (stage, pixels, *kind) for stage, pixels in (("1", "4 x 6"), ("2", "8 x 12")) for kind in kinds
    ]
    assert min(numbers(rows, "forward, ms", "and backward, ms", "FLOP/s")) > 0
    for row in rows:
        limit = 1e-5 if row["dtype"] == "float32" else 5e-2
        assert float(row["difference"]) < limit and float(row["of gradients"]) < limit
