"""What each host of a large run does at its start and beside its steps, measured on one host.

    python -m experiments.benchmarks.hosts --config configs/imagenet.py --stage 2

The first table counts, from the config, what each process reads, keeps and sends with 1, 8 and 64
hosts. The others are measured in this process: the order of an epoch, opening as many files of
records as a set of so many images has (each with four small images), and checkpoints of a training
state of the stage's network, of which `--fractions` are made: as many of its parameters as fit,
float32, with Adam's moments and an EMA. 'loop stands still' is how long a save keeps the training
loop; the rest happens in other threads while steps go on. Files are read from the page cache, and
by one process, so that their reading is not shared out (`trees.spread`). The rows of an evaluation
are per set of images, and for one device per process.
"""

import contextlib
import math
import tempfile
import time
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import optax
from absl import flags
from PIL import Image

from experiments.benchmarks.timing import machine, print_row, start_table
from rdm_jax import config as configs
from rdm_jax.checkpoints import store
from rdm_jax.cli.command import command
from rdm_jax.cli.config_flag import define_config
from rdm_jax.config import Stage
from rdm_jax.data import pipeline, prepare
from rdm_jax.data.image_sets import open_prepared
from rdm_jax.data.images import ImageSpec
from rdm_jax.training.step import TrainState, init_state

_CONFIG = define_config()
_STAGE = flags.DEFINE_integer("stage", 2, "Whose checkpoints are measured, from 1.")
_CLASSES = flags.DEFINE_integer("classes", 1000, "Number of classes.")
_IMAGES = flags.DEFINE_integer("images", 1_281_167, "Images of the set.")
_FRACTIONS = flags.DEFINE_list(
    "fractions", ["0.1", "0.25"], "Of the network's parameters, in checkpoints."
)
_DIRECTORY = flags.DEFINE_string("directory", None, "Where files are written; by default /tmp.")

HOSTS = (1, 8, 64)
COPIES = 4  # parameters, EMA and Adam's two moments
FEATURES, SPATIAL, LOGITS = 2048, 2023, 1008  # of Inception
MEASURED = 50_000  # images of an evaluation, and of the samples


def main() -> None:
    """Prints the tables."""
    config = configs.parse(_CONFIG.value)
    stage = config.stage(_STAGE.value)
    print(machine())
    count(config, stage)
    with tempfile.TemporaryDirectory(dir=_DIRECTORY.value) as folder:
        start_table("Data:", ("what", "seconds", "memory or files"))
        order()
        records(Path(folder))
        columns = ("part of the parameters", "size", "loop stands still, s", "on disk after, s")
        start_table("Checkpoints:", (*columns, "checksums at a start, s", "read, s"))
        for fraction in _FRACTIONS.value:
            checkpoint(stage, config.data.channels, float(fraction), Path(folder) / fraction)


def count(config: configs.Config, stage: Stage) -> None:
    """Prints what each process does, from the config."""
    parameters = stage.build(config.data.channels, _CLASSES.value).num_parameters
    state, kept = 4 * COPIES * parameters, config.evaluation.kept
    pixels = math.prod(config.stages[-1].resolution) * config.data.channels
    values = FEATURES + SPATIAL + LOGITS
    # Two float32 for each float64.
    sums = 8 * (FEATURES**2 + SPATIAL**2) + 8 * MEASURED // 5000 * LOGITS + 4 * kept * FEATURES
    files = -(-_IMAGES.value // _images_per_file())
    start_table("A process of as many hosts:", ("what", *map(str, HOSTS)))
    rows = {
        "images of a batch that it reads": lambda n: f"{stage.training.batch_size // n:,}",
        "order of an epoch in memory": lambda _: size(8 * _IMAGES.value),
        "files of records that it opens": lambda _: f"{files:,}",
        "exchanged with each step, beside gradients": lambda _: "4 B per device",
        "written of a checkpoint": lambda n: size(state / n),
        "read of a checkpoint to resume": lambda n: size(state / n),
        "the same if each read the whole (0.1.0)": lambda _: size(state),
        "read of a checkpoint to sample: the EMA": lambda _: size(4 * parameters),
        "checksums, by process 0 alone, per save": lambda _: size(state),
        "images measured, of 50,000": lambda n: f"{MEASURED / n:,.0f}",
        "received at the end of an evaluation": lambda n: size(sums if n > 1 else 0),
        "the same if all received all (0.1.0)": lambda n: size(
            MEASURED * (4 * values + pixels) if n > 1 else 0
        ),
        "samples looked at before more are made": lambda n: f"{MEASURED / n:,.0f}",
    }
    for name, cell in rows.items():
        print_row([name, *map(cell, HOSTS)])


def order() -> None:
    """Prints the time and memory of an epoch's order."""
    began = time.perf_counter()
    indices = pipeline.epoch_order(0, 0, _IMAGES.value)
    cells = (f"{time.perf_counter() - began:.3f}", size(indices.nbytes))
    print_row([f"order of {_IMAGES.value:,} images, once an epoch", *cells])


def records(folder: Path) -> None:
    """Prints the time to open a prepared set of as many files, and to read a batch."""
    files = -(-_IMAGES.value // _images_per_file())
    source, random = folder / "images", np.random.default_rng(0)
    source.mkdir()
    for number in range(4 * files):
        pixels = random.integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).save(source / f"{number:06d}.png")
    with mock.patch.object(prepare, "SHARD_IMAGES", 4):
        directory = prepare.prepare(f"folder:{source}", folder / "set", ImageSpec(8, 8))
    began = time.perf_counter()
    images = open_prepared(directory)
    print_row(["open the set", f"{time.perf_counter() - began:.2f}", f"{files:,} files"])
    began = time.perf_counter()
    with contextlib.closing(pipeline.train_iterator(images, batch_size=256, seed=0)) as batches:
        next(batches)
    print_row(["first batch of 256", f"{time.perf_counter() - began:.2f}", ""])


def _images_per_file() -> int:
    return max(prepare.SHARD_IMAGES, -(-_IMAGES.value // prepare.MANY_SHARDS))


def checkpoint(stage: Stage, channels: int, fraction: float, folder: Path) -> None:
    """Prints a row of a save and a restore."""
    state = training_state(stage, channels, fraction)
    folder.mkdir()
    with contextlib.closing(store.Checkpoints(folder)) as checkpoints:
        # The first save of a process starts threads and more.
        checkpoints.save(jax.tree.map(lambda x: x[:1] if x.ndim else x, state), about())
        checkpoints.wait()
        state = state.replace(step=state.step + 1)
        began = time.perf_counter()
        checkpoints.save(state, about())
        still = time.perf_counter() - began
        checkpoints.wait()
        written = time.perf_counter() - began
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    del state
    began = time.perf_counter()
    with contextlib.closing(store.Checkpoints(folder)) as checkpoints:  # compares checksums
        hashed = time.perf_counter() - began
        began = time.perf_counter()
        jax.block_until_ready(checkpoints.restore(1, abstract)[0].params)
        restored = time.perf_counter() - began
    nbytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract))
    seconds = (f"{x:.2f}" for x in (still, written, hashed, restored))
    print_row([f"{fraction:g}", size(nbytes), *seconds])


def training_state(stage: Stage, channels: int, fraction: float) -> TrainState:
    """A random state of the network's first parameters, in the host's memory on CPUs."""
    network = stage.build(channels, _CLASSES.value)
    leaves = jax.tree.leaves(network.abstract)
    left, random, params = fraction * network.num_parameters, np.random.default_rng(0), {}
    for number, leaf in enumerate(leaves):
        if leaf.size <= left:
            params[f"{number:04d}"] = random.random(leaf.shape, np.float32)
            left -= leaf.size
    state = init_state(jax.tree.map(jax.numpy.asarray, params), optax.adam(1e-4))
    # Zeros would be compressed to nothing.
    filled = jax.tree.map(
        lambda x: jax.numpy.asarray(random.random(x.shape, np.float32)) if x.ndim else x,
        (state.ema, state.opt_state),
    )
    return state.replace(ema=filled[0], opt_state=filled[1])


def about() -> dict:
    """What a checkpoint says of itself."""
    return {"validation_loss": None, "validated_on": ""}


def size(nbytes: float) -> str:
    """Bytes as a cell."""
    for unit in ("B", "kB", "MB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} GB"


if __name__ == "__main__":
    command(main)
