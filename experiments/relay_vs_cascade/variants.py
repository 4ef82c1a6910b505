"""The methods that are compared, as configs."""

import dataclasses

from experiments import common
from rdm_jax.config import Config, Training
from rdm_jax.diffusion.processes import CascadeProcess, GaussianProcess
from rdm_jax.diffusion.samplers import CascadeHeun, Heun

TITLES = {"relay": "relay", "cascade": "classic cascade", "single": "one stage"}
ETAS = (0.0, 0.1, 0.2, 0.3)  # of all samplers
ORDERS = {1: "Euler", 2: "Heun"}
SIGMAS = (
    80.0,
    20.0,
    10.0,
    5.0,
    2.5,
)  # where the ladders of those that begin with noise begin; 80 is EDM's
AUGMENTS = (0.0, 0.05, 0.1, 0.2, 0.4)  # noise levels of the cascade's small image in sampling


POINTS = 3  # checkpoints of the relay at which all methods are compared


def variants(config: Config) -> dict[str, Config]:
    """The three methods, none guided, all ladders ending at one noise level; they differ in what is
    said here alone.

    relay: as the config has it.
    cascade: stage 2 generates from pure noise and is given the small image (CDM, arXiv 2106.15282);
      its network is the relay's but for these channels of its input.
    single: stage 2's network alone generates at full resolution, and is shown as many images as
      both stages together.

    Every checkpoint of the last networks is kept, and `points` are among them.
    """
    config = common.with_evaluation(config, images="samples").with_stage(1, guidance=1.0)
    first, second = config.stages
    interval = second.training.batch_size * _interval(second.training)
    images = first.training.images + second.training.images
    kept = {"checkpoint_every": interval, "keep_newest": images // interval + 1}
    config = config.with_stage(2, guidance=1.0, training=kept)
    second = config.stages[1]
    cascade = CascadeProcess(patch=second.process.patch, augment_max=max(AUGMENTS))
    begin = {"sigma_min": second.sampler.sigma_min}
    alone = dataclasses.replace(
        config,
        stages=(dataclasses.replace(second, process=GaussianProcess(), sampler=Heun(**begin)),),
    )
    return {
        "relay": config,
        "cascade": config.with_stage(2, process=cascade, sampler=CascadeHeun(**begin)),
        "single": alone.with_stage(1, training={"images": images}),
    }


def _interval(relays: Training) -> int:
    """Steps between checkpoints: whole parts of the relay's training, two to a point."""
    return max(1, relays.steps // (2 * POINTS))


def points(training: Training, relays: Training) -> list[int]:
    """Steps of a last network's checkpoints that are compared: at `POINTS` parts of the relay's
    training, the last its end.

    Of one stage, which is trained for longer: those at which it has seen as many images as both
      stages of the relay, but for
    less than half of the steps between two checkpoints.
    """
    interval = _interval(relays)
    before = round((training.steps - relays.steps) / interval) * interval
    return [before + 2 * interval * part for part in range(1, POINTS)] + [training.steps]
