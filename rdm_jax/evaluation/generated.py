"""Images that are made while they are measured."""

import dataclasses
import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rdm_jax.config import Config
from rdm_jax.config.validate_evaluation import evaluated_seeds
from rdm_jax.data.classes import Classes
from rdm_jax.evaluation.image_streams import Batch, ImageStream, labels_by_name
from rdm_jax.evaluation.references import NATIVE
from rdm_jax.runtime.console import log
from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.ranges import parse_numbers, repetition
from rdm_jax.sampling.made_with import describe
from rdm_jax.sampling.pipeline import RelayPipeline
from rdm_jax.sampling.stage_preview import StagePreview


class RelayStream(ImageStream):
    """What a relay makes in the end ('samples'), and its earlier stages' images, enlarged to the
    same size ('stage1', ...) or as they are ('stage1@native', ...).

    Args:
      names: which of these.
      classes: by whose numbers labels count.

    Raises:
      InputError: one of a stage that is not run, as the relay goes on from given images.
    """

    def __init__(self, relay: RelayPipeline, names: tuple[str, ...], classes: Classes):
        config, seeds = relay.config, evaluated_seeds(relay.config)
        known = ["samples", *relay.earlier, *(f"{name}{NATIVE}" for name in relay.earlier)]
        if missing := set(names) - set(known):
            low = f"config.sampling.low={config.sampling.low!r}"
            raise InputError(
                f"config.evaluation.images has {missing.pop()!r}, and {low}; {' or '.join(known)} would do."
            )
        self.names, self.batch_size = names, config.sampling.batch_size
        field = "config.evaluation.seeds" if config.evaluation.seeds else "config.sampling.seeds"
        self._relay, self._seeds = relay, np.asarray(parse_numbers(seeds, field), np.int64)
        self.count, self._labels = (
            len(self._seeds),
            labels_by_name("samples", relay.classes, classes),
        )
        if said := repetition(seeds, field):
            log.info("evaluation: %s", said)
        sampling = dataclasses.replace(config.sampling, seeds=seeds)
        self.about = {
            "set": ", ".join(names),
            **describe(dataclasses.replace(config, sampling=sampling), relay),
        }

    def batch(self, first: int, count: int) -> Batch:  # noqa: D102
        seeds = self._seeds[first : first + count]
        made = dict(zip((*self._relay.earlier, "samples"), self._relay.sample(seeds), strict=True))
        height = made["samples"].shape[1]
        sets = {}
        for name in self.names:
            images = made[name.removesuffix(NATIVE)]
            sets[name] = images if name.endswith(NATIVE) else enlarged(images, height)
        return sets, self._labels[self._relay.labels(seeds)]


class StageStream(ImageStream):
    """What one stage makes with the given parameters: enlarged to the last stage's size, or where
    the config has a reference of the stage's own size, as it is ('stage1@native').

    Args:
      images_seen: in training so far.
    """

    def __init__(
        self, config: Config, number: int, alone: StagePreview, params: Any, images_seen: int
    ):
        native = bool(config.evaluation.native_reference) and number < len(config.stages)
        name, seeds = (
            f"stage{number}{NATIVE if native else ''}",
            config.evaluation.seeds_in_training,
        )
        self.names, self.batch_size = (name,), config.sampling.batch_size
        self._alone, self._params = alone, params
        self._height = config.stages[number - 1 if native else -1].resolution[0]
        self._seeds = np.asarray(
            parse_numbers(seeds, "config.evaluation.seeds_in_training"), np.int64
        )
        self.count = len(self._seeds)
        # So that nothing is taken for the same that is not: a few sums tell one training's
        # parameters from another's.
        sums = jax.device_get(jax.tree.map(lambda x: (x.sum(), jnp.abs(x).sum()), params))
        parameters = hashlib.sha256(repr(jax.tree.leaves(sums)).encode()).hexdigest()
        self.about = {
            "set": name,
            "images_seen": images_seen,
            "parameters": parameters,
            "seeds": seeds,
            **alone.about,
        }

    def batch(self, first: int, count: int) -> Batch:  # noqa: D102
        images, labels = self._alone.sample(self._params, self._seeds[first : first + count])
        return {self.names[0]: enlarged(images, self._height)}, labels


def enlarged(images: np.ndarray, height: int) -> np.ndarray:
    """Every pixel repeated, to the height given."""
    factor = height // images.shape[1]
    return images.repeat(factor, 1).repeat(factor, 2)
