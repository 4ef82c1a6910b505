"""The config: frozen dataclasses, with the bounds of their fields.

A config file returns `Config(...).to_config_dict()`; `--config.stage1.training.images=1000`
overrides a field of it, and `parse` turns the result back into a `Config`, which
`rdm_jax.config.validate` checks. The processes, samplers and networks are their own schema: the
dataclasses that do the work are the ones that are filled in here. `extend` adds classes of other
packages.
"""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from rdm_jax.config.autoencoder import Autoencoder
from rdm_jax.config.codec import to_plain
from rdm_jax.config.stage import Stage
from rdm_jax.data import captions, class_rules, postprocess
from rdm_jax.diffusion import processes, samplers
from rdm_jax.runtime.fields import at_least, between, one_of, positive

LEAST = 4  # images that can be measured: each has 3 neighbours
FEATURES = ("none", "inception", "efficientnet", "classifier")


@dataclasses.dataclass(frozen=True)
class Data:
    """The images. They are prepared at the last stage's resolution; earlier stages see their means.

    Attributes:
      source: 'digits', 'folder:PATH', 'zip:PATH', 'tar:PATH', 'tfds:NAME', 'emoji:PATH' (all
        explained at `data.sources.open_source`), or 'prepared:PATH' for a prepared data set.
      directory: of the prepared records; '' to write nothing and decode the source into memory at
        every start, if it is not larger than `cache_gib`.
      channels: 1 or 3.
      background: colour under transparent pixels, 0 to 255 per channel.
      crop: 'lanczos' (central crop, then Lanczos), 'adm' (ADM's and EDM's rule for ImageNet), 'pad'
        (the whole image, in the middle of `background`) or 'none' (sizes are right).
      encoding: 'png', 'jpeg', or 'raw' (fast to decode in training, larger than 'png').
      quality: of 'jpeg', 1 to 100.
      autoencoder: folder of an autoencoder as it is published, or as --mode=autoencoder writes it:
        the stages then work on its latents, `resolution` is that of latents, and images are
        prepared at the last one times the autoencoder's factor. '' for pixels.
      skin_tones: of emoji: 'mark' makes the skin tone the label, 'drop' leaves the variants out; ''
        for all else.
      classes: of folder:, zip: and tar: 'auto' (dataset.json; else the folders at the top; else
        none), 'top', 'leaf' (the folders that the images lie in), 'prefix' (what is before the
        number in the names of files); 'none', for all sources.
      captions: 'none'; 'auto' (metadata if there are any, else .txt files beside the images; of
        emoji their names, of tfds: a text feature), 'metadata' (metadata.jsonl or metadata.csv with
        file_name and text, or "captions" in dataset.json), 'txt', or 'names' (the words of file
        names).
      text_encoder: of captions and prompts: 'minilm' (all-MiniLM-L6-v2, which a package has), or
        't5:PATH' (a folder with a T5 encoder: config.json, safetensors, tokenizer.json).
      text_tokens: the most tokens of a caption or prompt.
      max_left_out: share of files that --skip_bad may leave out; 1 allows all of them, and whole
        classes.
      held_out: number of images, evenly from the set, that no stage is trained on. The validation
        loss is measured on them, and evaluation compares them with the others.
      cache_gib: sets up to this size are decoded into memory.
      workers: processes that read and decode images of a set that is not in memory; 0 for threads
        of the main process, one per core.
      worker_timeout: seconds that the workers may take for a batch. If they take longer or are
        killed, they are restarted once.
    """

    source: str = "folder:images"
    directory: str = "data/images"
    channels: int = 3
    background: tuple[int, ...] = (255, 255, 255)
    crop: str = "lanczos"
    encoding: str = "png"
    quality: int = 95
    autoencoder: str = ""
    skin_tones: str = ""
    classes: str = one_of(*class_rules.RULES, default="auto")
    captions: str = one_of(*captions.RULES, default="none")
    text_encoder: str = "minilm"
    text_tokens: int = between(1, 512, default=32)
    max_left_out: float = between(0, 1, default=0.1)
    held_out: int = at_least(0, default=0)
    cache_gib: float = at_least(0, default=1.0)
    workers: int = at_least(0, default=0)
    worker_timeout: float = positive(default=300.0)


@dataclasses.dataclass(frozen=True)
class Sampling:
    """The samples.

    Attributes:
      name: folder under the workdir. Further seeds with the same settings are added to it.
      seeds: '0-499', or '1,5,7-9'; an image depends on its own seed alone.
      labels: 'balanced' (the image of seed s has class s mod the number of classes: equal numbers
        of each, as for the published FID of 1.87), 'random' (uniform, from the seed alone), or a
        list of classes taken in turn, by name ('cat, dog', or as JSON '["crane, bird"]') or, unless
        a class is named by a number, by index ('3', '0,2-5'). Captions of the run have their own
        class if labels are balanced; other prompts then need a list or 'random'.
      prompts: of networks that know text: 'a red apple; a sleeping cat', a JSON list, or the path
        of a .txt file in UTF-8 with one per line. The image of seed s has prompt s mod n. '' for
        captions of the training, and 'held_out' for captions of held-out images alone, each in a
        random order.
      low: 'folder:PATH', 'zip:PATH' or 'tar:PATH' of small images of the size of a stage's. The
        relay continues from them, image s mod n for seed s, with its class, matched by name, if
        labels are balanced; the stages up to that one are skipped. '' to start with stage 1.
      postprocess: 'none', or what the released samplers do to the final images before FID is
        measured: 'rdm_imagenet' (brightness 1.06) or 'rdm_celebahq' (contrast 0.9, brightness 1.05,
        colour 0.99).
      batch_size: images at a time, over all devices of a process.
      files: 'npz' for all stages' images in one file, or 'png' for the last stage's, a file each,
        in a folder.
    """

    name: str = "samples"
    seeds: str = "0-63"
    labels: str = "balanced"
    prompts: str = ""
    low: str = ""
    postprocess: str = one_of(*postprocess.PRESETS, default="none")
    batch_size: int = at_least(1, default=16)
    files: str = one_of("npz", "png", default="npz")


@dataclasses.dataclass(frozen=True)
class Parallel:
    """How training is spread over the devices of all processes; results do not depend on it.

    Attributes:
      mode: 'pjit' (`jit` with shardings), or 'pmap' (data parallelism only).
      data: devices along the mesh's data axis; -1 for the rest.
      fsdp: devices along the mesh's parameter axis. Each keeps its shard of the parameters, of
        their EMA and of the optimizer's state, and fetches the rest when needed (ZeRO, arXiv
        1910.02054). Batches are sharded along this axis too. -1 for the rest.
    """

    mode: str = one_of("pjit", "pmap", default="pjit")
    data: int = -1
    fsdp: int = 1


@dataclasses.dataclass(frozen=True)
class Published:
    """The paper's figures, for comparison in the report; 0 for an unknown one.

    Attributes:
      where: table, settings or line in the paper.
    """

    where: str = ""
    fid: float = 0.0
    sfid: float = 0.0
    inception_score: float = 0.0
    precision: float = 0.0
    recall: float = 0.0


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What is measured, with which features, against which reference.

    Attributes:
      name: folder under the workdir. Earlier results with other settings are moved aside, to
        NAME-earlier-1 and so on.
      features: 'inception', 'efficientnet' (whose weights a package has), 'classifier' (trained on
        the data's own labels), or 'none' for no evaluation.
      weights: file with the network of the features; '' for the usual place, which an error names,
        or for the classifier of this workdir.
      images: sets to measure, separated by commas, or as a JSON list: 'samples' (generated while
        they are measured), 'stage1' and so on (that stage's images, enlarged to the final size),
        'stage1@native' and so on (the same at the stage's own size), 'held_out' (real),
        'prepared:PATH', 'folder:PATH', 'zip:PATH', 'tar:PATH', or 'npz:PATH' (`arr_0` or `images`).
      reference: 'training', 'held_out', 'prepared:PATH', or 'npz:PATH' with statistics: ADM's,
        EDM's, or those that an evaluation has written.
      native_reference: the same for 'stage1@native' and so on: stages before the last are compared
        with it at their own size, also during their training. 'training' and 'held_out' are the
        means that a stage is trained on; 'npz:PATH' may be published statistics of that size, such
        as EDM's of ImageNet at 64 x 64. Not with a classifier's features: it is made for the final
        size. '' for none: stages are then measured enlarged.
      seeds: of the generated images; '' for those of `sampling`, whose labels and post-processing
        apply here too.
      seeds_in_training: of the images that a stage generates alone during its training, without
        post-processing. A relay stage starts from the means of real images, held-out ones if there
        are any, and uses their classes.
      kept: number of images of each set whose features enter precision, recall and the kernel
        distance.
      batch_size: real images at a time, over all devices of a process.
    """

    name: str = "evaluation"
    features: str = one_of(*FEATURES, default="none")
    weights: str = ""
    images: str = "samples"
    reference: str = "training"
    native_reference: str = ""
    seeds: str = ""
    seeds_in_training: str = "0-499"
    kept: int = at_least(LEAST, default=10_000)
    batch_size: int = at_least(1, default=64)
    published: Published = Published()


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run. The stages are `stage1`, `stage2`, ... in the config file.

    Attributes:
      seed: of everything random, except for the samples, which have their own.
      stages: in the order in which they run; each knows its `number` and `name`.
      tracker: what metrics and previews of the training are sent to, beside the files: 'wandb' for
        Weights & Biases, '' for none.
    """

    seed: int = between(0, 2**32 - 1, default=0)
    data: Data = Data()
    stages: tuple[Stage, ...] = (
        Stage(),
        Stage(
            resolution=(256, 256), process=processes.RelayProcess(), sampler=samplers.RelayHeun()
        ),
    )
    parallel: Parallel = Parallel()
    sampling: Sampling = Sampling()
    evaluation: Evaluation = Evaluation()
    tracker: str = one_of("", "wandb", default="")
    autoencoder: Autoencoder = Autoencoder()

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
        """The config as an ml_collections ConfigDict, which `--config.field=value` overrides."""
        fields = to_plain(self)
        values = fields.pop("stages")
        stages = {stage.name: value for stage, value in zip(self.stages, values, strict=True)}
        return ConfigDict({**fields, **stages}, sort_keys=False)
