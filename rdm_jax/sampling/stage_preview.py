"""Samples of one stage alone during its training, to look at and to measure."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, UInt8

from rdm_jax.config import Config
from rdm_jax.data.classes import Classes
from rdm_jax.data.image_sets import ImageSet
from rdm_jax.diffusion.latents import Latents
from rdm_jax.diffusion.pixels import Pixels
from rdm_jax.interop import latent_space
from rdm_jax.render import pictures
from rdm_jax.runtime import sharding
from rdm_jax.runtime.console import log
from rdm_jax.sampling import guides
from rdm_jax.sampling.labels import labels_of
from rdm_jax.sampling.prompts import takes_text, uses_classes
from rdm_jax.sampling.stage_sampler import StageSampler, in_batches, stage_settings

GIVEN = ("label", "text", "text_length")  # of a batch, what images are conditioned on


class StagePreview:
    """Samples one stage with any parameters.

    A relay stage starts from the means of real images, with their classes, so that its samples do
    not depend on the stages before it. A stage that is conditioned on text gets the captions and
    classes of real images.

    Args:
      config: of the run.
      number: of the stage, from 1.
      real: images that a relay stage starts from, and whose captions a stage is given, held-out
        ones if possible; seed s has the s-th of them in a fixed random order.

    Attributes:
      about: JSON: everything that the images depend on except for parameters and seeds.
    """

    def __init__(self, config: Config, number: int, real: ImageSet):
        real = real if real.latents is None else real.latents
        latents = real.latent_spec
        self._config, self._stage, self._real = config, config.stage(number), real
        self._representation: Pixels | Latents = self._stage.representation
        if latents:
            self._representation = Latents(*latents.statistics)
        channels, classes = latent_space.channels(config), len(real.class_names)
        loaded = guides.load(self._stage, channels, Classes(real.class_names), real.text, latents)
        codec = latent_space.open_codec(config) if latents else None
        self._decoded = latent_space.decoder(codec, latents)
        self._sampler = StageSampler(
            self._stage,
            self._stage.build(channels, classes),
            number=number,
            channels=channels,
            classes=classes,
            run_seed=config.seed,
            guides=loaded,
            representation=self._representation,
        )
        conditioned = uses_classes(self._stage.condition_for(classes))
        self._classes = Classes(real.class_names) if conditioned else Classes()
        self._has_text = takes_text(self._stage)
        self._order = np.random.default_rng(0).permutation(len(real))
        self._mesh = sharding.local_mesh()
        self.about = {"seed": config.seed, "stage": stage_settings(config, number)}
        if loaded:
            self.about["guides"] = [guide.checkpoint for guide in loaded]
        if number == 1 and not self._has_text:
            self.about["labels"] = config.sampling.labels
        else:
            self.about["begins with"] = real.fingerprint
        log.info("stage%d: samples during training, NFE %d per image", number, self._stage.nfe)

    def sample(
        self, params: Any, seeds: Int[np.ndarray, " n"]
    ) -> tuple[UInt8[np.ndarray, "n h w c"], Int[np.ndarray, " n"]]:
        """Images and classes of any number of seeds, in their order.

        An image with values that are not finite is black.
        """
        shape = (0, *latent_space.image_shape(self._config, self._stage.number))
        made = [(np.zeros(shape, np.uint8), np.zeros(0, np.int32))]
        for batch in in_batches(seeds, self._config.sampling.batch_size):
            made.append(self._batch(params, batch))
        images, labels = zip(*made, strict=True)
        return np.concatenate(images), np.concatenate(labels)

    def captions(self, seeds: Int[np.ndarray, " n"]) -> list[str] | None:
        """The captions of the images of seeds; None if the stage is not conditioned on text."""
        return self._real.caption(self._of(seeds)) if self._has_text else None

    def _of(self, seeds: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """The number of the real image that each seed has."""
        return self._order[seeds % len(self._order)]

    def _batch(
        self, params: Any, seeds: Int[np.ndarray, " b"]
    ) -> tuple[UInt8[np.ndarray, "b h w c"], Int[np.ndarray, " b"]]:
        padded = np.resize(seeds, self._config.sampling.batch_size)
        low = None
        if self._stage.number == 1 and not self._has_text:
            given = {
                "label": labels_of(
                    padded, self._config.sampling.labels, self._classes, run_seed=self._config.seed
                )
            }
        else:
            batch = self._real.batch(self._of(padded), text=self._has_text)
            given = {name: batch[name] for name in GIVEN if name in batch}
        if self._stage.number > 1:
            before = self._config.stage(self._stage.number - 1)
            pool = self._real.image_shape[0] // before.resolution[0]
            means = self._representation.encode(jnp.asarray(batch["image"]), pool)
            low = sharding.put_batch(np.asarray(means), self._mesh)
        device_seeds, on_devices = sharding.put_batch((padded.astype(np.uint32), given), self._mesh)
        x, finite = self._sampler(params, low, on_devices, device_seeds)
        decoded = np.asarray(self._decoded(x))
        images = np.where(np.asarray(finite)[:, None, None, None], decoded, decoded.dtype.type(0))
        return images[: len(seeds)], given["label"][: len(seeds)]

    def preview(self, params: Any, path: Path) -> None:
        """Draws the samples of one batch."""
        seeds = np.arange(self._config.sampling.batch_size)
        images, _ = self.sample(params, seeds)
        grid = pictures.plain_grid(images, columns=10, captions=self.captions(seeds))
        pictures.save_picture(grid, path)
