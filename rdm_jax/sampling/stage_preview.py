"""One stage alone, during its training: samples to look at, and to measure."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, UInt8

from rdm_jax.config import Config
from rdm_jax.data.classes import Classes
from rdm_jax.data.image_sets import ImageSet
from rdm_jax.diffusion.pixels import from_uint8, to_uint8
from rdm_jax.render import pictures
from rdm_jax.runtime import sharding
from rdm_jax.runtime.console import log
from rdm_jax.sampling.labels import labels_of
from rdm_jax.sampling.stage_sampler import evaluations, in_batches, stage_sampler, stage_settings


class StagePreview:
    """Samples one stage with any parameters.

    A relay stage goes on from the means of real images (with their classes), so that what it makes
    does not depend on the stages before it.

    Args:
      config: of the run.
      number: of the stage, from 1.
      real: images for a relay stage to begin with, best such as it is not trained on; seed s begins
        with the s-th of them in a random order that is always the same.

    Attributes:
      about: JSON: all that the images depend on but for the parameters and the seeds.
    """

    def __init__(self, config: Config, number: int, real: ImageSet):
        stage, channels, classes = (
            config.stage(number),
            real.image_shape[-1],
            len(real.class_names),
        )
        kwargs = {
            "number": number,
            "channels": channels,
            "classes": classes,
            "run_seed": config.seed,
        }
        self._sampler = stage_sampler(stage, stage.build(channels, classes), **kwargs)
        self._config, self._number, self._real = config, number, real
        self._order, self._mesh = (
            np.random.default_rng(0).permutation(len(real)),
            sharding.local_mesh(),
        )
        self.about = {"seed": config.seed, "stage": stage_settings(config, number)}
        self.about |= (
            {"labels": config.sampling.labels} if number == 1 else {"begins with": real.fingerprint}
        )
        log.info(
            "stage%d: samples during training, %d network evaluations an image",
            number,
            evaluations(stage),
        )

    def sample(
        self, params: Any, seeds: Int[np.ndarray, " n"]
    ) -> tuple[UInt8[np.ndarray, "n h w c"], Int[np.ndarray, " n"]]:
        """Images and classes of any number of seeds, in their order; an image that is not finite is
        black."""
        shape = (0, *self._config.stages[self._number - 1].resolution, self._real.image_shape[-1])
        made = [(np.zeros(shape, np.uint8), np.zeros(0, np.int32))]
        made += [
            self._batch(params, batch)
            for batch in in_batches(seeds, self._config.sampling.batch_size)
        ]
        images, labels = zip(*made, strict=True)
        return np.concatenate(images), np.concatenate(labels)

    def _batch(
        self, params: Any, seeds: Int[np.ndarray, " b"]
    ) -> tuple[UInt8[np.ndarray, "b h w c"], Int[np.ndarray, " b"]]:
        padded, low = np.resize(seeds, self._config.sampling.batch_size), None
        rule, classes = self._config.sampling.labels, Classes(self._real.class_names)
        if self._number == 1:
            labels = labels_of(padded, rule, classes, run_seed=self._config.seed)
        else:
            batch = self._real.batch(self._order[padded % len(self._order)])
            labels, pool = (
                batch["label"],
                self._real.image_shape[0] // self._config.stages[self._number - 2].resolution[0],
            )
            low = sharding.put_batch(
                np.asarray(from_uint8(jnp.asarray(batch["image"]), pool)), self._mesh
            )
        device_seeds, device_labels = sharding.put_batch(
            (padded.astype(np.uint32), labels), self._mesh
        )
        images, finite = self._sampler(params, low, device_labels, device_seeds)
        images = np.where(
            np.asarray(finite)[:, None, None, None], np.asarray(to_uint8(images)), np.uint8(0)
        )
        return images[: len(seeds)], labels[: len(seeds)]

    def preview(self, params: Any, path: Path) -> None:
        """Draws the samples of one batch."""
        images, _ = self.sample(params, np.arange(self._config.sampling.batch_size))
        pictures.save_picture(pictures.plain_grid(images, columns=10), path)
