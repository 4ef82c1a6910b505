"""Where a stage's training starts: the newest checkpoint, given parameters, or random ones."""

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from rdm_jax.checkpoints import folders, store
from rdm_jax.config.changes import check_allowed
from rdm_jax.data import latent_spec
from rdm_jax.data.classes import Classes, matched, of_checkpoint
from rdm_jax.data.text_table import same_text, spec_of
from rdm_jax.runtime import sharding
from rdm_jax.runtime.console import log
from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.mounts import AnyPath
from rdm_jax.training.count import Count
from rdm_jax.training.program import Program, Trained
from rdm_jax.training.step import TrainState

# What a checkpoint records of the training before it, which all later ones repeat.
HISTORY = ("started_from", "changes", "count")


class Progress(NamedTuple):
    """How far a training is.

    Attributes:
      state: the training state, as checkpoints hold it.
      step: steps taken.
      data: the data iterator's state.
    """

    state: TrainState
    step: int
    data: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Start:
    """Where a training starts.

    Attributes:
      progress: how far it is.
      history: what its checkpoints will say of the training so far (`HISTORY`).
      before: counts the images of the steps taken so far.
      count: counts the images of the steps to come.
    """

    progress: Progress
    history: dict[str, Any]
    before: Count
    count: Count


@dataclasses.dataclass(frozen=True)
class Starter:
    """What the start of a stage's training depends on, besides its checkpoints.

    Attributes:
      name: of the stage, such as 'stage1'.
      stage: its config.
      about: what the checkpoints of this training say of themselves.
      program: the training step.
      key: of the random parameters.
      allow_changes: fields of the config that may differ from the newest checkpoint's.
    """

    name: str
    stage: Trained
    about: dict[str, Any]
    program: Program
    key: Key[Array, ""]
    allow_changes: Sequence[str]

    def start(self, checkpoints: store.Checkpoints) -> Start:
        """Resumes from the newest training state, or initialises one.

        Raises:
          InputError: a checkpoint is damaged, or of another config.
        """
        newest = checkpoints.newest()
        if newest is not None and checkpoints.can_resume(newest):
            return self._resume(checkpoints, newest)
        log.info(
            "%s: %s parameters, %d x %d pixels",
            self.name,
            f"{self.program.objective.network.num_parameters:,}",
            *self.stage.resolution,
        )
        state, history = self.program.init(self.key), {}
        if newest is not None:
            state, history = self._with_parameters(state, checkpoints, newest)
        elif self.stage.training.start_from:
            folder, step = folders.find(
                self.stage.training.start_from,
                checkpoints.directory.parent,
                f"config.{self.name}.training.start_from",
            )
            with contextlib.closing(store.Checkpoints(folder, read_only=True)) as source:
                state, history = self._with_parameters(state, source, step)
        count = Count(self.stage.training.batch_size)
        return Start(Progress(state, 0, {"next_index": 0}), history, before=count, count=count)

    def _resume(self, checkpoints: store.Checkpoints, step: int) -> Start:
        training, about = self.stage.training, checkpoints.about(step)
        self._check_text(about, checkpoints.directory / str(step))
        self._check_latents(about, checkpoints.directory / str(step))
        before = Count(about["stage"]["training"]["batch_size"], **about.get("count", {}))
        count = before.changed(training.batch_size, step)

        # Changes: refused, unless they are allowed.
        found = folders.changed_since(about, self.about, self.name)
        if before.images_at(step) >= training.images:
            # Nothing more is trained, so that other images do not matter.
            found = [change for change in found if not change.field.startswith("config.data.")]
        check_allowed(found, self.allow_changes, f"checkpoint {checkpoints.directory / str(step)}")

        # History: that of the checkpoint, and what changes now.
        history = {name: about[name] for name in HISTORY if name in about}
        if found:
            changes = [{"step": step, **change._asdict()} for change in found]
            history["changes"] = [*history.get("changes", []), *changes]
        if count.step:
            history["count"] = {"step": count.step, "images": count.images}

        # State: a run that diverged may try again.
        state, _ = checkpoints.restore(step, self.program.abstract)
        state = state.replace(skipped_in_a_row=jnp.zeros_like(state.skipped_in_a_row))
        images = count.images_at(step)
        if step < count.steps_for(training.images):
            for change in found:
                log.warning(
                    "%s: from step %d (%s images) on, %s", self.name, step, f"{images:,}", change
                )
            log.info("%s: resuming from %s images", self.name, f"{images:,}")
        return Start(Progress(state, step, about["data"]), history, before=before, count=count)

    def _with_parameters(
        self, state: TrainState, source: store.Checkpoints, step: int
    ) -> tuple[TrainState, dict[str, Any]]:
        """Replaces random parameters by EMA parameters of another training.

        The class embedding stays random unless both have the same classes.

        Returns:
          The state, and its history.
        """
        theirs, about = source.abstract_ema(step), source.about(step)
        self._check_text(about, source.directory / str(step))
        self._check_latents(about, source.directory / str(step))
        wanted = dict(self.program.abstract.ema)
        names = self.stage.network.condition_parameters
        embedding = {name: theirs[name] for name in names if name in theirs}
        ours = {name: wanted[name] for name in names if name in wanted}
        same_classes = self._same_classes(embedding, ours, about)
        if not same_classes:
            wanted = {name: part for name, part in wanted.items() if name not in names}
            wanted |= sharding.by_rules(embedding, self.program.mesh)
            log.info(
                "%s: class embedding re-initialised: the dataset's classes differ from the "
                "checkpoint's",
                self.name,
            )
        loaded, about = source.restore_ema(step, wanted)
        path = source.directory / str(step)
        started_from = {"checkpoint": str(path)}
        if "imported" in about:
            started_from["imported"] = about["imported"]
        if about["stage"]["precondition"] != self.about["stage"]["precondition"]:
            log.info(
                "%s: the parameters were trained with another preconditioning (%s)",
                self.name,
                about["stage"]["precondition"],
            )
        ema = {
            name: loaded[name] if name in loaded and (same_classes or name not in names) else new
            for name, new in state.ema.items()
        }
        log.info("%s: starting with the parameters in %s", self.name, path)
        state = state.replace(params=jax.tree.map(jnp.copy, ema), ema=ema)
        return state, {"started_from": started_from}

    def _check_text(self, about: dict[str, Any], checkpoint: AnyPath) -> None:
        """Refuses a checkpoint that knows the captions of another encoder."""
        theirs, ours = spec_of(about), spec_of(self.about)
        if theirs and not same_text(theirs, ours):
            raise InputError(
                f"{self.name} is trained with captions of {ours or 'no encoder'}, and checkpoint "
                f"{checkpoint} knows those of {theirs}",
                "Use images whose captions that encoder has embedded, or another checkpoint.",
            )

    def _check_latents(self, about: dict[str, Any], checkpoint: AnyPath) -> None:
        """Refuses a checkpoint that was trained on the latents of another autoencoder."""
        theirs, ours = (latent_spec.spec_of(each) for each in (about, self.about))
        if "imported" not in about and (theirs and theirs[0]) != (ours and ours[0]):
            raise InputError(
                f"{self.name} is trained on {latent_spec.shown(ours)}, and checkpoint {checkpoint} "
                f"was trained on {latent_spec.shown(theirs)}",
                "Set data.autoencoder to what it was trained with, or use another checkpoint.",
            )

    def _same_classes(self, theirs: Any, ours: Any, about: dict[str, Any]) -> bool:
        """Whether another training's class embedding has our shapes and our classes in order."""
        if jax.tree.map(lambda x: x.shape, theirs) != jax.tree.map(lambda x: x.shape, ours):
            return False
        names = tuple(self.about["classes"])
        return matched(Classes(names), of_checkpoint(about)) == tuple(range(len(names)))
