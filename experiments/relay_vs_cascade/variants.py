"""The methods that are compared, as configs."""

import dataclasses

from experiments import common
from experiments.methods import Variant
from rdm_jax.config import Config, Training
from rdm_jax.diffusion.processes import CascadeProcess, GaussianProcess
from rdm_jax.diffusion.samplers import CascadeHeun, Heun

TITLES = {"relay": "relay", "cascade": "classic cascade", "single": "one stage"}
ETAS = (0.0, 0.1, 0.2, 0.3)  # of all samplers
SIGMAS = (80.0, 20.0, 10.0, 5.0, 2.5)  # first levels of methods that start from noise; EDM's is 80
AUGMENTS = (0.0, 0.05, 0.1, 0.2, 0.4)  # noise levels of the cascade's small image in sampling
POINTS = 3  # checkpoints of the relay at which the methods are compared


def variants(config: Config) -> dict[str, Config]:
    """The three methods, without guidance; all noise schedules end at the same level.

    relay: as in the config.
    cascade: stage 2 generates from pure noise, conditioned on the small image (CDM, arXiv
      2106.15282); its network is the relay's, with more input channels.
    single: stage 2's network generates at full resolution, and trains on as many images as both
      stages together.

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


def tuned_variants(config: Config) -> dict[str, Variant]:
    """The same with what is tuned of each."""
    found, etas = variants(config), {"eta": ETAS}
    from_noise = [{"sigma_max": sigma} for sigma in SIGMAS]
    settings = {"relay": etas, "cascade": {"augment": AUGMENTS} | etas, "single": etas}
    return {
        name: Variant(
            TITLES[name], found[name], settings[name], ({},) if name == "relay" else from_noise
        )
        for name in found
    }


def _interval(relays: Training) -> int:
    """Steps between checkpoints: whole parts of the relay's training, two per point."""
    return max(1, relays.steps // (2 * POINTS))


def points(training: Training, relays: Training) -> list[int]:
    """Steps of a last network's checkpoints that are compared.

    They are at `POINTS` parts of the relay's training; the last is its end. A single stage, which
    trains longer, is compared where it has seen as many images as both stages of the relay, up to
    half of the steps between two checkpoints.
    """
    interval = _interval(relays)
    before = round((training.steps - relays.steps) / interval) * interval
    return [before + 2 * interval * part for part in range(1, POINTS)] + [training.steps]
