"""Generated images as streams: made while they are measured, or read if they are saved."""

import dataclasses
import functools
import hashlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from rdm_jax.config import Config
from rdm_jax.config.validate_evaluation import evaluated_seeds
from rdm_jax.data.classes import Classes
from rdm_jax.evaluation.image_streams import Batch, ImageStream, labels_by_name
from rdm_jax.evaluation.references import NATIVE
from rdm_jax.interop import latent_space
from rdm_jax.runtime.console import log
from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.ranges import parse_numbers, repetition
from rdm_jax.sampling.made_with import describe
from rdm_jax.sampling.pipeline import RelayPipeline
from rdm_jax.sampling.saved_samples import SavedSamples, find_saved
from rdm_jax.sampling.stage_preview import StagePreview

SAMPLES = "samples"  # the set of the last stage's images


class RelayStream(ImageStream):
    """The final images of a pipeline ('samples') and those of its earlier stages.

    The earlier ones are enlarged to the final size ('stage1', ...) or as they are
    ('stage1@native', ...). Samples that are saved with the same settings and checkpoints are used;
    otherwise every batch is generated when it is read. The images are the same either way.

    Args:
      relay: the pipeline.
      names: of the sets.
      classes: whose indices the labels are.
      saved: the folder of samples; None to generate all images.

    Raises:
      InputError: a set is of a stage that does not run, as sampling starts from given images.
    """

    def __init__(
        self,
        relay: RelayPipeline,
        names: tuple[str, ...],
        classes: Classes,
        saved: Path | None = None,
    ):
        config, seeds = relay.config, evaluated_seeds(relay.config)
        known = [SAMPLES, *relay.earlier, *(f"{name}{NATIVE}" for name in relay.earlier)]
        if missing := set(names) - set(known):
            raise InputError(
                f"config.evaluation.images has {missing.pop()!r}, and "
                f"config.sampling.low={config.sampling.low!r} replaces that stage",
                f"Use {' or '.join(known)}.",
            )
        self.names, self.batch_size = names, config.sampling.batch_size
        field = "config.evaluation.seeds" if config.evaluation.seeds else "config.sampling.seeds"
        self._relay, self._seeds = relay, np.asarray(parse_numbers(seeds, field), np.int64)
        self.count = len(self._seeds)
        self._labels = labels_by_name(SAMPLES, relay.classes, classes)
        if repeated := repetition(seeds, field):
            log.info("evaluation: %s", repeated)
        sampling = dataclasses.replace(config.sampling, seeds=seeds)
        self.about = {
            "set": ", ".join(names),
            **describe(dataclasses.replace(config, sampling=sampling), relay),
        }
        if relay.text:
            prompts = relay.prompts(self._seeds)
            unseen = sum(relay.are_held_out(prompts))
            self.notes = (f"{unseen} of {len(prompts)} images have held-out prompts",)
        self._saved_in = saved

    def captions(self, indices: Int[np.ndarray, " n"]) -> list[str] | None:  # noqa: D102
        return self._relay.prompts(self._seeds[indices]) if self._relay.text else None

    def texts_below(self, indices: Int[np.ndarray, " n"]) -> list[str] | None:  # noqa: D102
        return self._relay.captions_below(self._seeds[indices])

    def begin(self) -> None:  # noqa: D102
        _ = self._saved

    def batch(self, first: int, count: int) -> Batch:  # noqa: D102
        seeds = self._seeds[first : first + count]
        if self._saved:
            made = self._saved.read(seeds)
        else:
            names = (*self._relay.earlier, "images")
            made = dict(zip(names, self._relay.sample(seeds), strict=True))
        config = self._relay.config
        height = latent_space.image_shape(config, len(config.stages))[0]
        sets = {}
        for name in self.names:
            images = made[_array_name(name)]
            sets[name] = images if name.endswith(NATIVE) else enlarged(images, height)
        return sets, self._labels[self._relay.labels(seeds)]

    @functools.cached_property
    def _saved(self) -> SavedSamples | None:
        """Saved samples to use; all processes look for them together."""
        if not self._saved_in:
            return None
        arrays = sorted({_array_name(name) for name in self.names})
        saved = find_saved(self._relay, self._saved_in, self._seeds, arrays)
        if saved:
            log.info("evaluation: reusing the samples in %s", self._saved_in)
        return saved


def _array_name(name: str) -> str:
    """The array of a samples.npz that has the images of a set."""
    return "images" if name == SAMPLES else name.removesuffix(NATIVE)


class StageStream(ImageStream):
    """The images that one stage generates with given parameters.

    They are enlarged to the last stage's size, or as they are ('stage1@native') if the config has a
    reference of the stage's own size.

    Args:
      config: of the run.
      number: of the stage, from 1.
      alone: samples the stage.
      params: of the stage.
      images_seen: in training so far.
    """

    def __init__(
        self, config: Config, number: int, alone: StagePreview, params: Any, images_seen: int
    ):
        native = bool(config.evaluation.native_reference) and number < len(config.stages)
        name = f"stage{number}{NATIVE if native else ''}"
        seeds = config.evaluation.seeds_in_training
        self.names, self.batch_size = (name,), config.sampling.batch_size
        self._alone, self._params = alone, params
        shown = number if native else len(config.stages)
        self._height = latent_space.image_shape(config, shown)[0]
        self._seeds = np.asarray(
            parse_numbers(seeds, "config.evaluation.seeds_in_training"), np.int64
        )
        self.count = len(self._seeds)
        # A few sums distinguish the parameters of one training from another's.
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

    def captions(self, indices: Int[np.ndarray, " n"]) -> list[str] | None:  # noqa: D102
        return self._alone.captions(self._seeds[indices])


def enlarged(images: np.ndarray, height: int) -> np.ndarray:
    """Images (b, h, w, c) enlarged to `height` by repeating every pixel."""
    factor = height // images.shape[1]
    return images.repeat(factor, 1).repeat(factor, 2)
