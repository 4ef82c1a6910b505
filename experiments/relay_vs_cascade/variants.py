"""The methods that are compared, as configs."""

import dataclasses

from experiments import runs
from rdm_jax.config import Config
from rdm_jax.diffusion.processes import Cascade, Gaussian
from rdm_jax.diffusion.samplers import CascadeHeun, Heun

TITLES = {"relay": "relay", "cascade": "classic cascade", "single": "one stage"}
ETAS = (0.0, 0.1, 0.2, 0.3)  # of the relay's sampler
SIGMAS = (80.0, 20.0, 10.0, 5.0, 2.5)  # where the ladders of those that begin with noise begin; 80 is EDM's
AUGMENTS = (0.0, 0.05, 0.1, 0.2, 0.4)  # noise levels of the cascade's small image in sampling


def variants(config: Config) -> dict[str, Config]:
    """The three methods, none guided; they differ in what is said here alone.

    relay: as the config has it.
    cascade: stage 2 generates from pure noise and is given the small image (CDM, arXiv 2106.15282); its network is the relay's
      but for these channels of its input.
    single: stage 2's network alone generates at full resolution, and is shown as many images as both stages together.
    """
    config = runs.with_evaluation(config, images="samples")
    for number, stage in enumerate(config.stages, 1):
        kept = stage.training.images // stage.training.checkpoint_every + 1
        config = runs.with_stage(config, number, guidance=1.0, training={"keep_newest": kept})
    first, second = config.stages
    cascade = Cascade(patch=second.process.patch, augment_max=max(AUGMENTS))
    images = first.training.images + second.training.images
    kept = images // second.training.checkpoint_every + 1
    alone = dataclasses.replace(config, stages=(dataclasses.replace(second, process=Gaussian(), sampler=Heun()),))
    return {
        "relay": config,
        "cascade": runs.with_stage(config, 2, process=cascade, sampler=CascadeHeun()),
        "single": runs.with_stage(alone, 1, training={"images": images, "keep_newest": kept}),
    }
