"""Tiny stages to plan, and the programs that train them."""

import dataclasses

import jax
import jax.numpy as jnp

from rdm_jax.config import Config, Parallel
from rdm_jax.plan.chips import CHIPS
from rdm_jax.plan.plan import plan
from rdm_jax.runtime import sharding
from rdm_jax.training.program import PROGRAMS
from tests.support.configs import tiny_config

CLASSES = 2
V5E = next(chip for chip in CHIPS if chip.name == "v5e")


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def config(**training) -> Config:
    """Two tiny stages for eight devices."""
    return tiny_config("images", **{"batch_size": 16, **training})


def replaced(values: Config, number: int, **network) -> Config:
    stages = list(values.stages)
    stages[number - 1] = dataclasses.replace(
        stages[number - 1], network=dataclasses.replace(stages[number - 1].network, **network)
    )
    return dataclasses.replace(values, stages=tuple(stages))


def cut(values: Config, data: int, fsdp: int) -> Config:
    return dataclasses.replace(values, parallel=Parallel(data=data, fsdp=fsdp))


def program(values: Config, number=2, devices=8):
    mesh = sharding.make_mesh(values.parallel.data, values.parallel.fsdp, jax.devices()[:devices])
    return PROGRAMS[values.parallel.mode](
        values.stages[number - 1], (8, 8, 3), CLASSES, jax.random.key(1), mesh
    )


def show(target, values=None, **kwargs):
    return plan(
        values or config(),
        target,
        **{"utilisation": 0.5, "classes": CLASSES, "compile": False, **kwargs},
    )
