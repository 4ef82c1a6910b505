"""The relay pipeline: the stages of a run, sampled one after the other."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, UInt8

from rdm_jax.checkpoints import averages, folders, store
from rdm_jax.config import Config, validate
from rdm_jax.data.classes import Classes, of_checkpoint
from rdm_jax.data.latent_spec import LatentSpec
from rdm_jax.data.postprocess import postprocess
from rdm_jax.data.text_table import spec_of
from rdm_jax.diffusion.latents import Latents
from rdm_jax.diffusion.pixels import Pixels
from rdm_jax.interop import latent_space
from rdm_jax.runtime import sharding
from rdm_jax.runtime.errors import InputError
from rdm_jax.sampling import guides
from rdm_jax.sampling.checkpoint_checks import (
    check_guidance,
    check_latents,
    check_same_stage,
    common_classes,
    common_text,
)
from rdm_jax.sampling.conditions import Asked, Conditions, Seeds
from rdm_jax.sampling.labels import Labels
from rdm_jax.sampling.low_images import LowImages
from rdm_jax.sampling.stage_functions import StageFunctions, StageParams
from rdm_jax.sampling.stage_sampler import StageSampler
from rdm_jax.workdir import Workdir

# What a checkpoint says of where its parameters come from.
ORIGINS = ("validation_loss", "imported", "shared", "started_from")


class Begun(NamedTuple):
    """Images that the devices may still be computing.

    Attributes:
      stages: for each stage the images of each batch, uint8 (b, h, w, c).
      finite: for each batch bool (b,), whether all values of an image are finite.
      count: number of requested images; the rest pads the last batch.
    """

    stages: list[list[UInt8[Array, "b h w c"]]]
    finite: list[Bool[Array, " b"]]
    count: int


class RelayPipeline(Conditions):
    """The stages to run with their parameters, ready to sample. It needs no data.

    Args:
      config: of the run; each stage's `checkpoint` and `average` select what is loaded.
      workdir: of the run.
      first: number of the first stage to load, unless `sampling.low` replaces it and more: images
        of the stage before are then an argument of `sample`.

    Attributes:
      low: the small images to continue from; None if sampling begins with stage 1.
      first: number of the first stage that runs.
      earlier: names of the stages before the last whose images are sampled or given: 'stage1', ...
      classes: the classes that the networks know, from their checkpoints; none if no image depends
        on them.
      checkpoints: what was loaded, as JSON.
      text: how the captions that the networks know are embedded; None if no stage is conditioned
        on text.
      captions: of the run; None if its workdir has none.
      latents: that the stages work on; None for pixels.

    Raises:
      InputError: a checkpoint is missing, damaged or of another network, the small images cannot be
        used, there are prompts for networks that know no text or without the classes that belong to
        them, or the encoder of text or the autoencoder is another one.
    """

    def __init__(self, config: Config, workdir: Path, *, first: int = 1):
        self.config, self.mesh = config, sharding.local_mesh()
        self.low = LowImages(config) if config.sampling.low else None
        self.first = self.low.stage + 1 if self.low else first
        self.earlier = tuple(
            f"stage{number}" for number in range(max(self.first - 1, 1), len(config.stages))
        )
        latent_space.check(config)
        self.latents: LatentSpec | None = None
        codec = latent_space.open_codec(config)
        self.checkpoints, self._stages = [], []
        abouts = [
            self._load(number, workdir, codec and codec.digest)
            for number in range(self.first, len(config.stages) + 1)
        ]
        self._decoded = latent_space.decoder(codec, self.latents)
        common = common_classes(config, [of_checkpoint(about) for about in abouts], self.first)
        labelled = self.low or any(
            guides.depends_on_classes(stage, len(common))
            for stage in config.stages[self.first - 1 :]
        )
        self.classes = common if labelled else Classes()
        validate.check_classes(config, self.classes.names)
        if text := common_text(config, abouts, self.first):
            self._open_text(text, Workdir(workdir).captions)

    def _load(self, number: int, workdir: Path, autoencoder: str | None) -> dict[str, Any]:
        """Loads a stage's checkpoint and returns what it says about itself."""
        stage, channels = self.config.stage(number), latent_space.channels(self.config)
        folder, step = folders.find(
            stage.checkpoint,
            Workdir(workdir).checkpoints(number),
            f"config.stage{number}.checkpoint",
        )
        chosen = averages.choose(stage, folder, step)
        about, path = chosen.about, folder / str(step)
        self.latents = check_latents(number, path, about, autoencoder, self.latents)
        check_same_stage(self.config, number, path, about)
        check_guidance(self.config, number, path, about)
        classes = len(about["classes"])
        network = stage.build(channels, classes)
        # All processes restore together, replicated over all devices; then each takes its own copy.
        abstract = store.with_sharding(network.abstract, sharding.replicated(sharding.make_mesh()))
        params = sharding.on_this_process(chosen.read(abstract), self.mesh)
        loaded_guides = guides.load(
            stage, channels, of_checkpoint(about), spec_of(about), self.latents
        )
        sampler = StageSampler(
            stage,
            network,
            number=number,
            channels=channels,
            classes=classes,
            run_seed=self.config.seed,
            guides=loaded_guides,
            representation=Latents(*self.latents.statistics) if self.latents else Pixels(),
        )
        self._stages.append((sampler, params))
        loaded = {
            "step": step,
            **{k: about[k] for k in ORIGINS if k in about},
        }
        if chosen.snapshots:
            loaded["snapshots"] = chosen.snapshots
        if "/" in stage.checkpoint:  # of another run
            loaded["folder"] = str(folders.absolute(folder))
        if loaded_guides:
            loaded["guides"] = [guide.checkpoint for guide in loaded_guides]
        self.checkpoints.append(loaded)
        return about

    def sample(
        self,
        seeds: Seeds,
        *,
        labels: Labels | None = None,
        prompts: str | Sequence[str] | None = None,
        small: np.ndarray | Array | None = None,
        progress: Callable[[int], Any] | None = None,
    ) -> list[np.ndarray]:
        """Samples any number of seeds, in their order.

        Batches have `sampling.batch_size` images; a short one is padded, so that nothing is
        compiled again. Of labels, prompts and small images one is for all seeds, and several are
        taken in turn, in the order of the seeds.

        Args:
          seeds: (n,), 0 to 2^32 - 1.
          labels: classes, by their indices or names; None for those that the seeds have (`labels`).
          prompts: None for those that the seeds have (`prompts`).
          small: images of an earlier stage's resolution to continue from, in place of that stage
            and those before: uint8, or float in [-1, 1], (h, w, c) or (m, h, w, c). If images
            depend on classes, they need `labels`.
          progress: called with the number of images that are finished since the last call, as
            `tqdm.update` takes it.

        Returns:
          The images of the `earlier` stages and of the last one, each uint8 (n, h, w, c). With
          `small` the first of them are these.

        Raises:
          InputError: an argument cannot be used, a prompt cannot be encoded or has no class, or an
            image has values that are not finite.
        """
        asked = self._asked(seeds, labels, prompts, small)
        made, begun = [], self._begin(asked.rows(np.arange(0)))
        for batch in asked.batches(self.config.sampling.batch_size):
            following = self._begin(batch)  # before waiting for the previous batch
            made.append(self.finish(begun))
            if progress and begun.count:
                progress(begun.count)
            begun = following
        made.append(self.finish(begun))
        if progress and begun.count:
            progress(begun.count)
        return [np.concatenate(stage) for stage in zip(*made, strict=True)]

    def begin(self, seeds: Int[np.ndarray, " n"]) -> Begun:
        """Dispatches the computation without waiting, so that the devices stay busy.

        More seeds than a batch start several batches, whose images stay on the devices until
        `finish`.
        """
        return self._begin(self._asked(seeds))

    def _begin(self, asked: Asked) -> Begun:
        if asked.stage + 1 < self.first:
            height, width = self.config.stage(self.first - 1).resolution
            raise InputError(
                f"stage {self.first - 1} is not loaded, and stage {self.first} continues from it",
                f"Give small, images of {height} x {width}.",
            )
        batches = [
            self._begin_batch(batch) for batch in asked.batches(self.config.sampling.batch_size)
        ]
        count = len(self.config.stages) - max(asked.stage, 1) + 1
        stages = [[stages[number] for stages, _ in batches] for number in range(count)]
        return Begun(stages, [finite for _, finite in batches], len(asked.seeds))

    def _begin_batch(
        self, asked: Asked
    ) -> tuple[list[UInt8[Array, "b2 h w c"]], Bool[Array, " b2"]]:
        size = self.config.sampling.batch_size
        padded = asked.rows(np.resize(np.arange(len(asked.seeds)), size))
        given = (padded.seeds.astype(np.uint32), self._given(padded))
        device_seeds, given = sharding.put_batch(given, self.mesh)
        stages, low, finite = [], None, jnp.ones(size, bool)
        unfinished = False
        if asked.stage:
            images = padded.small
            if images is None:
                images = self.low.images(padded.seeds)
            low = sharding.put_batch(images, self.mesh)
            low = low if low.dtype == jnp.float32 else _encoded(low)
            stages.append(self._decoded(low))
        for number, (sampler, params) in enumerate(self._stages, self.first):
            if number <= asked.stage:
                continue
            made = sampler.sample(params, low, given, device_seeds, unfinished=unfinished)
            stages.append(self._decoded(made.images))
            low, unfinished, finite = made.handed_over, sampler.stops, finite & made.finite
        for array in (*stages, finite):
            array.copy_to_host_async()
        return stages, finite

    def stage(self, number: int) -> tuple[StageFunctions, StageParams]:
        """A stage as pure functions, and its parameters.

        Args:
          number: of the stage, from 1.

        Raises:
          InputError: the stage is not loaded.
        """
        last = self.first + len(self._stages) - 1
        if not self.first <= number <= last:
            raise InputError(f"stage {number} is not loaded", f"Use {self.first} to {last}.")
        sampler, params = self._stages[number - self.first]
        return sampler.functions, sampler.with_guides(params)

    def finish(self, begun: Begun) -> list[np.ndarray]:
        """Waits for the images and returns them as `sample` does."""
        # As uint8, values that are not finite would look like an image.
        if not all(np.all(finite) for finite in begun.finite):
            raise InputError(
                "a checkpoint makes images that are not finite numbers",
                "Use an earlier checkpoint.",
            )
        made = self.config.stages[-len(begun.stages) :]
        shapes = [latent_space.image_shape(self.config, stage.number) for stage in made]
        none = [np.zeros((0, *shape), np.uint8) for shape in shapes]
        images = [
            np.concatenate([empty, *stage])[: begun.count]
            for empty, stage in zip(none, begun.stages, strict=True)
        ]
        images[-1] = postprocess(images[-1], self.config.sampling.postprocess)
        return images


_encoded = jax.jit(Pixels().encode)
