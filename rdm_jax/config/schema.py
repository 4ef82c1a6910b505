"""What can be set: frozen dataclasses, and their way to and from ml_collections.

A config file returns `Config(...).to_config_dict()`; `--config.stage1.training.images=1000`
overrides a field of it, and `parse` turns the result back into a `Config`, which
`rdm_jax.config.validate` looks over. The processes, samplers and networks are their own schema: the
dataclasses that do the work are the ones that are filled in here.
"""

import copy
import dataclasses
from typing import Any

from ml_collections import ConfigDict

from rdm_jax.config.codec import to_plain
from rdm_jax.diffusion import preconditioning, processes, samplers
from rdm_jax.models.adm import ADM
from rdm_jax.models.functional import Network, functional
from rdm_jax.models.song import Song


@dataclasses.dataclass(frozen=True)
class Data:
    """What is learnt. The images are prepared at the last stage's resolution; earlier stages see
    their means.

    Attributes:
      source: 'digits', 'folder:PATH', 'zip:PATH', 'tar:PATH', 'tfds:NAME', 'emoji:PATH' (all
        explained at `data.sources.open_source`), or 'prepared:PATH' for what has been prepared
        already.
      directory: where the prepared records are, or are to be written; '' to write nothing and
        decode the source, if it is not larger than `cache_gib`, into memory at every start.
      channels: 1 or 3.
      background: colour under transparent pixels, 0 to 255 a channel.
      crop: 'lanczos' (central crop, then Lanczos), 'adm' (ADM's and EDM's rule for ImageNet) or
        'none' (sizes are right).
      encoding: 'png', 'jpeg', or 'raw' (next to nothing to decode in training, more space than
        'png').
      quality: of 'jpeg', 1 to 100.
      skin_tones: of emoji: 'mark' makes the skin tone the label, 'drop' leaves the variants out; ''
        for all else.
      classes: of folder:, zip: and tar: 'auto' (dataset.json; else the folders at the top; else
        none), 'top', 'leaf' (the folders that the images lie in), 'prefix' (what is before the
        number in the names of files); 'none', for all sources.
      max_left_out: the share of files that --skip_bad may leave out; with 1 all of them, and whole
        classes too.
      held_out: images, evenly from the set, that no stage is trained on: the validation loss is
        theirs, and evaluation compares them with the others.
      cache_gib: the set is decoded into memory where it is not larger than this.
      workers: processes that read and decode batches of a set that is not in memory; 0 for two
        threads of the main one.
      worker_timeout: seconds that they may take for a batch. Others take their place, once, where
        they take longer or are killed.
    """

    source: str = "folder:images"
    directory: str = "data/images"
    channels: int = 3
    background: tuple[int, ...] = (255, 255, 255)
    crop: str = "lanczos"
    encoding: str = "png"
    quality: int = 95
    skin_tones: str = ""
    classes: str = "auto"
    max_left_out: float = 0.1
    held_out: int = 0
    cache_gib: float = 1.0
    workers: int = 0
    worker_timeout: float = 300.0


@dataclasses.dataclass(frozen=True)
class Training:
    """How a stage is trained. Whatever is counted, is counted in images.

    Attributes:
      images: how many are shown, with repetition.
      batch_size: over all devices.
      accumulate: parts into which a batch is cut, one after the other, to save memory.
      learning_rate, warmup: Adam's, rising linearly over the first `warmup` images.
      beta1, beta2, epsilon: Adam's.
      ema_halflife, ema_rampup: half-life of the averaged parameters, and its bound as a share of
        the images seen (0: none).
      label_dropout: probability that a label is hidden; guidance needs it.
      flip: mirror half of all images, left and right; `augment` does so by itself.
      augment: probability of each of EDM's geometric augmentations; with more than 0,
        network.augment_labels must be 9. It works on images at twice their size and reflected on
        every side, 36 times their memory; `accumulate` divides that.
      start_from: folder of a checkpoint's step, whose averaged parameters training begins with; ''
        for random ones.
      checkpoint_every, checkpoint_minutes: when to save: every so many images, and when so many
        minutes have passed since the last save (0: never).
      keep_newest, keep_best: how many of the newest and of the best checkpoints to keep.
      max_failed_saves: saves in a row that may fail, as on a full disk, and training goes on; the
        last one must not, and with several processes none may.
      preview_every: when to draw a grid of samples; 0 for never.
      evaluate_every: when to evaluate the stage (`evaluation.seeds_in_training`); 0 for never.
      log_every: when to write a line of metrics.
      validation: images, evenly from those held out, or from the training set if there are none,
        whose loss under the averaged parameters, with fixed noise, tells the best checkpoint.
      max_skipped: steps in a row with a loss or gradient that is not finite, before the run stops.
    """

    images: int = 2_500_000
    batch_size: int = 256
    accumulate: int = 1
    learning_rate: float = 1e-4
    warmup: int = 10_000
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    ema_halflife: float = 500_000.0
    ema_rampup: float = 0.05
    label_dropout: float = 0.1
    flip: bool = False
    augment: float = 0.0
    start_from: str = ""
    checkpoint_every: int = 50_000
    checkpoint_minutes: float = 30.0
    keep_newest: int = 2
    keep_best: int = 1
    max_failed_saves: int = 2
    preview_every: int = 50_000
    evaluate_every: int = 0
    log_every: int = 2_000
    validation: int = 256
    max_skipped: int = 10

    @property
    def steps(self) -> int:
        """Steps that show at least `images` images."""
        return -(-self.images // self.batch_size)


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of the relay.

    Attributes:
      resolution: height and width of its images.
      guidance: weight of classifier-free guidance in sampling; 1 for none.
      checkpoint: what to sample from: 'newest', 'best', a step's number, or the path of a
        checkpoint (folder of a step).
      source: of images for this stage alone, prepared at its own resolution beside the others'
        (`data.directory` and _stage1); '' for the means of the last stage's, so that the stages fit
        together.
    """

    resolution: tuple[int, ...] = (64, 64)
    network: ADM | Song = ADM()
    precondition: (
        preconditioning.EDM | preconditioning.VP | preconditioning.VE | preconditioning.IDDPM
    ) = preconditioning.EDM()
    process: (
        processes.Gaussian | processes.VP | processes.VE | processes.Relay | processes.Cascade
    ) = processes.Gaussian()
    training: Training = Training()
    sampler: samplers.Heun | samplers.RelayHeun | samplers.CascadeHeun = samplers.Heun()
    guidance: float = 1.0
    checkpoint: str = "newest"
    source: str = ""

    @property
    def number(self) -> int:
        """Position in the config, from 1. Not a field: `Config` sets it on the stages it holds.

        Raises:
          ValueError: the stage is not one of `Config.stages`.
        """
        if "_number" not in self.__dict__:
            raise ValueError("a stage has a number only as one of Config.stages")
        return self.__dict__["_number"]

    @property
    def name(self) -> str:
        """'stage1' for the first stage: its section in a config and its folder in a workdir."""
        return f"stage{self.number}"

    def _numbered(self, number: int) -> "Stage":
        """The same stage, equal to this one, with this number."""
        if self.__dict__.get("_number") == number:
            return self
        stage = copy.copy(self)
        object.__setattr__(stage, "_number", number)
        return stage

    @property
    def factor(self) -> int:
        """By how much this stage enlarges the one before it."""
        return (
            self.process.patch
            if isinstance(self.process, (processes.Relay, processes.Cascade))
            else 1
        )

    def build(self, channels: int, classes: int) -> Network:
        """The stage's network for images of so many channels and classes."""
        kwargs = {"outputs": self.precondition.outputs, "given": self._given(channels)}
        return functional(lambda rngs: self.network.build(channels, classes, **kwargs, rngs=rngs))

    def multiply_adds(self, channels: int, classes: int) -> int:
        """Of one forward pass for one image."""
        # Traced in float32, as fused attention would hide its products.
        plain = dataclasses.replace(
            self, network=dataclasses.replace(self.network, dtype="float32")
        )
        return plain.build(channels, classes).multiply_adds(
            (*self.resolution, channels + self._given(channels)), classes
        )

    def _given(self, channels: int) -> int:
        """Channels of the network's input besides the image's."""
        return channels + 1 if isinstance(self.process, processes.Cascade) else 0


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Which images are made in the end.

    Attributes:
      name: folder under the workdir. Further seeds with the same settings are added to what is in
        it.
      seeds: '0-499', or '1,5,7-9'; an image is its seed's, whatever else is made with it.
      labels: 'balanced' (image of seed s has class s mod the number of classes: the same number of
        each, and the published 1.87), 'random' (uniform, from the seed alone), or a list of classes
        taken in turn, by name ('cat, dog', or as JSON '["crane, bird"]') or, where no class is
        called by a number, by number ('3', '0,2-5').
      low: 'folder:PATH', 'zip:PATH' or 'tar:PATH' of small images, of the size of a stage's: the
        relay goes on from them, image s mod n for seed s, with its class, known by name, if labels
        are balanced, and the stages up to that one are left out; '' to begin with stage 1.
      postprocess: 'none', or what the released samplers do to the final images before FID is
        measured: 'rdm_imagenet' (brightness 1.06) or 'rdm_celebahq' (contrast 0.9, brightness 1.05,
          colour 0.99).
      batch_size: images at a time, over all devices of a process.
      files: what is written: 'npz', all stages' images in one file, or 'png', the last one's as a
        picture each, in a folder.
    """

    name: str = "samples"
    seeds: str = "0-63"
    labels: str = "balanced"
    low: str = ""
    postprocess: str = "none"
    batch_size: int = 16
    files: str = "npz"


@dataclasses.dataclass(frozen=True)
class Parallel:
    """How training is spread over the devices of all processes. What is learnt does not depend on
    it.

    Attributes:
      mode: 'pjit' (`jit` with shardings), or 'pmap', which knows parallel data alone.
      data: devices along the mesh's axis of batches; -1 for the rest.
      fsdp: devices along its axis of parameters: each keeps that part of the parameters, of their
        average and of the optimizer's state, and fetches the rest when it is needed (ZeRO, arXiv
        1910.02054); batches are cut along it, too; -1 for the rest.
    """

    mode: str = "pjit"
    data: int = -1
    fsdp: int = 1


@dataclasses.dataclass(frozen=True)
class Published:
    """Figures of the paper, for the report to set ours beside; 0 for one that is not known.

    Attributes:
      where: which table, settings or line of it.
    """

    where: str = ""
    fid: float = 0.0
    sfid: float = 0.0
    inception_score: float = 0.0
    precision: float = 0.0
    recall: float = 0.0


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What is measured, with which features, against what.

    Attributes:
      name: folder under the workdir. Earlier results of something else are moved aside, to
        NAME-earlier-1 and so on.
      features: 'inception', 'classifier' (trained on the data's own labels), or 'none' to leave
        evaluation out.
      weights: file with the network of the features; '' for the usual place, which an error names,
        or for the classifier of this workdir.
      images: what is measured, with commas between, or as a JSON list: 'samples' (generated while
        they are measured), 'stage1' and so on (what that stage has made, enlarged to the final
        size), 'stage1@native' and so on (the same at the stage's own size), 'held_out' (real),
        'prepared:PATH', 'folder:PATH', 'zip:PATH', 'tar:PATH', or 'npz:PATH' (`arr_0` or `images`).
      reference: 'training', 'held_out', 'prepared:PATH', or 'npz:PATH' with statistics: ADM's,
        EDM's, or those that an evaluation has written.
      native_reference: the same for 'stage1@native' and so on: what stages before the last are
        compared with at their own size, during their training too. 'training' and 'held_out' are
        the means that a stage is trained on; 'npz:PATH' may be published statistics of that size,
        such as EDM's of ImageNet at 64 x 64. Inception's features alone: a classifier knows the
        final size only. '' for none: stages are then measured enlarged.
      seeds: of what is generated; '' for those of `sampling`, whose labels and post-processing hold
        here too.
      seeds_in_training: of what a stage makes alone while it is being trained, without
        post-processing; a relay stage goes on from the means of real images, those held out if
        there are any, and has their classes.
      kept: images of each set whose features precision, recall and the kernel distance compare.
      batch_size: real images at a time, over all devices of a process.
    """

    name: str = "evaluation"
    features: str = "none"
    weights: str = ""
    images: str = "samples"
    reference: str = "training"
    native_reference: str = ""
    seeds: str = ""
    seeds_in_training: str = "0-499"
    kept: int = 10_000
    batch_size: int = 64
    published: Published = Published()


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run: a relay is a tuple of stages, `stage1`, `stage2`, ... in the config file.

    Attributes:
      seed: of everything random, but for the images' own seeds.
      stages: in the order in which they run; each knows its `number` and `name`.
    """

    seed: int = 0
    data: Data = Data()
    stages: tuple[Stage, ...] = (
        Stage(),
        Stage(resolution=(256, 256), process=processes.Relay(), sampler=samplers.RelayHeun()),
    )
    parallel: Parallel = Parallel()
    sampling: Sampling = Sampling()
    evaluation: Evaluation = Evaluation()

    def __post_init__(self) -> None:
        numbered = tuple(stage._numbered(i) for i, stage in enumerate(self.stages, 1))
        object.__setattr__(self, "stages", numbered)

    def stage(self, number: int) -> Stage:
        """The stage of this number, from 1. Raises IndexError if there is none."""
        if not 1 <= number <= len(self.stages):
            raise IndexError(f"stage {number} of {len(self.stages)}")
        return self.stages[number - 1]

    def with_stage(self, number: int, **changes: Any) -> "Config":
        """The config with fields of stage `number` (from 1) replaced.

        A dict holds the fields to replace in a part of the stage, as in
        `config.with_stage(2, training={"images": 1000}, guidance=1.0)`.
        """
        changed = self.stage(number)
        for name, value in changes.items():
            if isinstance(value, dict):
                value = dataclasses.replace(getattr(changed, name), **value)
            changed = dataclasses.replace(changed, **{name: value})
        return dataclasses.replace(
            self, stages=(*self.stages[: number - 1], changed, *self.stages[number:])
        )

    def to_config_dict(self) -> ConfigDict:
        """The same as an ml_collections ConfigDict, which `--config.field=value` overrides."""
        fields = to_plain(self)
        values = fields.pop("stages")
        stages = {stage.name: value for stage, value in zip(self.stages, values, strict=True)}
        return ConfigDict({**fields, **stages}, sort_keys=False)
