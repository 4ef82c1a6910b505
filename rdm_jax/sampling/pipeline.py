"""The relay pipeline: the stages of a run, sampled one after the other."""

import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, UInt8

from rdm_jax.checkpoints import averages, folders, store
from rdm_jax.config import Config, to_dict, validate
from rdm_jax.config.load import load_config
from rdm_jax.data.classes import Classes, matched, of_checkpoint
from rdm_jax.data.postprocess import postprocess
from rdm_jax.diffusion import guidance
from rdm_jax.diffusion.pixels import Pixels
from rdm_jax.runtime import sharding
from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.files import local_path
from rdm_jax.sampling import guides
from rdm_jax.sampling.labels import labels_of
from rdm_jax.sampling.low_images import LowImages
from rdm_jax.sampling.stage_sampler import StageSampler, in_batches
from rdm_jax.workdir import Workdir


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


class RelayPipeline:
    """The stages to run with their parameters, ready to sample. It needs no data.

    Args:
      config: of the run; each stage's `checkpoint` and `average` select what is loaded.
      workdir: of the run.

    Attributes:
      low: the small images to continue from; None if sampling begins with stage 1.
      first: number of the first stage that runs.
      earlier: names of the stages before the last whose images are sampled or given: 'stage1', ...
      classes: the classes that the networks know, from their checkpoints; none if no stage is
        conditioned on them.
      checkpoints: what was loaded, as JSON.

    Raises:
      InputError: a checkpoint is missing, damaged or of another network, or the small images cannot
        be used.
    """

    def __init__(self, config: Config, workdir: Path):
        self.config, self.mesh = config, sharding.local_mesh()
        self.low = LowImages(config) if config.sampling.low else None
        self.first = self.low.stage + 1 if self.low else 1
        self.earlier = tuple(
            f"stage{n}" for n in range(self.low.stage if self.low else 1, len(config.stages))
        )
        self.checkpoints, self._stages = [], []
        known = [
            self._load(number, workdir) for number in range(self.first, len(config.stages) + 1)
        ]
        common = _common_classes(config, known, self.first)
        conditions = [stage.condition_for(len(common)) for stage in config.stages[self.first - 1 :]]
        labelled = self.low or any(condition.spec is not None for condition in conditions)
        self.classes = common if labelled else Classes()
        validate.check_classes(config, self.classes.names)

    def _load(self, number: int, workdir: Path) -> Classes:
        """Loads a stage's checkpoint and returns the classes that it knows."""
        stage, channels = self.config.stage(number), self.config.data.channels
        folder, step = folders.find(
            stage.checkpoint,
            Workdir(workdir).checkpoints(number),
            f"config.stage{number}.checkpoint",
        )
        chosen = averages.choose(stage, folder, step)
        about = chosen.about
        _check_same_stage(self.config, number, folder / str(step), about)
        _check_guidance(self.config, number, folder / str(step), about)
        classes = len(about["classes"])
        network = stage.build(channels, classes)
        # All processes restore together, replicated over all devices; then each takes its own copy.
        abstract = store.with_sharding(network.abstract, sharding.replicated(sharding.make_mesh()))
        params = sharding.on_this_process(chosen.read(abstract), self.mesh)
        loaded_guides = guides.load(stage, channels, of_checkpoint(about))
        sampler = StageSampler(
            stage,
            network,
            number=number,
            channels=channels,
            classes=classes,
            run_seed=self.config.seed,
            guides=loaded_guides,
        )
        self._stages.append((sampler, params))
        loaded = {
            "step": step,
            **{k: about[k] for k in ("validation_loss", "imported", "started_from") if k in about},
        }
        if chosen.snapshots:
            loaded["snapshots"] = chosen.snapshots
        if "/" in stage.checkpoint:  # of another run
            loaded["folder"] = str(folder.resolve())
        if loaded_guides:
            loaded["guides"] = [guide.checkpoint for guide in loaded_guides]
        self.checkpoints.append(loaded)
        return of_checkpoint(about)

    def labels(self, seeds: Int[np.ndarray, " b"]) -> Int[np.ndarray, " b"]:
        """The classes of seeds, int32 (b,); -1 without classes.

        They are those of the small images, or follow the rule of `sampling.labels`.
        """
        rule = self.config.sampling.labels
        if self.low and len(self.classes) and rule == "balanced":
            of_images = self.low.labels(seeds, self.classes)
            if of_images is not None:
                return of_images
        return labels_of(seeds, rule, self.classes, run_seed=self.config.seed)

    def sample(self, seeds: Int[np.ndarray, " n"]) -> list[np.ndarray]:
        """Samples any number of seeds, in their order.

        Batches have `sampling.batch_size` images; a short one is padded, so that nothing is
        compiled again.

        Args:
          seeds: (n,).

        Returns:
          The images of the `earlier` stages and of the last one, each uint8 (n, h, w, c).

        Raises:
          InputError: an image has values that are not finite.
        """
        made, begun = [], self.begin(seeds[:0])
        for batch in in_batches(seeds, self.config.sampling.batch_size):
            following = self.begin(batch)  # before waiting for the previous batch
            made.append(self.finish(begun))
            begun = following
        return [np.concatenate(stage) for stage in zip(*made, self.finish(begun), strict=True)]

    def begin(self, seeds: Int[np.ndarray, " n"]) -> Begun:
        """Dispatches the computation without waiting, so that the devices stay busy.

        More seeds than a batch start several batches, whose images stay on the devices until
        `finish`.
        """
        batches = [
            self._begin_batch(batch) for batch in in_batches(seeds, self.config.sampling.batch_size)
        ]
        stages = [
            [stages[number] for stages, _ in batches] for number in range(len(self.earlier) + 1)
        ]
        return Begun(stages, [finite for _, finite in batches], len(seeds))

    def _begin_batch(
        self, seeds: Int[np.ndarray, " b"]
    ) -> tuple[list[UInt8[Array, "b2 h w c"]], Bool[Array, " b2"]]:
        padded = np.resize(seeds, self.config.sampling.batch_size)
        device_seeds, labels = sharding.put_batch(
            (padded.astype(np.uint32), self.labels(padded)), self.mesh
        )
        stages, low, finite = [], None, jnp.ones(len(padded), bool)
        unfinished = False
        if self.low:
            stages.append(sharding.put_batch(self.low.images(padded), self.mesh))
            low = _encoded(stages[0])
        for sampler, params in self._stages:
            made = sampler.sample(params, low, labels, device_seeds, unfinished=unfinished)
            stages.append(_decoded(made.images))
            low, unfinished, finite = made.handed_over, sampler.stops, finite & made.finite
        for array in (*stages, finite):
            array.copy_to_host_async()
        return stages, finite

    def finish(self, begun: Begun) -> list[np.ndarray]:
        """Waits for the images and returns them as `sample` does."""
        # As uint8, values that are not finite would look like an image.
        if not all(np.all(finite) for finite in begun.finite):
            raise InputError(
                "a checkpoint makes images that are not finite numbers",
                "Use an earlier checkpoint.",
            )
        sizes = [stage.resolution for stage in self.config.stages[-len(begun.stages) :]]
        none = [np.zeros((0, *size, self.config.data.channels), np.uint8) for size in sizes]
        images = [
            np.concatenate([empty, *stage])[: begun.count]
            for empty, stage in zip(none, begun.stages, strict=True)
        ]
        images[-1] = postprocess(images[-1], self.config.sampling.postprocess)
        return images


_encoded = jax.jit(Pixels().encode)
_decoded = jax.jit(Pixels().decode)


def _common_classes(config: Config, known: list[Classes], first: int) -> Classes:
    """The classes that all stages know.

    A stage that knows them by number alone takes another stage's names. All stages get the same
    indices, so their classes must agree in number and order.
    """
    common = next((classes for classes in known if not classes.by_number), known[0])
    for number, classes in enumerate(known, first):
        if matched(classes, common) != tuple(range(len(common))):
            field = f"config.stage{number}.checkpoint={config.stage(number).checkpoint!r}"
            raise InputError(
                f"{field} knows the classes {classes}, other stages {common}",
                "Use checkpoints of the same classes in the same order.",
            )
    return common


def _check_guidance(config: Config, number: int, path: Path, about: dict[str, Any]) -> None:
    """Refuses guidance of a network that was never trained without labels.

    Nothing is known about imported weights, so these are accepted.
    """
    entries = config.stage(number).guidance
    dropout = about["stage"]["training"]["label_dropout"]
    needed = any(entry.needs_null for entry in entries)
    if needed and not dropout and "imported" not in about:
        raise InputError(
            f"config.stage{number}.guidance={guidance.shown(entries)} cannot be used: checkpoint "
            f"{path} was trained with training.label_dropout={dropout}, that is, never without "
            "labels",
            "Use 1.0.",
        )


def _check_same_stage(config: Config, number: int, path: Path, about: dict[str, Any]) -> None:
    """Refuses a checkpoint that computes something else, though its arrays may have the shapes."""
    ours = to_dict(config)[f"stage{number}"]
    for part in ("network", "precondition", "process", "condition"):
        fields = ours[part].keys() | about["stage"][part].keys()
        for field in sorted(fields, key=lambda field: (field != "kind", field)):
            was, now = about["stage"][part].get(field), ours[part].get(field)
            if was != now and field not in ("dropout", "dtype", "remat"):
                raise InputError(
                    f"config.stage{number}.{part}.{field}={now!r}, but checkpoint {path} is of "
                    f"another network ({was!r})",
                    f"Use {was!r}.",
                )


def load(workdir: str | os.PathLike, **overrides: Any) -> RelayPipeline:
    """The trained stages of a run.

    Args:
      workdir: of the run.
      overrides: other values of its config, as for `load_config`:
        `load("runs/digits", sampling={"labels": "3"}, stage1={"guidance": 1.5})`.

    Raises:
      InputError: there is no run, or as `load_config` and `RelayPipeline` do.
    """
    folder = local_path(workdir, "workdir")
    if not (folder / "config.json").is_file():
        raise InputError(
            f"workdir={os.fspath(workdir)!r} has no config.json", "Use the folder of a trained run."
        )
    return RelayPipeline(load_config(str(folder), **overrides), folder)
