"""What `cpu` runs in a process of its own, with the modules of the checkout where it starts.

It uses only what older checkouts have too.
"""

import contextlib
import dataclasses
import runpy
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from experiments.benchmarks import speed, timing
from rdm_jax import config as configs
from rdm_jax.models.adm import ADM

CLASSES = 10


def config_of(row: int) -> tuple[configs.Config, int]:
    """The config of a row, and the number of its stage."""
    digits = configs.parse(runpy.run_path("configs/digits.py")["get_config"]())
    if row < 2:
        return digits, row + 1
    network = ADM(channels=64, channel_mult=(1, 2, 2), blocks=1, attention_levels=(1,), dropout=0.0)
    training = dataclasses.replace(digits.stages[0].training, batch_size=32)
    stage = dataclasses.replace(
        digits.stages[0], resolution=(32, 32), network=network, training=training
    )
    data = dataclasses.replace(digits.data, channels=3)
    return dataclasses.replace(digits, stages=(stage,), data=data), 1


def serve(row: int) -> None:
    """Compiles a row, then takes a turn for every line of standard input, "pass seconds"."""
    config, number = config_of(row)
    with contextlib.suppress(ImportError):  # in an older checkout
        from rdm_jax.cli.cores import use_cores

        use_cores(config, timing.cores())
    print(config.stages[number - 1].training.batch_size, flush=True)
    passes = passes_of(config, number)
    print("compiled", flush=True)
    for line in sys.stdin:
        name, seconds = line.split()
        print(*turn(passes[name], float(seconds)), flush=True)


def passes_of(config: configs.Config, number: int) -> dict[str, Callable[[], Any]]:
    """A training step and a forward pass of a stage, on all devices."""
    stage = config.stages[number - 1]
    network = stage.build(config.data.channels, CLASSES)
    shape = (stage.training.batch_size, *stage.resolution, config.data.channels)
    images = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    levels = np.linspace(-1, 1, len(images), dtype=np.float32)
    mesh = speed.sharding.local_mesh()
    inputs = speed.sharding.put_batch((images, levels), mesh)
    params = timing.parameters(network)
    forward = timing.compiled(network.apply, params, *inputs)
    training = speed.Training(config, number, CLASSES)
    return {"training": training.step, "forward": lambda: forward(params, *inputs)}


def turn(function: Callable[[], Any], seconds: float) -> tuple[float, float]:
    """Seconds, and seconds of processor time, per call."""
    jax.block_until_ready(function())
    began, used, calls = time.perf_counter(), time.process_time(), 0
    while not calls or time.perf_counter() - began < seconds:
        jax.block_until_ready(function())
        calls += 1
    return (time.perf_counter() - began) / calls, (time.process_time() - used) / calls


if __name__ == "__main__":
    serve(int(sys.argv[1]))
