"""Training and sampling of every stage of a config, as Markdown tables.

The columns are compile times, images per second, utilisation and memory.

    python -m experiments.benchmarks.speed --config configs/digits.py
    python -m experiments.benchmarks.speed --config configs/imagenet.py --classes 1000 --stage 2 \\
        --batch 32 --variants bfloat16,bfloat16+block,bfloat16+convolutions --nfe 3 \\
        --profile profiles

It runs on all devices that JAX finds. Data is random, and only tables are written and, if
requested, profiles: traces of a few calls, for TensorBoard or xprof, in one folder per row.

Every variant is a row: 'config' for the config as it is, or changes to it joined by +: float32 and
bfloat16 (network.dtype), none, block, convolutions and products (network.remat), accumulate2,
accumulate4 and so on (training.accumulate), pjit, pmap and fsdp (parallel: fsdp shards parameters
over all devices). Only rows of one run should be compared. A variant that does not fit the devices'
memory is a row that says so.

Training: "compiling" is the time until the first step has run, less one step. Steps are started one
after the other, as in training, and the last is waited for. TFLOP/s are per device: of the network,
two per multiply-add, forward and twice that backward, so that rematerialisation counts as time, not
as work. "Utilisation" is their share of the chip's published peak for the network's dtype; '-' if
that is not known (CPUs). "Memory" is the most that the process has held on its first device up to
the end of the row, '-' if the device does not say, and '<=' if an earlier row took as much: a
variant that is run alone has its own.

Sampling: a batch goes through the stage alone. "NFE" is that of the whole sampler; --nfe times a
shorter noise schedule with at least that NFE, and images per second then follow from "ms per
evaluation", which has all passes of guidance, a guide's too. "Own share" is the share of time that
the same sampler takes with networks that return their input: noise, updates, preconditioning,
guidance.
"""

import dataclasses
import itertools
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments.benchmarks import timing
from experiments.benchmarks.random_training import Training
from rdm_jax import config as configs
from rdm_jax.cli.command import command
from rdm_jax.cli.config_flag import define_config
from rdm_jax.config import validate
from rdm_jax.data.classes import Classes
from rdm_jax.models import transformer, unet
from rdm_jax.models.functional import Network
from rdm_jax.runtime import sharding
from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.files import local_path
from rdm_jax.sampling import guides
from rdm_jax.sampling.stage_sampler import StageSampler
from rdm_jax.training.program import PROGRAMS

_CONFIG = define_config()
_STAGE = flags.DEFINE_multi_integer(
    "stage", [], "Numbers of the stages to time; all if it is not given.", 1
)
_VARIANTS = flags.DEFINE_list("variants", ["config"], "Rows of each stage.")
_BATCH = flags.DEFINE_integer(
    "batch", 0, "Images per step and per batch of samples, over all devices; 0 for the config's.", 0
)
_CLASSES = flags.DEFINE_integer(
    "classes", 10, "Number of classes; 0 for unconditional networks.", 0
)
_SECONDS = flags.DEFINE_float("seconds", 10.0, "How long to time each thing.")
_TRAINING = flags.DEFINE_bool("training", True, "Whether to time training.")
_SAMPLING = flags.DEFINE_bool("sampling", True, "Whether to time sampling.")
_NFE = flags.DEFINE_integer(
    "nfe", 0, "Least network evaluations in the sampling that is timed; 0 for all.", 0
)
_PROFILE = flags.DEFINE_string("profile", "", "Folder for a profile of each row; '' for none.")

PROFILED = 3  # calls in a profile
REMAT = {*unet.REMAT, *transformer.REMAT}
TRAINING = (
    "stage",
    "variant",
    "batch",
    "parameters",
    "compiling, s",
    "ms per step",
    "images/s",
    "TFLOP/s",
    "utilisation",
    "memory",
)
SAMPLING = (
    "stage",
    "variant",
    "batch",
    "NFE",
    "compiling, s",
    "ms per evaluation",
    "images/s",
    "utilisation",
    "own share",
)


def varied(config: configs.Config, variant: str) -> configs.Config:
    """The config with a variant's changes."""
    network, training, parallel = {}, {}, {}
    for change in variant.split("+"):
        if change in ("float32", "bfloat16"):
            network["dtype"] = change
        elif change in REMAT:
            network["remat"] = change
        elif match := re.fullmatch(r"accumulate(\d+)", change):
            training["accumulate"] = int(match[1])
        elif change in PROGRAMS:
            parallel["mode"] = change
        elif change == "fsdp":
            parallel |= {"data": 1, "fsdp": -1}
        elif change != "config":
            raise InputError(
                f"--variants={variant!r} has the unknown change {change!r}",
                "Use the changes that --helpshort lists.",
            )
    for stage in config.stages:
        config = config.with_stage(stage.number, network=network, training=training)
    return dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, **parallel))


def resized(config: configs.Config, batch: int) -> configs.Config:
    """The config with batches of another size, if that is not 0."""
    if not batch:
        return config
    for stage in config.stages:
        config = config.with_stage(stage.number, training={"batch_size": batch})
    sampling = dataclasses.replace(config.sampling, batch_size=batch)
    return dataclasses.replace(config, sampling=sampling)


def training_row(
    config: configs.Config,
    number: int,
    variant: str,
    classes: int,
    seconds: float,
    profile: str = "",
) -> list[str]:
    """Cells of a row of the first table."""
    stage, held = config.stage(number), timing.peak_bytes()
    size, network = stage.training.batch_size, stage.network
    training = Training(config, number, classes)
    each = timing.medians({"step": training.step}, seconds)["step"]
    _profiled(training.step, profile, f"training_stage{number}_{variant}")
    flops = 3 * timing.forward_flops(stage, config.data.channels, classes) * size
    rate = flops / each / jax.device_count()
    count = stage.build(config.data.channels, classes).num_parameters
    cells = [
        f"{count:,}",
        f"{max(0.0, training.compiling - each):.1f}",
        timing.milliseconds(each),
        f"{size / each:,.3g}",
    ]
    cells += [f"{rate / 1e12:.3g}", timing.of_peak(rate, network.dtype), memory(held)]
    return [*_about(number, stage, variant), f"{size:,}", *cells]


def memory(before: int) -> str:
    """The peak so far, marked where it is an earlier row's."""
    now = timing.peak_bytes()
    if not now:
        return "-"
    return f"{'<= ' if now == before else ''}{now / 2**30:.2f} GiB"


def short(stage: configs.Stage, least: int) -> configs.Stage:
    """The stage with the shortest noise schedule of at least this NFE; unchanged if it is 0."""
    if not least:
        return stage
    shorter = (
        dataclasses.replace(stage, sampler=dataclasses.replace(stage.sampler, steps=steps))
        for steps in range(2, stage.sampler.steps)
    )
    return next((each for each in shorter if each.nfe >= least), stage)


def sampler(
    config: configs.Config,
    number: int,
    stage: configs.Stage,
    network: Network,
    classes: int,
    guided_by: Sequence[guides.Guide] = (),
) -> Callable[[Any], Any]:
    """params -> a batch of samples."""
    size, channels, mesh = config.sampling.batch_size, config.data.channels, sharding.local_mesh()
    run = StageSampler(
        stage,
        network,
        number=number,
        channels=channels,
        classes=classes,
        run_seed=0,
        guides=guided_by,
    )
    low_resolution = (side // stage.factor for side in stage.resolution)
    low = np.zeros((size, *low_resolution, channels), np.float32)
    seeds = np.arange(size, dtype=np.uint32)
    given = {"label": np.zeros(size, np.int32)}
    for name, one in stage.condition_for(classes).inputs.items():
        given[name] = np.zeros((size, *one.shape), one.dtype)
    low, given, seeds = sharding.put_batch((low if stage.factor > 1 else None, given, seeds), mesh)
    return lambda params: run(params, low, given, seeds)


def idle(stage: configs.Stage, network: Network) -> Network:
    """A network that takes no time; it uses none of the parameters."""
    outputs = stage.precondition.outputs
    return network._replace(
        apply=lambda params, x, *labels: jnp.tile(x, (1, 1, 1, outputs)), dtypes={}
    )


def sampling_row(
    config: configs.Config,
    number: int,
    variant: str,
    classes: int,
    seconds: float,
    least: int = 0,
    profile: str = "",
) -> list[str]:
    """Cells of a row of the second table."""
    whole, channels = config.stage(number), config.data.channels
    stage, network = short(whole, least), whole.build(channels, classes)
    size = config.sampling.batch_size
    # Random parameters know no names of classes.
    names = Classes(tuple(map(str, range(classes))), by_number=True)
    guided_by = guides.load(whole, channels, names)
    params = timing.parameters(network)
    idle_guides = [g._replace(network=idle(g.stage, g.network), params={}) for g in guided_by]
    sample = sampler(config, number, stage, network, classes, guided_by)
    without = sampler(config, number, stage, idle(whole, network), classes, idle_guides)
    began = time.perf_counter()
    jax.block_until_ready(sample(params))
    first = time.perf_counter() - began
    times = timing.medians({"sample": lambda: sample(params), "own": lambda: without({})}, seconds)
    _profiled(lambda: sample(params), profile, f"sampling_stage{number}_{variant}")
    each, count = times["sample"] / stage.nfe, whole.nfe
    flops = 2 * size * guides.multiply_adds(whole, channels, classes) / count
    rate = flops / each / len(jax.local_devices())
    cells = [
        f"{count}",
        f"{max(0.0, first - times['sample']):.1f}",
        timing.milliseconds(each),
        f"{size / each / count:,.3g}",
    ]
    cells += [timing.of_peak(rate, whole.network.dtype), f"{times['own'] / times['sample']:.3%}"]
    return [*_about(number, whole, variant), f"{size:,}", *cells]


def _about(number: int, stage: configs.Stage, variant: str) -> list[str]:
    return [f"{number}: {' x '.join(map(str, stage.resolution))}", variant]


def _profiled(function: Callable[[], Any], folder: str, name: str) -> None:
    """Writes a profile of a few calls, if there is a folder for it."""
    if folder:
        with jax.profiler.trace(str(Path(folder) / re.sub(r"\W", "_", name))):
            jax.block_until_ready([function() for _ in range(PROFILED)])


def fitting(
    row: Callable[..., list[str]], config: configs.Config, number: int, variant: str, *args: Any
) -> list[str]:
    """The row, or one that says that it does not fit into the devices' memory."""
    try:
        return row(config, number, variant, *args)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return [*_about(number, config.stage(number), variant), "does not fit into memory"]


def rows(config: configs.Config) -> Iterator[tuple[configs.Config, int, str]]:
    """What the flags ask for: configs that are checked, stages and variants."""
    for number, variant in itertools.product(
        _STAGE.value or range(1, len(config.stages) + 1), _VARIANTS.value
    ):
        changed = varied(config, variant)
        validate.check_devices(changed, jax.device_count(), jax.local_device_count())
        yield changed, number, variant


def main() -> None:
    """Prints the tables."""
    local_path(_PROFILE.value, "--profile")  # refuses a URL before anything is timed
    config = resized(configs.parse(_CONFIG.value), _BATCH.value)
    arguments = (_CLASSES.value, _SECONDS.value)
    print(timing.machine())
    if _TRAINING.value:
        timing.start_table("Training", TRAINING)
        for row in rows(config):
            timing.print_row(fitting(training_row, *row, *arguments, _PROFILE.value))
    if _SAMPLING.value:
        timing.start_table("Sampling", SAMPLING)
        sampled = set()  # variants of training alone make no other samples
        for changed, number, variant in rows(config):
            if (about := (number, changed.stages[number - 1].network.dtype)) not in sampled:
                sampled.add(about)
                more = (*arguments, _NFE.value, _PROFILE.value)
                timing.print_row(fitting(sampling_row, changed, number, variant, *more))


if __name__ == "__main__":
    command(main)
