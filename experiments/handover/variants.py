"""The hand-overs that are compared, as configs."""

import dataclasses

import jax.numpy as jnp

from experiments.methods import Variant
from experiments.relay_vs_cascade.variants import ETAS, tuned_variants
from rdm_jax.config import Config
from rdm_jax.diffusion.coupling import CouplingHeun, CouplingProcess
from rdm_jax.diffusion.jump import JumpHeun
from rdm_jax.diffusion.schedules import Path

BLUR = 1.125  # of the jump's process at the end of its clock, in patches: complete at all JOINS
JOINS = (0.999, 0.8, 0.6, 0.4)  # levels at which the jump joins, in parts of the process's largest
NOISE = 0.5  # of the coupling's enlarged image


def variants(config: Config) -> dict[str, Variant]:
    """Five methods with the same networks; `relay_vs_cascade.variants` has three of them.

    relay: block noise, from finished small images, as in the config.
    jump: white noise, from the state at which stage 1 stops; stage 1 is the relay's.
    coupling: a straight path from the enlarged small image, conditioned on it.
    cascade, single: as there.
    """
    usual = tuned_variants(config)
    base = usual["relay"].config
    relay, precondition = base.stages[1], base.stages[1].precondition
    clock = dataclasses.replace(relay.process.clock, blur_sigma_max=BLUR * relay.process.patch)
    white = dataclasses.replace(relay.process, block_scale=0.0, clock=clock)
    largest = float(clock.sigma(jnp.float32(1)))
    sampler = JumpHeun(sigma_min=relay.sampler.sigma_min, sigma_max=JOINS[0] * largest)
    jump = base.with_stage(2, process=white, sampler=sampler)
    jump = jump.with_stage(1, sampler={"stop": sampler.joins_at(white)})
    path = getattr(precondition, "path", Path(NOISE))  # that of x-prediction, if it has one
    coupled = CouplingProcess(path=path, patch=relay.process.patch)
    coupling = base.with_stage(2, process=coupled, sampler=CouplingHeun())
    joins = [{"sigma_max": round(part * largest, 4)} for part in JOINS]
    return {
        "relay": dataclasses.replace(usual["relay"], title="block noise"),
        "jump": Variant("exact jump", jump, {"eta": ETAS}, joins),
        "coupling": Variant("coupling", coupling, {}),
        "cascade": usual["cascade"],
        "single": usual["single"],
    }
