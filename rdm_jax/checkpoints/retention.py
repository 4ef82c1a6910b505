"""Which checkpoints are kept, and how Orbax writes and deletes them."""

from collections.abc import Callable, Sequence
from typing import Any

from rdm_jax.runtime.lazy import lazy_import

ocp = lazy_import("orbax.checkpoint")

DELETED = ".deleted"  # where steps that are not kept are moved first


def manager_options(
    *,
    keep_newest: int,
    keep_best: int,
    merit: Callable[[dict[str, Any]], float],
    can_resume: Callable[[int], bool],
    before_commit: Callable[[], None],
    read_only: bool,
) -> Any:
    """Returns the `CheckpointManagerOptions` of a checkpoint manager.

    Args:
      keep_newest, keep_best: how many are kept.
      merit: ranks a checkpoint by its metrics; higher is better.
      can_resume: whether a step holds a training state; imported parameters are always kept.
      before_commit: called in process 0, when all of a step is written and before its folder gets
        its name.
      read_only: nothing is written or deleted.
    """
    # `BestN` on its own would delete the newest one.
    managers = ocp.checkpoint_managers
    keep = [managers.LatestN(keep_newest), _Imported(can_resume)]
    if keep_best:
        keep.append(managers.BestN(get_metric_fn=merit, n=keep_best))
    return ocp.CheckpointManagerOptions(
        preservation_policy=managers.AnyPreservationPolicy(keep),
        # Without `best_fn` Orbax does not write the metrics to disk.
        best_fn=lambda metrics: metrics["validation_loss"],
        best_mode="min",
        # A deleted step disappears at once, and is never seen in part.
        todelete_subdir=None if read_only else DELETED,
        cleanup_tmp_directories=not read_only,
        read_only=read_only,
        # Orbax warns of both unless they agree with `read_only`.
        create=not read_only,
        save_interval_steps=0 if read_only else 1,
        async_options=ocp.AsyncOptions(
            post_finalization_callback=before_commit,
            # Threads would wait ten minutes for a folder that cannot be created, and keep the
            # process from exiting.
            create_directories_asynchronously=False,
        ),
    )


class _Imported:
    """Orbax's `PreservationPolicy` that keeps imported parameters, which training cannot remake."""

    def __init__(self, can_resume: Callable[[int], bool]):
        self._can_resume = can_resume

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Returns for each checkpoint whether it is kept."""
        return [not self._can_resume(each.step) for each in checkpoints]
