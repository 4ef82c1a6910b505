"""The networks that guide a stage: found, checked against it, and loaded from their checkpoints.

A guide's stage is that in its checkpoint's record, whatever the config of the run says.
"""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rdm_jax.checkpoints import folders, store
from rdm_jax.config import Stage, kind_of, to_plain
from rdm_jax.config.codec import from_plain
from rdm_jax.data import latent_spec
from rdm_jax.data.classes import Classes, matched, of_checkpoint
from rdm_jax.data.latent_spec import LatentSpec
from rdm_jax.data.text_table import TextSpec, same_text, spec_of
from rdm_jax.models.functional import Network
from rdm_jax.runtime import distributed, sharding
from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.mounts import AnyPath, any_path
from rdm_jax.sampling.prompts import takes_text, uses_classes


class Guide(NamedTuple):
    """A network that guides, ready to sample with.

    Attributes:
      stage: of the guide: its network, preconditioning and condition.
      classes: number of classes that it knows; 0 for none.
      network: its network.
      params: its EMA parameters, on the devices of this process.
      checkpoint: where they come from, as JSON: 'step' and 'folder'.
    """

    stage: Stage
    classes: int
    network: Network
    params: Any
    checkpoint: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Record:
    """What a guide's checkpoint says of it, without its parameters.

    Attributes:
      field: of the config that names it, with its value.
      folder: of the step.
      stage: of the guide.
      classes: that it knows.
      has_null: whether it may have been trained without labels; of imported weights it is unknown.
      text: how the captions that it knows are embedded; None if it knows none.
      latents: that it was trained on; None for pixels.
    """

    field: str
    folder: AnyPath
    stage: Stage
    classes: Classes
    has_null: bool
    text: TextSpec | None
    latents: LatentSpec | None

    def network(self, channels: int) -> Network:
        """Its network for images of so many channels."""
        return self.stage.build(channels, len(self.classes))


def records(stage: Stage) -> list[Record]:
    """The records of a stage's guides, in the order of its guidance. All processes must call it.

    Raises:
      InputError: a checkpoint does not exist, is damaged, is of another resolution or process, or
        does not know the sampler's noise levels.
    """
    found = []
    for i, entry in enumerate(stage.guidance):
        if entry.guide:
            record = _read(entry.guide, f"config.{stage.name}.guidance[{i}].checkpoint")
            _check_same_images(stage, record)
            _check_null(stage, i, record)
            _check_levels(stage, i, record)
            found.append(record)
    return found


def load(
    stage: Stage,
    channels: int,
    classes: Classes,
    text: TextSpec | None = None,
    latents: LatentSpec | None = None,
) -> list[Guide]:
    """The guides of a stage, with their EMA parameters. All processes must call it together.

    Args:
      stage: that is guided.
      channels: of its images.
      classes: that its network knows.
      text: how the captions that its network knows are embedded; None for none.
      latents: that its network was trained on; None for pixels.

    Raises:
      InputError: as `records` and `check` do, or a checkpoint is damaged.
    """
    guides = []
    for record in records(stage):
        _check_same_classes(record, classes)
        _check_same_text(record, text)
        _check_same_latents(record, latents)
        _check_same_channels(record, channels)
        network, step = record.network(channels), int(record.folder.name)
        everywhere = sharding.replicated(sharding.make_mesh())
        abstract = store.with_sharding(network.abstract, everywhere)
        with _checkpoints(record) as checkpoints:
            ema, _ = checkpoints.restore_ema(step, abstract)
        params = sharding.on_this_process(ema, sharding.local_mesh())
        source = {"step": step, "folder": str(record.folder.parent.resolve())}
        guides.append(Guide(record.stage, len(record.classes), network, params, source))
    return guides


def check(
    stage: Stage,
    channels: int,
    classes: Classes | None = None,
    text: TextSpec | None = None,
) -> None:
    """Refuses guides that cannot guide a stage; reads no parameters. All processes must call it.

    Args:
      stage: that is guided.
      channels: of its images.
      classes: that its network knows; None if they and its text are not known yet.
      text: as for `load`.

    Raises:
      InputError: names the field, the guide's checkpoint and what differs.
    """
    for record in records(stage):
        _check_same_channels(record, channels)
        if classes is not None:
            _check_same_classes(record, classes)
            _check_same_text(record, text)


def depends_on_classes(stage: Stage, classes: int) -> bool:
    """Whether a stage's images depend on their class: by its condition, or beside text a guide's.

    Without text, an unconditional stage and its guides are sampled without classes.

    Args:
      stage: that is sampled.
      classes: that its network knows; 0 for none.

    Raises:
      InputError: as `records` does.
    """
    conditions = [stage.condition_for(classes)]
    if takes_text(stage):
        guided_by = records(stage)
        conditions += [each.stage.condition_for(len(each.classes)) for each in guided_by]
    return any(map(uses_classes, conditions))


def multiply_adds(stage: Stage, channels: int, classes: int, one_pass: int | None = None) -> int:
    """Multiply-adds per sampled image: all passes of the stage's network and of its guides.

    A guide's are those of its own network.

    Args:
      stage: its network, sampler and guidance.
      channels, classes: of the images; 0 classes for none.
      one_pass: of the stage's network, if known; tracing a large one takes seconds.

    Raises:
      InputError: as `records` does.
    """
    own, *others = stage.passes
    total = own * (one_pass or stage.multiply_adds(channels, classes))
    for record, passes in zip(records(stage) if others else (), others, strict=True):
        total += passes * record.stage.multiply_adds(channels, len(record.classes))
    return total


def _read(checkpoint: str, field: str) -> Record:
    given = any_path(checkpoint)
    newest = distributed.from_primary((given / "checkpoints").is_dir())
    named, inside = ("newest", given / "checkpoints") if newest else (str(given), Path())
    directory, step = folders.find(named, inside, field)
    folder = directory / str(step)
    about = folders.read_about(folder, "Use another checkpoint.")
    imported = "imported" in about
    return Record(
        f"{field}={checkpoint!r}",
        folder,
        from_plain(Stage, about["stage"], f"checkpoint {folder}: stage"),
        of_checkpoint(about),
        imported or about["stage"]["training"]["label_dropout"] > 0,
        spec_of(about),
        latent_spec.spec_of(about),
    )


def _checkpoints(record: Record) -> contextlib.closing[store.Checkpoints]:
    return contextlib.closing(store.Checkpoints(record.folder.parent, read_only=True))


def _check_same_images(stage: Stage, record: Record) -> None:
    """The guide must denoise the same noised images; its levels and loss in training are its own.

    All that starts from noise is x + sigma n. What a relay or a cascade blurs, or is conditioned
    on, is a matter of all settings of its process.
    """
    theirs = record.stage
    if theirs.resolution != stage.resolution:
        raise InputError(
            f"{record.field}: the guide makes images of {theirs.resolution}, and {stage.name} of "
            f"{stage.resolution}",
            f"Use a guide of {stage.resolution}.",
        )
    if theirs.process != stage.process and max(theirs.factor, stage.factor) > 1:
        was, now = (
            {"kind": kind_of(type(each.process)), **to_plain(each.process)}
            for each in (theirs, stage)
        )
        name = next(name for name in {**now, **was} if was.get(name) != now.get(name))
        raise InputError(
            f"{record.field}: the guide was trained with process.{name}={was.get(name)!r}, and "
            f"{stage.name} with {now.get(name)!r}",
            "Use a guide of the same process.",
        )


def _check_null(stage: Stage, index: int, record: Record) -> None:
    """What follows in the list may need the guide's null condition."""
    later = [entry for entry in stage.guidance[index + 1 :] if entry.needs_null]
    conditioned = record.stage.condition_for(len(record.classes)).spec is not None
    if later and conditioned and not record.has_null:
        raise InputError(
            f"{record.field}: the guide was trained with training.label_dropout=0, and "
            f"guidance {later[0]} after it needs the null condition",
            "Put autoguidance last in the list.",
        )


def _check_levels(stage: Stage, index: int, record: Record) -> None:
    """The guide must know the sampler's noise levels, as far as its guidance applies."""
    levels = np.asarray(stage.sampler.levels(stage.process).sigma)
    if interval := getattr(stage.guidance[index], "interval", ()):
        levels = levels[(levels > interval[0]) & (levels < interval[1])]
    least, most = record.stage.precondition.range
    # Rounding must not decide about a bound that is used as a level.
    unknown = levels[(levels < least * (1 - 1e-5)) | (levels > most * (1 + 1e-5))]
    if len(unknown):
        raise InputError(
            f"{record.field}: the guide knows noise levels from {least:.4g} to {most:.5g}, and the "
            f"sampler uses {unknown[0]:.5g}",
            f"Use guidance[{index}].interval=({least:.4g}, {most:.5g}), or other levels in the "
            "sampler.",
        )


def _check_same_classes(record: Record, classes: Classes) -> None:
    if not uses_classes(record.stage.condition_for(len(record.classes))):
        return
    if matched(record.classes, classes) != tuple(range(len(classes))):
        raise InputError(
            f"{record.field}: the guide knows the classes {record.classes}, the stage {classes}",
            "Use a guide of the same classes in the same order.",
        )


def _check_same_text(record: Record, text: TextSpec | None) -> None:
    """The guide gets the embeddings of the stage's prompts."""
    if record.text and not same_text(record.text, text):
        raise InputError(
            f"{record.field}: the guide knows text of {record.text}, the stage "
            f"{f'of {text}' if text else 'none'}",
            "Use a guide of the same encoder.",
        )


def _check_same_latents(record: Record, latents: LatentSpec | None) -> None:
    if record.latents != latents:
        raise InputError(
            f"{record.field}: the guide was trained on {latent_spec.shown(record.latents)}, the "
            f"stage on {latent_spec.shown(latents)}, or they were normalised by another set",
            "Use a guide of the same run.",
        )


def _check_same_channels(record: Record, channels: int) -> None:
    with _checkpoints(record) as checkpoints:
        saved = _shapes(checkpoints.abstract_ema(int(record.folder.name)))
    theirs = [n for n in (channels, 1, 3) if _shapes(record.network(n).abstract) == saved]
    if theirs and theirs[0] != channels:
        raise InputError(
            f"{record.field}: the guide makes images of {theirs[0]} channel(s), and "
            f"config.data.channels={channels}",
            f"Use a guide of images with {channels} channel(s).",
        )


def _shapes(abstract: Any) -> Any:
    """The shapes of a tree's arrays; what differs otherwise is found when they are restored."""
    return {
        name: _shapes(value) if isinstance(value, dict) else tuple(value.shape)
        for name, value in abstract.items()
    }
