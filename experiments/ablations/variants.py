"""The variants of each group, as changes of a config."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax.numpy as jnp

from experiments import common
from rdm_jax.config import Config

Change = Callable[[Config], Config]


class Variant(NamedTuple):
    """A config that differs from the base in one setting.

    Attributes:
      name: of its folder.
      setting: for the table.
      change: makes the variant from the base.
      stage: the stage to train again, from 1; 0 for none.
    """

    name: str
    setting: str
    change: Change
    stage: int = 2


def unguided(config: Config, nfe: int) -> Config:
    """The base of all variants: the config without guidance, and with this NFE of stage 2."""
    return common.with_nfe(guidance(1.0, 1.0)(config), 2, nfe)


def process(**fields) -> Change:
    """Another process of stage 2."""
    return lambda config: config.with_stage(
        2, process=dataclasses.replace(config.stages[1].process, **fields)
    )


def clock(**fields) -> Change:
    """Another clock of stage 2's process."""
    return lambda config: process(
        clock=dataclasses.replace(config.stages[1].process.clock, **fields)
    )(config)


def length(value: float) -> Change:
    """Another length of the clock; the relay joins at its end, where training ends too."""

    def change(config: Config) -> Config:
        config = clock(length=value)(config)
        end = float(config.stages[1].process.clock.sigma(jnp.ones(())))
        changed = sampler(truncation_sigma=end)(config)
        return common.with_nfe(changed, 2, config.stages[1].nfe)

    return change


def sampler(**fields) -> Change:
    """Another sampler of stage 2."""
    return lambda config: config.with_stage(2, sampler=fields)


def with_nfe(nfe: int, change: Change) -> Change:
    """A change, and another NFE of stage 2."""
    return lambda config: common.with_nfe(change(config), 2, nfe)


def guidance(first: float, second: float) -> Change:
    """Other weights of guidance."""
    return lambda config: config.with_stage(1, guidance=first).with_stage(2, guidance=second)


def label_dropout(rate: float, weight: float) -> Change:
    """Another rate of label dropout in stage 1, which is guided."""
    return lambda config: config.with_stage(1, training={"label_dropout": rate}, guidance=weight)


def order(number: int) -> Change:
    """Heun's method (2) or Euler's (1), with the same NFE."""

    def change(config: Config) -> Config:
        return common.with_nfe(sampler(order=number)(config), 2, config.stages[1].nfe)

    return change


def block_noise() -> Iterator[Variant]:
    """Strengths with and without the paper's normaliser, and sizes of the block."""
    yield Variant("block_0", "a = 0", process(block_scale=0.0))
    for scale in (0.15, 0.3, 0.5):
        yield Variant(f"block_{scale:g}", f"a = {scale:g}", process(block_scale=scale))
        yield Variant(
            f"block_{scale:g}_n",
            f"a = {scale:g}, normalized",
            process(block_scale=scale, normalize_noise=True),
        )
    for size in (2, 8):
        yield Variant(
            f"block_0.5_{size}", f"a = 0.5, s = {size}", process(block_scale=0.5, block_size=size)
        )


def freshened() -> Iterator[Variant]:
    """Shares of fresh noise, with the usual NFE and with one of negligible discretisation."""
    for eta in (0.0, 0.05, 0.1, 0.2, 0.3):
        yield Variant(f"eta_{eta:g}", f"eta = {eta:g}", sampler(eta=eta), 0)
    for eta in (0.0, 0.3):
        change = with_nfe(199, sampler(eta=eta))
        yield Variant(f"eta_{eta:g}_199", f"NFE 199, eta = {eta:g}", change, 0)


def corrected() -> Iterator[Variant]:
    """What Heun's method averages, and how the first step treats the enlarged image, by NFE."""
    for nfe, corrector, exact in itertools.product((5, 9, 19), ("slopes", "images"), (False, True)):
        setting = f"NFE {nfe}, {corrector}, {'exact' if exact else 'published'} start"
        change = with_nfe(nfe, sampler(corrector=corrector, exact_start=exact))
        yield Variant(f"{corrector}_{exact}_{nfe}", setting, change, 0)


GROUPS = {
    "block noise": (*block_noise(),),
    "blur": (
        *(
            Variant(f"blur_{b:g}", f"at most {b:g} pixels", clock(blur_sigma_max=b))
            for b in (1.0, 2.0, 3.0, 6.0)
        ),
    ),
    "clock": (
        *(Variant(f"clock_{n:g}", f"L = {n:g}", length(n)) for n in (0.85, 0.89, 0.93, 0.97)),
    ),
    "eta": (*freshened(),),
    "noise schedule": (
        *(
            Variant(f"steps_{n}", f"NFE {c}, N = {n}", sampler(steps=n), 0)
            for n, c in ((6, 5), (7, 5), (9, 7), (10, 7))
        ),
    ),
    "order": (Variant("heun", "Heun", order(2), 0), Variant("euler", "Euler", order(1), 0)),
    "corrector and start": (*corrected(),),
    "guidance": (
        *(
            Variant(
                f"guidance_{first:g}_{second:g}",
                f"{first:g} in stage 1, {second:g} in stage 2",
                guidance(first, second),
                0,
            )
            for first in (1.0, 1.5, 2.0, 3.0)
            for second in (1.0, 2.0)
        ),
    ),
    "label dropout": (
        *(
            Variant(f"dropout_{d:g}", f"{d:g} in stage 1, guided by 1.5", label_dropout(d, 1.5), 1)
            for d in (0.05, 0.1, 0.3)
        ),
    ),
}
# Groups that run with several seeds: some of their settings are too close for one, and only the
# base has to be trained.
SEVERAL = ("noise schedule", "corrector and start")
