"""Everything that sampled images depend on, as JSON, and the comparison of two such records."""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from rdm_jax.config import Config, Sampling, to_dict
from rdm_jax.config.saved import completed, completed_settings
from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.ranges import as_ranges, parse_numbers, repetition
from rdm_jax.sampling.pipeline import RelayPipeline
from rdm_jax.sampling.stage_sampler import stage_settings

NOT_IN_IMAGES = ("name", "batch_size", "files")  # fields of Sampling that images do not depend on


def settings(config: Config, first: int) -> dict[str, Any]:
    """The part of the record that is known before a checkpoint is read.

    Args:
      config: of the run.
      first: number of the first stage that runs.
    """
    stages = {
        stage.name: stage_settings(config, stage.number) | {"average": stage.width or stage.average}
        for stage in config.stages[first - 1 :]
    }
    sampling = {k: v for k, v in to_dict(config)["sampling"].items() if k not in NOT_IN_IMAGES}
    sampling["seeds"] = one_spelling(sampling["seeds"])
    return {"seed": config.seed, "sampling": sampling, "stages": stages}


def describe(config: Config, relay: RelayPipeline) -> dict[str, Any]:
    """Everything that the images of the config's seeds depend on."""
    about = settings(config, relay.first) | {"checkpoints": relay.checkpoints}
    if relay.low:
        about["low_images"] = relay.low.digest(
            np.asarray(parse_numbers(config.sampling.seeds, "config.sampling.seeds"))
        )
    if relay.text:
        listed = relay.listed
        texts = json.dumps(listed if listed.classes else listed.texts).encode()
        about["prompts"] = {
            "count": len(listed.texts),
            "sha256": hashlib.sha256(texts).hexdigest(),
        }
    return json.loads(json.dumps(about))


def with_seeds(config: Config, seeds: Sequence[int]) -> Config:
    """The config with other seeds to sample."""
    return dataclasses.replace(
        config, sampling=dataclasses.replace(config.sampling, seeds=as_ranges(seeds))
    )


def one_spelling(seeds: str) -> str:
    """The canonical spelling of a list of seeds: '0-2' for '0, 1,2' and for '0-2,1'.

    Raises:
      InputError: it is not a list of seeds.
    """
    return as_ranges(parse_numbers(seeds, "config.sampling.seeds"))


def any_seeds(made_with: dict[str, Any]) -> dict[str, Any]:
    """The record without what depends on the choice of seeds."""
    return {**made_with, "sampling": {**made_with["sampling"], "seeds": ""}, "low_images": ""}


def same_settings(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether two records describe the same images; an earlier version may have written `old`."""
    return not differences(old, new)


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The differences between records, such as "sampling.labels was 'balanced' and is '3'"."""
    return _differences(as_written_now(old), new, "")


def as_written_now(old: dict[str, Any]) -> dict[str, Any]:
    """A record of an earlier version in today's form.

    Fields that the earlier version did not know get the values that mean what it did.

    Args:
      old: the record of samples, or of a set of images in an evaluation.
    """
    old = dict(old)
    if "sampling" in old:
        fields = completed(Sampling, old["sampling"])
        old["sampling"] = {
            name: value for name, value in fields.items() if name not in NOT_IN_IMAGES
        }
        seeds = fields.get("seeds")
        # What is not a list of seeds stays as it is, and equals no list.
        with contextlib.suppress(InputError, AttributeError):
            # Earlier versions kept the user's spelling, and measured an image as often as its seed
            # was named.
            old["sampling"]["seeds"] = seeds if repetition(seeds, "seeds") else one_spelling(seeds)
    if "stages" in old:
        old["stages"] = {
            name: {"average": "ema"} | completed_settings(stage)
            for name, stage in old["stages"].items()
        }
    if "stage" in old:  # an evaluation during training
        old["stage"] = completed_settings(old["stage"])
    return json.loads(json.dumps(old))


def _differences(old: Any, new: Any, field: str) -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            difference
            for key in sorted(old.keys() | new.keys())
            for difference in _differences(old.get(key), new.get(key), f"{field}.{key}")
        ]
    if field.endswith(".guidance") and old and new and len(old) == len(new):
        return [
            difference
            for i, (was, now) in enumerate(zip(old, new, strict=True))
            for difference in _differences(was, now, f"{field}[{i}]")
        ]
    return [] if old == new else [f"{field.removeprefix('.')} was {old!r:.60} and is {new!r:.60}"]
