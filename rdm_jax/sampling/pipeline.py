"""The relay itself: the stages run one after the other."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, UInt8

from rdm_jax.checkpoints import folders, store
from rdm_jax.config import Config, to_dict, validate
from rdm_jax.data.classes import Classes, matched, of_checkpoint
from rdm_jax.data.postprocess import postprocess
from rdm_jax.diffusion.pixels import Pixels
from rdm_jax.runtime import sharding
from rdm_jax.runtime.errors import InputError
from rdm_jax.sampling.labels import labels_of
from rdm_jax.sampling.low_images import LowImages
from rdm_jax.sampling.stage_sampler import StageSampler, in_batches


class Begun(NamedTuple):
    """Images that the devices may still be computing.

    Attributes:
      stages: of each stage the images of each batch, uint8 (b, h, w, c).
      finite: of each batch bool (b,), whether an image is made of finite numbers.
      count: of the images that were asked for; the rest fill up the last batch.
    """

    stages: list[list[UInt8[Array, "b h w c"]]]
    finite: list[Bool[Array, " b"]]
    count: int


class RelayPipeline:
    """The stages that are run, with their averaged parameters, ready to sample. No data is needed
    for it.

    Args:
      config: of the run; each stage's `checkpoint` says what to load.
      workdir: of the run.

    Attributes:
      low: the small images that it goes on from; None if it begins with stage 1.
      first: number of the first stage that is run.
      earlier: names of the stages before the last one whose images it makes or is given: 'stage1',
        ...
      classes: that the networks know, as their checkpoints say.
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
        self.classes = _common_classes(config, known, self.first)
        validate.check_classes(config, self.classes.names)

    def _load(self, number: int, workdir: Path) -> Classes:
        """Reads a stage's checkpoint and returns the classes that it knows."""
        stage, channels = self.config.stage(number), self.config.data.channels
        folder, step = folders.find(stage.checkpoint, workdir / f"stage{number}" / "checkpoints")
        checkpoints = store.Checkpoints(folder, read_only=True)
        about = checkpoints.about(step)
        _check_same_stage(self.config, number, folder / str(step), about)
        _check_guidance(self.config, number, folder / str(step), about)
        network, classes = stage.build(channels, len(about["classes"])), len(about["classes"])
        # All processes read together; then each has its own.
        abstract = store.with_sharding(network.abstract, sharding.replicated(sharding.make_mesh()))
        params = sharding.on_this_process(checkpoints.restore_ema(step, abstract)[0], self.mesh)
        checkpoints.close()
        sampler = StageSampler(
            stage,
            network,
            number=number,
            channels=channels,
            classes=classes,
            run_seed=self.config.seed,
        )
        self._stages.append((sampler, params))
        loaded = {
            "step": step,
            **{k: about[k] for k in ("validation_loss", "imported", "started_from") if k in about},
        }
        self.checkpoints.append(
            loaded | ({"folder": str(folder.resolve())} if "/" in stage.checkpoint else {})
        )
        return of_checkpoint(about)

    def labels(self, seeds: Int[np.ndarray, " b"]) -> Int[np.ndarray, " b"]:
        """The classes of seeds: those of the small images, or by the rule of `sampling.labels`; -1
        where there are none."""
        rule = self.config.sampling.labels
        given = (
            self.low.labels(seeds, self.classes)
            if self.low and len(self.classes) and rule == "balanced"
            else None
        )
        return (
            labels_of(seeds, rule, self.classes, run_seed=self.config.seed)
            if given is None
            else given
        )

    def sample(self, seeds: Int[np.ndarray, " n"]) -> list[np.ndarray]:
        """The images of the `earlier` stages and the last one's, uint8 (n, h, w, c), for any number
        of seeds, in their order.

        They are made a batch of `sampling.batch_size` at a time; a short one is filled up, so that
        nothing is compiled again. Raises InputError where they are not finite numbers.
        """
        made, begun = [], self.begin(seeds[:0])
        for batch in in_batches(seeds, self.config.sampling.batch_size):
            following = self.begin(batch)  # before the images of the one before are waited for
            made.append(self.finish(begun))
            begun = following
        return [np.concatenate(stage) for stage in zip(*made, self.finish(begun), strict=True)]

    def begin(self, seeds: Int[np.ndarray, " n"]) -> Begun:
        """Sets the devices to work, and does not wait: what is begun next follows without a gap.

        Of more seeds than a batch all batches are begun, and their images stay on the devices until
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
        if self.low:
            stages.append(sharding.put_batch(self.low.images(padded), self.mesh))
            low = _encoded(stages[0])
        for sampler, params in self._stages:
            low, fine = sampler(params, low, labels, device_seeds)
            stages, finite = [*stages, _decoded(low)], finite & fine
        for array in (*stages, finite):
            array.copy_to_host_async()
        return stages, finite

    def finish(self, begun: Begun) -> list[np.ndarray]:
        """Waits for the images, and returns them as `sample` does."""
        if not all(
            np.all(finite) for finite in begun.finite
        ):  # as bytes they would look like images
            raise InputError(
                "a checkpoint makes images that are not finite numbers; an earlier checkpoint would do."
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
    """The classes that all stages know. Where one knows them by number alone, another stage's names
    are theirs too."""
    common = next((classes for classes in known if not classes.by_number), known[0])
    for number, classes in enumerate(known, first):
        if matched(classes, common) != tuple(
            range(len(common))
        ):  # the stages are given the same numbers
            field = f"config.stage{number}.checkpoint={config.stage(number).checkpoint!r}"
            would_do = "checkpoints of the same classes in the same order would do."
            raise InputError(
                f"{field} knows the classes {classes}, other stages {common}; {would_do}"
            )
    return common


def _check_guidance(config: Config, number: int, path: Path, about: dict[str, Any]) -> None:
    """Refuses guidance of a network that has never seen a hidden label. Of imported weights nobody
    knows."""
    guidance, hidden = (
        config.stage(number).guidance,
        about["stage"]["training"]["label_dropout"],
    )
    if guidance != 1 and not hidden and "imported" not in about:
        why = f"checkpoint {path} was trained with training.label_dropout={hidden}, so that it knows no images without a label"
        raise InputError(
            f"config.stage{number}.guidance={guidance} cannot be used: {why}; 1.0 would do."
        )


def _check_same_stage(config: Config, number: int, path: Path, about: dict[str, Any]) -> None:
    """Refuses a checkpoint that was trained to compute something else, though its arrays may have
    the right shapes."""
    ours = to_dict(config)[f"stage{number}"]
    for part in ("network", "precondition", "process"):
        for field in sorted(ours[part].keys() | about["stage"][part].keys()):
            was, now = about["stage"][part].get(field), ours[part].get(field)
            if was != now and field not in ("dropout", "dtype", "remat"):
                name = f"config.stage{number}.{part}.{field}"
                raise InputError(
                    f"{name}={now!r}, but checkpoint {path} is of another network ({was!r}); {was!r} would do."
                )
