"""U-Nets against transformers in a relay, at equal training time. See README.md.

    python -m experiments.transformers.compare --config configs/digits.py
    python -m experiments.transformers.compare --config configs/emoji_small.py --seeds 0

All relays of a seed share its stage 1, but for the one that has a transformer there too. A network
is trained on as many images as fit into the time of the U-Net, measured on this machine before.
"""

import dataclasses
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments import common
from experiments.benchmarks import timing
from experiments.benchmarks.random_training import Training
from experiments.transformers.variants import CHOSEN, variants
from rdm_jax import config as configs
from rdm_jax.checkpoints import store
from rdm_jax.cli.command import command
from rdm_jax.cli.config_flag import define_config
from rdm_jax.cli.cores import use_cores
from rdm_jax.config import Config, validate
from rdm_jax.data.image_sets import ImageSet
from rdm_jax.diffusion import preconditioning
from rdm_jax.diffusion.processes import RelayProcess
from rdm_jax.render import pictures
from rdm_jax.render.tables import markdown
from rdm_jax.runtime import sharding
from rdm_jax.runtime.files import atomic_write, local_path
from rdm_jax.runtime.random_streams import root_key
from rdm_jax.runtime.ranges import parse_numbers

_CONFIG = define_config("Of a relay of two stages; configs/digits.py if it is not given.")
_WORKDIR = flags.DEFINE_string(
    "workdir", "runs/transformers", "Of all runs; the same command resumes."
)
_SEEDS = flags.DEFINE_string("seeds", "0-2", "Of the runs; everything is trained once per seed.")
_VARIANTS = flags.DEFINE_string("variants", ", ".join(CHOSEN), "Names, or 'all'.")
_SECONDS = flags.DEFINE_float("seconds", 20.0, "For timing the training of a network.")

TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)  # of the relay's clock, at which the loss is measured
SHOWN = 10  # columns of the picture


@dataclasses.dataclass
class Relay:
    """A relay, trained with one seed; its config names the checkpoints."""

    name: str
    config: Config
    workdir: Path


def seconds_per_image(config: Config, number: int, classes: int, root: Path) -> float:
    """Of training a stage on this machine; measured once per network and kept in a file.

    Timings of different networks are comparable if nothing else runs on the machine.
    """
    path = root / "seconds_per_image.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    stage = config.stage(number)
    key = f"{stage.resolution} batch {stage.training.batch_size} {stage.network}"
    if key not in known:
        training = Training(config, number, classes)
        found = timing.medians({key: training.step}, _SECONDS.value)
        known[key] = found[key] / stage.training.batch_size
        with atomic_write(path) as partial:
            partial.write_text(json.dumps(known, indent=2))
    return known[key]


def with_equal_time(config: Config, usual: Config, classes: int, root: Path) -> Config:
    """The config whose stages train as long as those of the usual one."""
    for number in (1, 2):
        stage, target = config.stage(number), usual.stage(number)
        if stage == target:
            continue
        ratio = seconds_per_image(usual, number, classes, root) / seconds_per_image(
            config, number, classes, root
        )
        steps = max(1, round(target.training.images * ratio / stage.training.batch_size))
        config = config.with_stage(number, training={"images": steps * stage.training.batch_size})
    return config


def trained(relays: dict[str, Config], root: Path, seed: int) -> list[Relay]:
    """Trains all relays with one seed."""
    found, usual = [], dataclasses.replace(relays["unet"], seed=seed)
    for name, config in relays.items():
        workdir = root / f"{re.sub('[^a-z]+', '_', name)}-{seed}"
        config = dataclasses.replace(config, seed=seed)
        for number in (1, 2):
            if number == 1 and config.stage(1) == usual.stage(1):
                checkpoint = common.trained(usual, root / f"unet-{seed}", 1)
            else:
                checkpoint = common.trained(config, workdir, number)
            config = config.with_stage(number, checkpoint=str(checkpoint))
        found.append(Relay(name, config, workdir))
    return found


def loss_by_time(relay: Relay, held_out: ImageSet, count: int = 256) -> list[float]:
    """Stage 2's weighted loss on held-out images at `TIMES`, with fixed noise."""
    config, stage = relay.config, relay.config.stage(2)
    network = stage.build(config.data.channels, len(held_out.class_names))
    folder = Path(stage.checkpoint)
    checkpoints = store.Checkpoints(folder.parent, read_only=True)
    replicated = sharding.replicated(sharding.local_mesh())
    params, _ = checkpoints.restore_ema(
        int(folder.name), store.with_sharding(network.abstract, replicated)
    )
    checkpoints.close()
    known = stage.condition_for(len(held_out.class_names))
    chosen = np.linspace(0, len(held_out) - 1, count).astype(int)
    batch = held_out.batch(chosen, text="text" in known.inputs)
    images = stage.representation.encode(jnp.asarray(batch["image"]), 1)
    condition = known.encode({name: jnp.asarray(batch[name]) for name in known.inputs})
    keys = jax.random.split(root_key(0), len(images))
    noise = jax.vmap(lambda key: stage.process.draw_noise(key, images.shape[1:]))(keys)

    @jax.jit
    def loss(time):
        noised = stage.process.noised(images, jnp.full(len(images), time), noise)
        denoise = preconditioning.denoiser(
            lambda x, c_noise: network.apply(params, x, c_noise, condition), stage.precondition
        )
        error = denoise(noised.images, noised.sigma) - images
        # EDM's weight for all, so that relays of other weights can be compared.
        weight = RelayProcess().weight(noised.sigma)
        return jnp.mean(weight * jnp.mean(error**2, (1, 2, 3)))

    return [float(loss(jnp.float32(time))) for time in TIMES]


def chosen(config: Config) -> dict[str, Config]:
    """The relays that the command line names, the U-Nets first. Raises InputError."""
    found = common.named(variants(config), _VARIANTS.value, "--variants")
    for relay in found.values():
        validate.check_config(relay)
    return found


def row(same: list[Relay], held_out: ImageSet) -> tuple[list[str], list[str]]:
    """A relay's cells, over seeds, of the table of metrics and of that of losses."""
    name, config = same[0].name, same[0].config
    metrics = [common.measured(relay.config, relay.workdir, "evaluation") for relay in same]
    classes = len(held_out.class_names)
    second = config.stage(2)
    cost = [
        f"{second.build(config.data.channels, classes).num_parameters / 1e6:.2f} M",
        f"{second.multiply_adds(config.data.channels, classes) / 1e6:.0f} M",
        f"{second.training.images:,}",
    ]
    losses = np.mean([loss_by_time(relay, held_out) for relay in same], axis=0)
    return [name, *cost, *common.cells(metrics)], [name, *(f"{loss:.4f}" for loss in losses)]


def compare() -> None:
    """Trains, measures, and prints the tables."""
    root = local_path(_WORKDIR.value, "--workdir")
    config = configs.parse(_CONFIG.value)
    use_cores(config, timing.cores())
    common.check_relay(config)
    relays, seeds = chosen(config), parse_numbers(_SEEDS.value, "--seeds")
    base, held_out, floor = common.prepared(config, root)
    base = common.with_evaluation(base, images="samples")

    # Timing first, alone on the machine.
    relays = {
        name: with_equal_time(
            dataclasses.replace(relay, data=base.data, evaluation=base.evaluation),
            config,
            len(held_out.class_names),
            root,
        )
        for name, relay in relays.items()
    }
    by_seed = [trained(relays, root, seed) for seed in seeds]
    rows = [row(list(same), held_out) for same in zip(*by_seed, strict=True)]
    picture = common.draw_samples(
        ((relay.name, relay.config, relay.workdir) for relay in by_seed[0]), SHOWN
    )
    pictures.save_picture(picture, root / "images.png")
    columns = ["stage 2", "parameters", "multiply-adds", "images", *common.columns(floor)]
    real = ["held-out real images", "", "", "", *common.cells([floor])]
    print(f"\n{markdown(columns, [*(metrics for metrics, _ in rows), real])}")
    header = ["stage 2", *(f"t = {time:g}" for time in TIMES)]
    losses = markdown(header, [losses for _, losses in rows])
    print(f"\nLoss of stage 2 on held-out images, EDM's weight\n\n{losses}")


if __name__ == "__main__":
    common.start()
    command(compare, lambda: _WORKDIR.value, config="configs/digits.py")
