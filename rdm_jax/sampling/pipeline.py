"""The relay pipeline: the stages of a run, sampled one after the other."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, UInt8

from rdm_jax.checkpoints import averages, folders, store
from rdm_jax.config import Config, validate
from rdm_jax.data.classes import Classes, of_checkpoint
from rdm_jax.data.postprocess import postprocess
from rdm_jax.data.text_table import TextSpec, spec_of
from rdm_jax.diffusion.pixels import Pixels
from rdm_jax.runtime import sharding
from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.ranges import parse_numbers
from rdm_jax.sampling import guides
from rdm_jax.sampling.checkpoint_checks import (
    check_guidance,
    check_same_stage,
    common_classes,
    common_text,
)
from rdm_jax.sampling.labels import labels_of
from rdm_jax.sampling.low_images import LowImages
from rdm_jax.sampling.prompts import (
    FIELD,
    KEPT,
    Listed,
    Prompts,
    choose,
    no_classes,
    no_text,
    parse_prompts,
)
from rdm_jax.sampling.run_captions import Captions, mark, read_captions
from rdm_jax.sampling.stage_sampler import StageSampler, in_batches
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


class RelayPipeline:
    """The stages to run with their parameters, ready to sample. It needs no data.

    Args:
      config: of the run; each stage's `checkpoint` and `average` select what is loaded.
      workdir: of the run.

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

    Raises:
      InputError: a checkpoint is missing, damaged or of another network, the small images cannot be
        used, there are prompts for networks that know no text or without the classes that belong to
        them, or the encoder of text is another one.
    """

    text: TextSpec | None = None
    captions: Captions | None = None
    _listed_are_encoded = False

    def __init__(self, config: Config, workdir: Path):
        self.config, self.mesh = config, sharding.local_mesh()
        self.low = LowImages(config) if config.sampling.low else None
        self.first = self.low.stage + 1 if self.low else 1
        self.earlier = tuple(
            f"stage{n}" for n in range(self.low.stage if self.low else 1, len(config.stages))
        )
        self.checkpoints, self._stages = [], []
        abouts = [
            self._load(number, workdir) for number in range(self.first, len(config.stages) + 1)
        ]
        common = common_classes(config, [of_checkpoint(about) for about in abouts], self.first)
        labelled = self.low or any(
            guides.depends_on_classes(stage, len(common))
            for stage in config.stages[self.first - 1 :]
        )
        self.classes = common if labelled else Classes()
        validate.check_classes(config, self.classes.names)
        self.text = common_text(config, abouts, self.first)
        if self.text:
            self._captions_file = Workdir(workdir).captions
            self.captions = read_captions(self._captions_file)
            self._prompts = Prompts(config, self.text)
            if config.sampling.prompts:  # refused now, not after hours
                self.labels(np.zeros(1, np.int64))
                self._encode_listed()

    def _encode_listed(self) -> None:
        """Encodes the prompts of the config's seeds, and frees the encoder's memory for sampling.

        Of more than `KEPT` prompts the rest is encoded batch by batch, and the encoder stays.
        """
        seeds = parse_numbers(self.config.sampling.seeds, "config.sampling.seeds")
        wanted = list(dict.fromkeys(self.prompts(np.asarray(seeds))))
        self._prompts.encode(wanted[:KEPT])
        if len(wanted) <= KEPT:
            self._prompts.release()
        self._listed_are_encoded = True

    def _load(self, number: int, workdir: Path) -> dict[str, Any]:
        """Loads a stage's checkpoint and returns what it says about itself."""
        stage, channels = self.config.stage(number), self.config.data.channels
        folder, step = folders.find(
            stage.checkpoint,
            Workdir(workdir).checkpoints(number),
            f"config.stage{number}.checkpoint",
        )
        chosen = averages.choose(stage, folder, step)
        about = chosen.about
        check_same_stage(self.config, number, folder / str(step), about)
        check_guidance(self.config, number, folder / str(step), about)
        classes = len(about["classes"])
        network = stage.build(channels, classes)
        # All processes restore together, replicated over all devices; then each takes its own copy.
        abstract = store.with_sharding(network.abstract, sharding.replicated(sharding.make_mesh()))
        params = sharding.on_this_process(chosen.read(abstract), self.mesh)
        loaded_guides = guides.load(stage, channels, of_checkpoint(about), spec_of(about))
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

    def labels(self, seeds: Int[np.ndarray, " b"]) -> Int[np.ndarray, " b"]:
        """The classes of seeds, int32 (b,); -1 without classes.

        They follow the rule of `sampling.labels`; if that is 'balanced', they are those of the
        small images or else of the captions, where these have classes.

        Raises:
          InputError: the classes of prompts are not known, or the networks do not know them.
        """
        rule = self.config.sampling.labels
        if self.low and len(self.classes) and rule == "balanced":
            of_images = self.low.labels(seeds, self.classes)
            if of_images is not None:
                return of_images
        if self._classes_of_captions:
            return self._listed_labels[seeds % len(self._listed_labels)]
        return labels_of(seeds, rule, self.classes, run_seed=self.config.seed)

    @functools.cached_property
    def _classes_of_captions(self) -> bool:
        """Whether images have the classes of their captions: others were never trained together."""
        if not self.text or not len(self.classes) or self.config.sampling.labels != "balanced":
            return False
        no_seeds = np.zeros(0, np.int64)
        return not self.low or self.low.labels(no_seeds, self.classes) is None

    @functools.cached_property
    def _listed_labels(self) -> Int[np.ndarray, " n"]:
        """The class of each listed prompt."""
        if parse_prompts(self.config.sampling.prompts):
            raise no_classes(f"{FIELD}={self.config.sampling.prompts!r:.60}")
        numbers = {"": -1} | {name: number for number, name in enumerate(self.classes.names)}
        names = self.listed.classes
        if not names:
            raise InputError(
                f"{self._captions_file} does not have the classes of its captions",
                "Run --mode=train again, which adds them, or set --config.sampling.labels.",
            )
        if unknown := set(names) - numbers.keys():
            raise InputError(
                f"{self._captions_file} has captions of the class {min(unknown)!r}, and the "
                f"networks know {self.classes}",
                "Set --config.sampling.labels.",
            )
        return np.asarray([numbers[name] for name in names], np.int32)

    @functools.cached_property
    def listed(self) -> Listed:
        """The prompts of `sampling.prompts`, or captions of the run; none if no stage takes text.

        Raises:
          InputError: there are none.
        """
        if not self.text:
            return Listed(())
        return choose(self.config, self.captions, classes=self._classes_of_captions)

    def prompts(self, seeds: Int[np.ndarray, " b"]) -> list[str]:
        """The prompt of each seed: prompt s mod n for seed s; '' if no stage takes text."""
        texts = self.listed.texts or ("",)
        return [texts[int(seed) % len(texts)] for seed in seeds]

    def are_held_out(self, prompts: Sequence[str]) -> list[bool]:
        """Whether each prompt is certainly no caption of the training (`Captions`)."""
        return self.captions.are_held_out(prompts) if self.captions else [False] * len(prompts)

    def captions_below(self, seeds: Int[np.ndarray, " b"]) -> list[str] | None:
        """What is drawn below the image of each seed: its prompt, its class, whether held out.

        None if no stage takes text.
        """
        if not self.text:
            return None
        prompts, labels = self.prompts(seeds), self.labels(seeds)
        texts = [mark(*pair) for pair in zip(prompts, self.are_held_out(prompts), strict=True)]
        names = [f" ({name})" for name in self.classes.names] + [""]  # last, for the label -1
        return [text + names[label] for text, label in zip(texts, labels, strict=True)]

    def sample(
        self, seeds: Int[np.ndarray, " n"], prompts: str | Sequence[str] | None = None
    ) -> list[np.ndarray]:
        """Samples any number of seeds, in their order.

        Batches have `sampling.batch_size` images; a short one is padded, so that nothing is
        compiled again.

        Args:
          seeds: (n,).
          prompts: of the images in their order, taken in turn, or one of all; None for those that
            the seeds have (`prompts`).

        Returns:
          The images of the `earlier` stages and of the last one, each uint8 (n, h, w, c).

        Raises:
          InputError: an image has values that are not finite, a prompt cannot be encoded or has no
            class, or no stage takes text.
        """
        texts, size = self._texts(seeds, prompts), self.config.sampling.batch_size
        made, begun = [], self._begin(seeds[:0], [])
        for batch, some in zip(in_batches(seeds, size), in_batches(texts, size), strict=True):
            following = self._begin(batch, some)  # before waiting for the previous batch
            made.append(self.finish(begun))
            begun = following
        return [np.concatenate(stage) for stage in zip(*made, self.finish(begun), strict=True)]

    def begin(self, seeds: Int[np.ndarray, " n"]) -> Begun:
        """Dispatches the computation without waiting, so that the devices stay busy.

        More seeds than a batch start several batches, whose images stay on the devices until
        `finish`.
        """
        return self._begin(seeds, self._own_texts(seeds))

    def _begin(self, seeds: Int[np.ndarray, " n"], texts: list[str]) -> Begun:
        size = self.config.sampling.batch_size
        batches = [
            self._begin_batch(batch, some)
            for batch, some in zip(in_batches(seeds, size), in_batches(texts, size), strict=True)
        ]
        stages = [
            [stages[number] for stages, _ in batches] for number in range(len(self.earlier) + 1)
        ]
        return Begun(stages, [finite for _, finite in batches], len(seeds))

    def _texts(
        self, seeds: Int[np.ndarray, " n"], prompts: str | Sequence[str] | None
    ) -> list[str]:
        """The prompt of each image."""
        if prompts is None:
            return self._own_texts(seeds)
        listed = [prompts] if isinstance(prompts, str) else list(prompts)
        if not self.text:
            raise no_text(f"prompts={prompts!r:.60}")
        if not listed and len(seeds):
            raise InputError(f"prompts={prompts!r} has no prompts", "Give one or more.")
        if self._classes_of_captions:
            raise no_classes(f"prompts={prompts!r:.60}")
        return [listed[i % len(listed)] for i in range(len(seeds))]

    def _own_texts(self, seeds: Int[np.ndarray, " n"]) -> list[str]:
        """The prompt of each seed; at their first use those of the config's seeds are encoded."""
        if self.text and not self._listed_are_encoded:
            self._encode_listed()
        return self.prompts(seeds)

    def _begin_batch(
        self, seeds: Int[np.ndarray, " b"], texts: Sequence[str]
    ) -> tuple[list[UInt8[Array, "b2 h w c"]], Bool[Array, " b2"]]:
        padded = np.resize(seeds, self.config.sampling.batch_size)
        given = {"label": self.labels(padded)}
        if self.text:
            given |= self._prompts.given([texts[i % len(texts)] for i in range(len(padded))])
        device_seeds, given = sharding.put_batch((padded.astype(np.uint32), given), self.mesh)
        stages, low, finite = [], None, jnp.ones(len(padded), bool)
        unfinished = False
        if self.low:
            stages.append(sharding.put_batch(self.low.images(padded), self.mesh))
            low = _encoded(stages[0])
        for sampler, params in self._stages:
            made = sampler.sample(params, low, given, device_seeds, unfinished=unfinished)
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
