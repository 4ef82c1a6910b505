"""The snapshots of a stage's averages, which are saved along its training and stay."""

from typing import Any

from rdm_jax.checkpoints import averages, store
from rdm_jax.config import Training
from rdm_jax.runtime.mounts import AnyPath
from rdm_jax.training.count import Count
from rdm_jax.training.step import TrainState


class Snapshots:
    """The snapshots of one stage; a training without averages has none.

    A resumed run ends with the snapshots of one that was not interrupted, bit for bit: those before
    a checkpoint are on disk before it is saved, and `resume` attends to the others.

    Args:
      checkpoints: folder of the stage's checkpoints.
      training: of the stage.
    """

    def __init__(self, checkpoints: AnyPath, training: Training):
        self._training = training
        self._store = None
        if training.averages:
            self._store = store.Checkpoints(
                averages.snapshots_of(checkpoints), max_failed_saves=training.max_failed_saves
            )

    def is_due(self, count: Count, step: int) -> bool:
        """Whether a step has a snapshot: every `snapshot_every` images, and at the end."""
        if self._store is None or step == 0:
            return False
        at_end = step == count.steps_for(self._training.images)
        return at_end or count.is_due(step, self._training.snapshot_every)

    def to_come(self, count: Count, step: int) -> int:
        """Number of snapshots after a step, up to one too many."""
        if self._store is None:
            return 0
        every, end = self._training.snapshot_every, count.steps_for(self._training.images)
        return count.images_at(end) // every - count.images_at(step) // every + 1

    def resume(self, count: Count, state: TrainState, about: dict[str, Any]) -> None:
        """Prepares for a training from a state on.

        Deletes the snapshots of lost work, which is done again and may be another training's; saves
        that of the state, if it is due and the run ended before it was saved.

        Args:
          count: of the images until then.
          state: to begin with.
          about: of the snapshot, as in checkpoints.
        """
        if self._store is not None:
            step = int(state.step)
            self._store.delete_after(step)
            if self.is_due(count, step):
                self.save(state, about)

    def save(self, state: TrainState, about: dict[str, Any]) -> None:
        """Starts to save the averages, unless that is done. Raises OSError as checkpoints do."""
        if self._store is not None:
            self._store.save_averages(int(state.step), state.averages, about)

    def wait(self) -> None:
        """Waits until the current snapshot is on disk. Raises OSError as checkpoints do."""
        if self._store is not None:
            self._store.wait()

    def close(self) -> None:
        """Waits and releases the folder."""
        if self._store is not None:
            self._store.close()
