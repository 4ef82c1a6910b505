"""Checkpoints with Orbax: asynchronous, atomic, the newest and the best kept; all that a bit-exact resume needs."""

import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding
from orbax.checkpoint import checkpoint_managers

from rdm_jax.errors import InputError
from rdm_jax.training.step import TrainState


class Checkpoints:
    """The checkpoints of one stage: a folder a step, with the items

    'train' (parameters, moments, counters), 'ema' (the averaged parameters, all that sampling reads) and 'about' (JSON: the
    stage's config, classes, validation loss, and the data iterator's state).

    Raises:
      InputError: a checkpoint in `directory` is damaged.
    """

    def __init__(self, directory: Path, *, keep_newest: int = 1, keep_best: int = 0, read_only: bool = False):
        self.directory = directory
        # The newest alone would be deleted by a policy of the best alone, so both kinds are kept.
        keep = [checkpoint_managers.LatestN(keep_newest), _Imported(self)]
        if keep_best:
            best = checkpoint_managers.BestN(get_metric_fn=lambda m: -m["validation_loss"], n=keep_best)
            keep.append(best)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(keep),
            best_fn=lambda m: m["validation_loss"],  # without it, Orbax does not write the metrics to disk
            best_mode="min",
            cleanup_tmp_directories=not read_only,
            read_only=read_only,
        )
        arrays, json = ocp.PyTreeCheckpointHandler, ocp.JsonCheckpointHandler
        handlers = {"train": arrays(), "ema": arrays(), "about": json()}
        try:  # it reads the metrics of every checkpoint
            self._manager = ocp.CheckpointManager(directory.resolve(), options=options, item_handlers=handlers)
        except Exception as error:
            remedy = "moving the damaged step's folder away"
            raise InputError(f"a checkpoint in {directory} cannot be read ({_reason(error)}); {remedy} would do.") from error

    def steps(self) -> list[int]:
        """The steps of all complete checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, about: dict[str, Any]) -> None:
        """Starts to save `state` in the background; an error of the save before it surfaces here.

        Args:
          state: what to save; may be donated to the next step once this returns.
          about: JSON; 'validation_loss' in it ranks the checkpoint.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        train = {k: v for k, v in vars(state).items() if k != "ema"}
        self._manager.save(
            step,
            args=ocp.args.Composite(train=_saving(train), ema=_saving(state.ema), about=ocp.args.JsonSave(about)),
            metrics={"validation_loss": about["validation_loss"]},
        )

    def save_ema(self, step: int, ema: Any, about: dict[str, Any]) -> None:
        """Saves averaged parameters alone, enough to sample and to start from, and waits until they are on disk.

        Args:
          about: like that of `save`, without a validation loss.
        """
        self._manager.save(
            step,
            args=ocp.args.Composite(ema=_saving(ema), about=ocp.args.JsonSave(about)),
            metrics={"validation_loss": math.inf},  # any that is trained from here is better
        )
        self.wait()

    def can_resume(self, step: int) -> bool:
        """Whether the checkpoint holds a whole training state, and not averaged parameters alone."""
        return _is_whole(self.directory / str(step))

    def abstract_ema(self, step: int) -> dict[str, Any]:
        """The shapes and dtypes of the averaged parameters in a checkpoint, as float32. Raises InputError when it is damaged."""
        with self._readable(step):
            tree = _tree(self._manager.item_metadata(step)["ema"])
            return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), tree)

    def restore(self, step: int, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """A state like `abstract` (shapes, dtypes and shardings), and what is `about` it.

        Raises:
          InputError: the checkpoint is damaged or of another network.
        """
        train = {k: v for k, v in vars(abstract).items() if k != "ema"}
        args = {"train": _restoring(train), "ema": _restoring(abstract.ema)}
        restored = self._read(step, args, {"params": abstract.params, "ema": abstract.ema})
        return TrainState(**restored.train, ema=restored.ema), restored.about

    def restore_ema(self, step: int, abstract: Any) -> tuple[Any, dict[str, Any]]:
        """The averaged parameters alone, like `abstract`, and what is `about` them. Raises InputError like `restore`."""
        restored = self._read(step, {"ema": _restoring(abstract)}, {"ema": abstract})
        return restored.ema, restored.about

    def about(self, step: int) -> dict[str, Any]:
        """What is known of a checkpoint without reading its arrays. Raises InputError when it is damaged."""
        return self._read(step, {}, {}).about

    def _read(self, step: int, args: dict[str, Any], networks: dict[str, Any]) -> Any:
        with self._readable(step):
            for name, abstract in networks.items():
                self._same_network(step, name, abstract)
            return self._manager.restore(step, args=ocp.args.Composite(**args, about=ocp.args.JsonRestore()))

    @contextmanager
    def _readable(self, step: int) -> Iterator[None]:
        """Turns whatever a library says of a damaged checkpoint into one sentence."""
        try:
            yield
        except InputError:
            raise
        except Exception as error:  # Orbax, TensorStore and JSON each report damage in their own way.
            others = [s for s in self.steps() if s != step]
            remedy = (
                f"moving it away, so that step {others[-1]} is the newest," if others else "training again in another workdir"
            )
            where = f"checkpoint {self.directory / str(step)}"
            raise InputError(f"{where} cannot be read ({_reason(error)}); {remedy} would do.") from error

    def _same_network(self, step: int, name: str, abstract: Any) -> None:
        saved = _tree(self._manager.item_metadata(step)["ema" if name == "ema" else "train"])
        saved = _shapes(saved if name == "ema" else saved["params"])
        wanted = _shapes(abstract)
        for path in sorted(saved.keys() | wanted.keys()):
            if saved.get(path) != wanted.get(path):
                had, needs = saved.get(path, "nothing"), wanted.get(path, "nothing")
                raise InputError(
                    f"checkpoint {self.directory / str(step)} is of another network ({path} is {had} there, {needs} here); "
                    "the config that it was trained with would do."
                )

    def wait(self) -> None:
        """Blocks until every save is on disk; errors of the background surface here."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and lets go of the folder."""
        self._manager.close()


class _Imported:
    """Keeps what was imported: training goes on from it, and could not make it again."""

    def __init__(self, checkpoints: Checkpoints):
        self._checkpoints = checkpoints

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        """Orbax's `PreservationPolicy`."""
        return [not self._checkpoints.can_resume(each.step) for each in checkpoints]


def _is_whole(folder: Path) -> bool:
    return (folder / "train").exists()


def step_folders(directory: Path) -> list[Path]:
    """The folders of a stage's complete checkpoints; none where the stage has no directory yet."""
    return [child for child in directory.glob("*") if child.name.isdecimal()]


def is_trained(directory: Path) -> bool:
    """Whether a stage's checkpoints hold a training state, and not imported parameters alone."""
    return any(map(_is_whole, step_folders(directory)))


def _saving(tree: Any) -> ocp.args.PyTreeSave:
    # Orbax gathers a file in memory before it writes it, 2 GiB unless told otherwise.
    return ocp.args.PyTreeSave(tree, ocdbt_target_data_file_size=16 * 2**20)


def _restoring(abstract: Any) -> ocp.args.PyTreeRestore:
    return ocp.args.PyTreeRestore(abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract))


def _reason(error: Exception) -> str:
    """The first line of what a library says, cut to a length that fits a sentence."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _tree(metadata: Any) -> Any:
    """An item's shapes and dtypes; older versions of Orbax wrap them."""
    return metadata.tree if hasattr(metadata, "tree") else metadata


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {jax.tree_util.keystr(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def with_sharding(abstract: Any, sharding: NamedSharding) -> Any:
    """Adds a sharding to every leaf of an abstract tree."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), abstract)


def check_space(directory: Path, abstract: TrainState, copies: int) -> None:
    """Refuses to start where so many checkpoints do not fit. Raises InputError."""
    need = copies * sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract))
    free = shutil.disk_usage(directory).free
    if free < need:
        raise InputError(
            f"{directory} has {free / 2**30:.2f} GiB free, and {copies} checkpoints take {need / 2**30:.2f} GiB; another "
            "workdir, or fewer in training.keep_newest and keep_best, would do."
        )


def find(checkpoint: str, stage_directory: Path) -> tuple[Path, int]:
    """The folder of checkpoints and the step that a config's `checkpoint` means.

    Args:
      checkpoint: 'newest', 'best', the number of a step, or the path of a step's folder.
      stage_directory: where the run's own stage keeps its checkpoints.

    Raises:
      InputError: there is no such checkpoint.
    """
    path = Path(checkpoint).expanduser()
    if checkpoint not in ("newest", "best") and not checkpoint.isdecimal():
        if path.name.isdecimal() and path.is_dir():
            return path.parent, int(path.name)
        raise InputError(
            f"checkpoint={checkpoint!r} is no checkpoint; 'newest', 'best', a step, or the folder of a step would do."
        )
    steps = []
    if stage_directory.is_dir():
        checkpoints = Checkpoints(stage_directory, read_only=True)
        steps = checkpoints.steps()
        loss = {step: checkpoints.about(step).get("validation_loss", math.inf) for step in steps} if checkpoint == "best" else {}
        checkpoints.close()
    if not steps:
        raise InputError(f"there is no checkpoint in {stage_directory}; training this stage first would do (--mode train).")
    if checkpoint == "newest":
        return stage_directory, steps[-1]
    if checkpoint == "best":
        return stage_directory, min(steps, key=loss.__getitem__)
    if int(checkpoint) not in steps:
        known = ", ".join(map(str, steps))
        raise InputError(f"checkpoint={checkpoint!r} is not among those in {stage_directory}; one of {known} would do.")
    return stage_directory, int(checkpoint)
