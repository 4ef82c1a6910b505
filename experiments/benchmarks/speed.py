"""Compile times, training speed and sampling time of every stage of a config, as one Markdown table.

    python -m experiments.benchmarks.speed --config configs/digits.py

Data is random, nothing is written but the table.
"""

import time

import jax
import numpy as np
from absl import app, flags
from ml_collections import config_flags

from rdm_jax import config as configs
from rdm_jax import sharding
from rdm_jax.sampling.sampler import evaluations, stage_sampler
from rdm_jax.training.loop import build_optimizer
from rdm_jax.training.step import Objective, init_state, make_step

_CONFIG = config_flags.DEFINE_config_file("config")
_CLASSES = flags.DEFINE_integer("classes", 10, "Number of classes; 0 for unconditional networks.")
_SECONDS = flags.DEFINE_float("seconds", 10.0, "How long to time each thing.")


def seconds_each(function) -> float:
    """The mean time of a call, after one that is not counted."""
    jax.block_until_ready(function())
    began, calls = time.perf_counter(), 0
    while time.perf_counter() - began < _SECONDS.value:
        jax.block_until_ready(function())
        calls += 1
    return (time.perf_counter() - began) / calls


def training(stage: configs.Stage, network, channels: int) -> tuple[float, float]:
    """Seconds to compile the step, and images a second."""
    size, mesh, optimizer = stage.training.batch_size, sharding.local_mesh(), build_optimizer(stage.training)
    objective = Objective(network, stage.process, stage.precondition, 1, _CLASSES.value, stage.training.label_dropout)
    kwargs = {"accumulate": stage.training.accumulate, "ema_halflife": stage.training.ema_halflife, "ema_rampup": 0.05}
    step = make_step(objective, optimizer, jax.random.key(0), batch_size=size, **kwargs)
    state = jax.jit(lambda: init_state(network, optimizer, jax.random.key(0)), out_shardings=sharding.replicated(mesh))()
    images = np.random.default_rng(0).integers(0, 256, (size, *stage.resolution, channels), np.uint8)
    batch = sharding.put_batch({"image": images, "label": np.zeros(size, np.int32)}, mesh)
    began = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=0).lower(state, batch).compile()
    compile_seconds = time.perf_counter() - began

    def one_step():
        nonlocal state
        state, metrics = compiled(state, batch)
        return metrics

    return compile_seconds, size / seconds_each(one_step)


def sampling(config: configs.Config, number: int, network, channels: int) -> tuple[float, float]:
    """Seconds of the first call (with compilation) and of a later one, for a batch."""
    stage, size, mesh = config.stages[number - 1], config.sampling.batch_size, sharding.local_mesh()
    sample = stage_sampler(stage, network, number=number, channels=channels, classes=_CLASSES.value, run_seed=0)
    params = jax.device_put(jax.jit(network.init)(jax.random.key(0)), sharding.replicated(mesh))
    h, w = (side // stage.factor for side in stage.resolution)
    low = np.zeros((size, h, w, channels), np.float32) if number > 1 else None
    seeds, labels = np.arange(size, dtype=np.uint32), np.zeros(size, np.int32)
    low, labels, seeds = sharding.put_batch((low, labels, seeds), mesh)
    began = time.perf_counter()
    jax.block_until_ready(sample(params, low, labels, seeds))
    return time.perf_counter() - began, seconds_each(lambda: sample(params, low, labels, seeds))


def main(_) -> None:
    """Prints the table."""
    config = configs.parse(_CONFIG.value)
    print(f"{jax.device_count()} x {jax.devices()[0].device_kind}, jax {jax.__version__}\n")
    print("| stage | parameters | compile training | training | evaluations | first batch sampled | sampling |")
    print("|---|---|---|---|---|---|---|")
    channels = config.data.channels
    for number, stage in enumerate(config.stages, 1):
        network = stage.build(channels, _CLASSES.value)
        compile_seconds, rate = training(stage, network, channels)
        first, later = sampling(config, number, network, channels)
        size = config.sampling.batch_size
        cells = [f"{number}: {stage.resolution[0]} x {stage.resolution[1]}", f"{network.count():,}", f"{compile_seconds:.1f} s"]
        cells += [f"{rate:.0f} images/s", f"{evaluations(stage)}", f"{first:.1f} s", f"{size / later:.1f} images/s"]
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    app.run(main)
