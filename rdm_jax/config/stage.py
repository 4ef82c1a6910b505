"""A stage of the relay, how it is trained, and the kinds of its parts."""

import copy
import dataclasses
import functools
from typing import Any

import jax

from rdm_jax.config.codec import add_kind, kinds
from rdm_jax.diffusion import (
    blend,
    coupling,
    jump,
    linear_path,
    preconditioning,
    processes,
    samplers,
)
from rdm_jax.diffusion import guidance as guidances
from rdm_jax.diffusion.pixels import Pixels
from rdm_jax.diffusion.protocols import Process, Sampler
from rdm_jax.models.adm import ADM
from rdm_jax.models.backbone import Backbone, Shapes
from rdm_jax.models.conditions import ClassLabels, Condition, Nothing, Text
from rdm_jax.models.functional import Network, functional
from rdm_jax.models.song import Song
from rdm_jax.models.transformer import JiT
from rdm_jax.runtime.fields import Bounds, at_least, below, between, bounded, one_of, positive

# Relative widths of averages of the parameters. Above 12^(-1/2) the power function would fall.
NARROWEST, WIDEST = 0.001, 0.28


def _are_widths(values: tuple[float, ...]) -> bool:
    inside = all(NARROWEST <= value <= WIDEST for value in values)
    return inside and list(values) == sorted(set(values))


def _is_average(value: str | float) -> bool:
    try:
        return value in ("ema", "raw") or NARROWEST <= float(value) <= WIDEST
    except ValueError:
        return False


@dataclasses.dataclass(frozen=True)
class Training:
    """How a stage is trained. All durations and intervals are counted in images.

    Attributes:
      images: number of images shown, with repetition.
      batch_size: over all devices.
      accumulate: number of parts of a batch, processed one after the other to save memory.
      learning_rate, warmup: Adam's, rising linearly over the first `warmup` images.
      schedule: of the learning rate after that: 'constant'; 'inverse_sqrt', divided by the square
        root of the images seen in units of `decay_from` (EDM2, arXiv 2312.02696, equation 67); or
        'cosine', falling to 0 at `images`.
      decay_from: images after which 'inverse_sqrt' falls.
      beta1, beta2, epsilon: Adam's.
      weight_decay: AdamW's (arXiv 1711.05101), of kernels alone; 0 for Adam.
      clip_norm: gradients of a larger norm are scaled down to it; 0 for none.
      ema_halflife, ema_rampup: half-life of the EMA of the parameters, and its bound as a share of
        the images seen (0: none).
      averages: relative widths of further averages of the parameters, such as (0.05, 0.1): each
        weighs the images seen with a power function whose standard deviation is that share of the
        training so far (EDM2, arXiv 2312.02696). Each takes the memory of the parameters once more.
      snapshot_every: save the averages every so many images, and at the end, so that other widths
        can be reconstructed after the training. Snapshots stay: each takes the disk space of the
        parameters once per average.
      label_dropout: probability of training an image on the null condition, without caption and
        class; guidance needs it.
      dct_quality: measure the error in the 8 x 8 DCT, weighted as JPEG of this quality, 1 to 100,
        divides it (DeCo, arXiv 2511.19365): less at high frequencies and, of RGB, in the colours. 0
        measures it in pixels.
      flip: mirror half of all images, left and right; `augment` does so by itself.
      augment: probability of each of EDM's geometric augmentations; above 0, network.augment_labels
        must be 9. It works on images at twice their size and reflected on every side, 36 times
        their memory; `accumulate` divides that.
      start_from: folder of a checkpoint's step, whose EMA is the initial parameters; '' for random
        ones.
      checkpoint_every, checkpoint_minutes: save every so many images, and when so many minutes have
        passed since the last save (0: never).
      keep_newest, keep_best: number of the newest and of the best checkpoints to keep.
      max_failed_saves: consecutive saves that may fail, as on a full disk, while training
        continues. The last save must not fail, and with several processes none may.
      preview_every: interval of drawing a grid of samples; 0 for never.
      evaluate_every: interval of evaluating the stage (`evaluation.seeds_in_training`); 0: never.
      log_every: interval of writing a line of metrics.
      validation: number of images, evenly from those held out, or from the training set if there
        are none, for the validation loss of the EMA with fixed noise; it selects the best
        checkpoint.
      max_skipped: consecutive steps with a loss or gradient that is not finite, before the run
        stops.
    """

    images: int = at_least(1, default=2_500_000)
    batch_size: int = at_least(1, default=256)
    accumulate: int = at_least(1, default=1)
    learning_rate: float = positive(default=1e-4)
    warmup: int = at_least(0, default=10_000)
    schedule: str = one_of("constant", "inverse_sqrt", "cosine", default="constant")
    decay_from: int = at_least(1, default=10_000_000)
    beta1: float = below(1, default=0.9)
    beta2: float = below(1, default=0.999)
    epsilon: float = positive(default=1e-8)
    weight_decay: float = at_least(0, default=0.0)
    clip_norm: float = at_least(0, default=0.0)
    ema_halflife: float = positive(default=500_000.0)
    ema_rampup: float = at_least(0, default=0.05)
    averages: tuple[float, ...] = bounded(
        Bounds(f"widths from {NARROWEST:g} to {WIDEST:g}, the smallest first", _are_widths), ()
    )
    snapshot_every: int = at_least(1, default=100_000)
    label_dropout: float = below(1, default=0.1)
    dct_quality: int = between(0, 100, default=0)
    flip: bool = False
    augment: float = below(1, default=0.0)
    start_from: str = ""
    checkpoint_every: int = at_least(1, default=50_000)
    checkpoint_minutes: float = at_least(0, default=30.0)
    keep_newest: int = at_least(1, default=2)
    keep_best: int = at_least(0, default=1)
    max_failed_saves: int = at_least(0, default=2)
    preview_every: int = at_least(0, default=50_000)
    evaluate_every: int = at_least(0, default=0)
    log_every: int = at_least(1, default=2_000)
    validation: int = at_least(1, default=256)
    max_skipped: int = at_least(1, default=10)

    @property
    def steps(self) -> int:
        """Steps that show at least `images` images."""
        return -(-self.images // self.batch_size)


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of the relay.

    Attributes:
      resolution: height and width of its images.
      guidance: in sampling: a list of kinds, the first applied first. A number instead of the list
        is the weight of classifier-free guidance at all noise levels; 1 for none.
      checkpoint: to sample from: 'newest', 'best', a step's number, or the path of a checkpoint
        (folder of a step).
      average: of the parameters, to sample with: 'ema' (`training.ema_halflife`), 'raw' (the
        parameters themselves), or a relative width, one of `training.averages` or another that
        their snapshots reconstruct.
      source: of images for this stage alone, prepared at its own resolution beside the others'
        (`data.directory` and _stage1); '' for the means of the last stage's, so that the stages fit
        together.
      condition: what the network is conditioned on: the data's classes, if it has some, nothing, or
        captions, with classes or without.
    """

    resolution: tuple[int, ...] = (64, 64)
    network: Backbone = kinds(ADM, Song, JiT, default=ADM())
    precondition: preconditioning.Preconditioning = kinds(
        preconditioning.EDMPreconditioning,
        preconditioning.VPPreconditioning,
        preconditioning.VEPreconditioning,
        preconditioning.IDDPMPreconditioning,
        preconditioning.XPreconditioning,
        default=preconditioning.EDMPreconditioning(),
    )
    process: Process = kinds(
        processes.GaussianProcess,
        processes.VPProcess,
        processes.VEProcess,
        processes.RelayProcess,
        processes.CascadeProcess,
        linear_path.LinearProcess,
        coupling.CouplingProcess,
        blend.BlendProcess,
        default=processes.GaussianProcess(),
    )
    training: Training = Training()
    sampler: Sampler = kinds(
        samplers.Heun,
        samplers.RelayHeun,
        samplers.CascadeHeun,
        linear_path.LinearHeun,
        jump.JumpHeun,
        coupling.CouplingHeun,
        blend.BlendHeun,
        default=samplers.Heun(),
    )
    # A tuple of `Guidance` once it is set; numbers are accepted, too.
    guidance: Any = kinds(
        guidances.ClassifierFree,
        guidances.Autoguidance,
        default=(),
        listed=guidances.Guidance,
        shorthand=guidances.as_list,
    )
    checkpoint: str = "newest"
    average: str | float = bounded(
        Bounds(f"'ema', 'raw' or a width from {NARROWEST:g} to {WIDEST:g}", _is_average), "ema"
    )
    source: str = ""
    condition: Condition = kinds(ClassLabels, Nothing, Text, default=ClassLabels())

    def __post_init__(self) -> None:
        object.__setattr__(self, "guidance", guidances.as_list(self.guidance))

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
        """Factor by which this stage enlarges the images of the one before it."""
        return self.process.enlarges

    @property
    def representation(self) -> Pixels:
        """How records hold images, and the network sees them."""
        return Pixels()

    @property
    def nfe(self) -> int:
        """Network function evaluations per sample; all passes of one with guidance count as one."""
        return self.sampler.nfe(self.process)

    @property
    def passes(self) -> tuple[int, ...]:
        """Passes per sample: of the stage's network, then of each guide of `guidance`."""
        return tuple(self.nfe * each for each in guidances.passes(self.guidance))

    @property
    def width(self) -> float | None:
        """The relative width of the average to sample with; None for 'ema' and 'raw'."""
        return None if self.average in ("ema", "raw") else float(self.average)

    @property
    def some_classes(self) -> int:
        """A number of classes to build the network with where the data is not open yet."""
        return getattr(self.condition, "count", 0) or 1

    def condition_for(self, classes: int) -> Condition:
        """The condition for data of so many classes (0: none). Raises InputError if unusable."""
        return self.condition.bound(classes)

    def build(self, channels: int, classes: int) -> Network:
        """The stage's network for images of so many channels and classes (0: none)."""
        shapes = Shapes(
            channels_in=channels + self.process.conditioning_channels(channels),
            channels_out=channels * self.precondition.outputs,
            condition=self.condition_for(classes).spec,
        )
        network: Any = self.network  # frozen dataclasses are hashable, and a dict is not
        leaves, tree = jax.tree.flatten(shapes.condition)
        return _built(network, shapes._replace(condition=tuple(leaves)), tree)

    def multiply_adds(self, channels: int, classes: int) -> int:
        """Multiply-adds of one forward pass per image."""
        # Traced in float32, as fused attention would hide its products.
        network: Any = self.network
        plain = dataclasses.replace(self, network=dataclasses.replace(network, dtype="float32"))
        height, width = self.resolution
        channels_in = channels + self.process.conditioning_channels(channels)
        return plain.build(channels, classes).multiply_adds(
            (height, width, channels_in), self.condition_for(classes).spec
        )


@functools.lru_cache(maxsize=16)
def _built(network: Backbone, shapes: Shapes, tree: Any) -> Network:
    """Cached, as a run builds each of its networks several times."""
    shapes = shapes._replace(condition=jax.tree.unflatten(tree, shapes.condition))
    return functional(lambda rngs: network.build(shapes, rngs=rngs))


def extend(field: str, cls: type) -> None:
    """Adds a class from outside the package to those that a field of a stage may hold.

    Configs then know its kind (`kind_of`). The module that calls this must be imported before a
    config with that kind is read.

    Args:
      field: 'network', 'precondition', 'process', 'sampler', 'guidance' or 'condition'.
      cls: a frozen dataclass with the methods of the field's protocol, whose fields have defaults.

    Raises:
      ValueError: the field has no kinds, `cls` is not a dataclass or lacks a method of the field's
        protocol, or its kind is taken.
    """
    add_kind(Stage, field, cls)
