"""Previews and evaluations of a stage while it is trained."""

import functools
from pathlib import Path
from typing import Any

import jax

from rdm_jax.config import Config
from rdm_jax.data.image_sets import ImageSet
from rdm_jax.evaluation.evaluator import Evaluator
from rdm_jax.runtime.console import log
from rdm_jax.runtime.errors import InputError
from rdm_jax.sampling.stage_preview import StagePreview


class StageProbe:
    """Samples one stage's EMA parameters, to draw them and to measure them.

    Args:
      config: of the run.
      number: of the stage, from 1.
      images: real images, which a later stage's samples start from.
      evaluator: what measures samples; None for previews only.

    Attributes:
      evaluates: whether there is an evaluator.
    """

    def __init__(
        self, config: Config, number: int, images: ImageSet, evaluator: Evaluator | None = None
    ):
        self._config = config
        self._number = number
        self._images = images
        self._evaluator = evaluator
        self.evaluates = evaluator is not None
        stage = config.stage(number)
        samples = stage.training.preview_every or self.evaluates
        if samples and any(entry.guide for entry in stage.guidance):
            # All processes load guides together; previews are process 0's alone.
            _ = self._sampler

    @functools.cached_property
    def _sampler(self) -> StagePreview:
        return StagePreview(self._config, self._number, self._images)

    def preview(self, params: Any, path: Path) -> None:
        """Draws the samples of one batch."""
        self._sampler.preview(params, path)

    def evaluate(self, params: Any, images_seen: int, folder: Path) -> dict[str, float]:
        """Returns metrics of the stage's samples; {} after an error that must not stop training."""
        try:
            return self._evaluator.run_stage(
                self._number, self._sampler, params, images_seen, folder
            )
        except (InputError, OSError) as error:
            # An OSError concerns one process, and with several the others are waiting for it.
            if isinstance(error, OSError) and jax.process_count() > 1:
                raise
            log.info(
                "stage%d: not evaluated at %s images: %s", self._number, f"{images_seen:,}", error
            )
            return {}
