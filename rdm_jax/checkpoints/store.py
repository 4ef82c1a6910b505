"""Checkpoints with Orbax: asynchronous, atomic, the newest and the best kept; all that a bit-exact
resume needs.

A step's folder is there whole or not at all, with the checksums of its files, and is compared with
them before it is read.
"""

import errno
import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from rdm_jax.checkpoints.checksums import damage, write_checksums
from rdm_jax.checkpoints.folders import (
    RETRAIN,
    is_whole,
    rank,
    read_about,
    set_damaged_aside,
    step_folders,
)
from rdm_jax.config.saved import about_now
from rdm_jax.runtime import distributed
from rdm_jax.runtime.console import log
from rdm_jax.runtime.errors import InputError, reason
from rdm_jax.runtime.lazy import lazy_import
from rdm_jax.training.step import TrainState

ocp = lazy_import("orbax.checkpoint")

DELETED = ".deleted"  # where steps are moved that are not kept
SECONDS_TO_APPEAR = 120  # that a file system on a network may take to show other hosts a new folder


class Checkpoints:
    """The checkpoints of one stage: a folder a step, with the items

    'train' (parameters, moments, counters), 'ema' (the averaged parameters, all that sampling
    reads) and 'about' (JSON: the stage's config, classes, validation loss and what it was measured
    on, and the data iterator's state).

    Args:
      directory: of the stage's checkpoints. Unless `read_only`, those that are damaged are moved
        out of it if others are not.
      keep_newest, keep_best: how many are kept.
      max_failed_saves: how many saves in a row may fail, as on a full disk, and be given up.

    Raises:
      InputError: the checkpoints in `directory` are damaged.
    """

    def __init__(
        self,
        directory: Path,
        *,
        keep_newest: int = 1,
        keep_best: int = 0,
        max_failed_saves: int = 0,
        read_only: bool = False,
    ):
        self.directory, self._sound, self._validated_on = directory, set(), None
        self._saving, self._lost, self._failed, self._max_failed = None, None, 0, max_failed_saves
        if not read_only:
            with distributed.raise_together():
                sound = set_damaged_aside(directory) if distributed.is_primary() else None
            self._empty_bin()
            # It was read as a whole just now, and need not be again before it is restored.
            self._sound = {distributed.from_primary(-1 if sound is None else sound)}
        # The newest alone would be deleted by a policy of the best alone, so both kinds are kept.
        managers = ocp.checkpoint_managers
        keep = [managers.LatestN(keep_newest), _Imported(self)]
        if keep_best:
            best = managers.BestN(get_metric_fn=self._merit, n=keep_best)
            keep.append(best)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=managers.AnyPreservationPolicy(keep),
            best_fn=lambda m: m[
                "validation_loss"
            ],  # without it, Orbax does not write the metrics to disk
            best_mode="min",
            todelete_subdir=None
            if read_only
            else DELETED,  # a step goes at once, and is never there in part
            cleanup_tmp_directories=not read_only,
            read_only=read_only,
            async_options=ocp.AsyncOptions(
                # Once everything is written, and before the folder gets its name; in the first
                # process alone.
                post_finalization_callback=self._write_checksums,
                # Threads would wait for ten minutes for a folder that cannot be made, and keep the
                # process from ending.
                create_directories_asynchronously=False,
            ),
        )
        arrays, json = ocp.PyTreeCheckpointHandler, ocp.JsonCheckpointHandler
        handlers = {"train": arrays(), "ema": arrays(), "about": json()}
        try:  # it reads the metrics of every checkpoint
            self._manager = ocp.CheckpointManager(
                directory.resolve(), options=options, item_handlers=handlers
            )
        except Exception as error:
            found = {
                folder: damage(folder, thorough=False) for folder in sorted(step_folders(directory))
            }
            which = next(
                (f"{folder} is damaged ({what})" for folder, what in found.items() if what), ""
            )
            which = which or f"in {directory} cannot be read ({reason(error)})"
            raise InputError(
                f"checkpoint {which}; moving the damaged step's folder away would do."
            ) from error
        # Held open: file systems on a network may number a folder anew when the kernel has
        # forgotten it.
        self._place = None if read_only else os.open(directory, os.O_RDONLY)

    def steps(self) -> list[int]:
        """The steps of all complete checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def newest(self) -> int | None:
        """The newest step, as the first process sees it; None where there is none. All processes
        must call it together.

        Raises:
          InputError: the folder is another one here: after two minutes, this process still sees
            another newest step.
        """
        step = distributed.from_primary(max(self.steps(), default=-1))
        with distributed.raise_together():
            for _ in range(SECONDS_TO_APPEAR):
                if max(self.steps(), default=-1) == step:
                    break
                time.sleep(1)
                self._manager.reload()
            else:
                seen = max(self.steps(), default="none")
                would_do = "a folder that all hosts share"
                raise InputError(
                    f"{self.directory}: the first process sees checkpoint {step}, another {seen}; {would_do} would do."
                )
        return None if step == -1 else step

    def save(self, state: TrainState, about: dict[str, Any]) -> None:
        """Starts to save `state` in the background, after the save before it.

        Args:
          state: what to save; may be donated to the next step once this returns.
          about: JSON; 'validation_loss' in it ranks the checkpoint, below all others where it is
            None, among those that have the same 'validated_on': losses of different images say
            nothing of which is better.

        Raises:
          OSError: the save before this one, or the beginning of this one, has failed, and no more
            may.
        """
        self.wait()
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        train = {k: v for k, v in vars(state).items() if k != "ema"}
        args = ocp.args.Composite(
            train=_saving(train), ema=_saving(state.ema), about=ocp.args.JsonSave(about)
        )
        self._save(step, args, about)

    def save_ema(self, step: int, ema: Any, about: dict[str, Any]) -> None:
        """Saves averaged parameters alone, enough to sample and to start from, and waits until they
        are on disk.

        Args:
          about: like that of `save`, without a validation loss.
        """
        args = ocp.args.Composite(ema=_saving(ema), about=ocp.args.JsonSave(about))
        self._save(step, args, about)  # any that is trained from here is better
        self.wait()

    def can_resume(self, step: int) -> bool:
        """Whether the checkpoint holds a whole training state, and not averaged parameters
        alone."""
        return is_whole(self.directory / str(step))

    def abstract_ema(self, step: int) -> dict[str, Any]:
        """The shapes and dtypes of the averaged parameters in a checkpoint, as float32. Raises
        InputError when it is damaged."""
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
        restored = self._read(step, args, {"ema": abstract.ema, "train": train})
        return TrainState(**restored.train, ema=restored.ema), self._about(step, restored)

    def restore_ema(self, step: int, abstract: Any) -> tuple[Any, dict[str, Any]]:
        """The averaged parameters alone, like `abstract`, and what is `about` them. Raises
        InputError like `restore`."""
        restored = self._read(step, {"ema": _restoring(abstract)}, {"ema": abstract})
        return restored.ema, self._about(step, restored)

    def about(self, step: int) -> dict[str, Any]:
        """What is known of a checkpoint without reading its arrays. Raises InputError when it is
        damaged."""
        return read_about(self.directory / str(step), self._remedy(step), sound=step in self._sound)

    def _about(self, step: int, restored: Any) -> dict[str, Any]:
        return about_now(restored.about, f"checkpoint {self.directory / str(step)}")

    def _merit(self, metrics: dict[str, Any]) -> float:
        """The higher, the better, of what is on disk."""
        comparable = metrics.get("validated_on", self._validated_on) == self._validated_on
        return -metrics["validation_loss"] if comparable else -math.inf

    def _save(self, step: int, args: Any, about: dict[str, Any]) -> None:
        self._saving, self._validated_on = step, about.get("validated_on")
        metrics = {"validation_loss": rank(about), "validated_on": self._validated_on}
        try:
            self._check_place()
            self._manager.save(step, args=args, metrics=metrics)
        except Exception as error:
            self._give_up(error)

    def _check_place(self) -> None:
        """Raises OSError where the folder is gone, or another: Orbax makes it anew, and nobody
        would hear what is lost."""
        if not os.path.samestat(os.fstat(self._place), self.directory.stat()):
            raise OSError(
                errno.ESTALE,
                "what was saved before is not there any more: its folder is another one now",
            )

    def _write_checksums(self) -> None:
        """Adds the checksums to the folder that is being written."""
        partial = [
            folder for folder in self._partial() if folder.name.startswith(f"{self._saving}.")
        ]
        write_checksums(
            partial[0] if partial else self.directory / str(self._saving)
        )  # no other name on an object store

    def _partial(self) -> list[Path]:
        """The folders of saves that are under way, or were. One pattern for all steps: Python keeps
        every pattern it compiled."""
        return list(self.directory.glob("*.orbax-checkpoint-tmp*"))

    def _give_up(self, error: Exception) -> None:
        """Leaves nothing of a save that has failed, and says so. Raises OSError where no more may
        fail."""
        if distributed.is_lost_peer(error):  # which is no fault of the disk
            raise error
        for partial in self._partial():
            shutil.rmtree(partial, ignore_errors=True)
        if self.directory.is_dir():
            self._manager.reload()
        lost = OSError(errno.EIO, reason(error), str(self.directory / str(self._saving)))
        self._saving, self._lost, self._failed = None, lost, self._failed + 1
        if (
            self._failed > self._max_failed or jax.process_count() > 1
        ):  # others may wait for this process
            self._raise_lost(error)
        log.warning(
            "checkpoint %s cannot be written: %s; training goes on without it",
            lost.filename,
            lost.strerror,
        )

    def _raise_lost(self, error: Exception | None = None) -> None:
        lost, self._lost = self._lost, None
        if lost:
            raise lost from error

    def _read(self, step: int, args: dict[str, Any], networks: dict[str, Any]) -> Any:
        with self._readable(step):
            self._check_sound(step)
            for name, abstract in networks.items():
                self._same_network(step, name, abstract)
            return self._manager.restore(
                step, args=ocp.args.Composite(**args, about=ocp.args.JsonRestore())
            )

    def _check_sound(self, step: int) -> None:
        """Raises InputError where a file of a checkpoint is not as it was written."""
        if step in self._sound:
            return
        with distributed.raise_together():
            found = damage(self.directory / str(step)) if distributed.is_primary() else ""
            if found:
                raise InputError(
                    f"checkpoint {self.directory / str(step)} is damaged ({found}); {self._remedy(step)} would do."
                )
        self._sound |= {step}

    def _remedy(self, step: int) -> str:
        others = [s for s in self.steps() if s != step]
        return f"moving it away, so that step {others[-1]} is the newest," if others else RETRAIN

    @contextmanager
    def _readable(self, step: int) -> Iterator[None]:
        """Turns whatever a library says of a damaged checkpoint into one sentence."""
        try:
            yield
        except InputError:
            raise
        except (
            Exception
        ) as error:  # Orbax, TensorStore and JSON each report damage in their own way.
            where = f"checkpoint {self.directory / str(step)}"
            raise InputError(
                f"{where} cannot be read ({reason(error)}); {self._remedy(step)} would do."
            ) from error

    def _same_network(self, step: int, name: str, abstract: Any) -> None:
        exact = (
            name == "train"
        )  # averaged parameters are read as float32, whatever they were imported as
        saved, wanted = (
            _shapes(tree, exact)
            for tree in (_tree(self._manager.item_metadata(step)[name]), abstract)
        )
        for path in sorted(saved.keys() | wanted.keys()):
            if saved.get(path) != wanted.get(path):
                had, needs = saved.get(path, "nothing"), wanted.get(path, "nothing")
                raise InputError(
                    f"checkpoint {self.directory / str(step)} is of another network ({path} is {had} there, {needs} here); "
                    "the config that it was trained with would do."
                )

    def wait(self) -> None:
        """Blocks until the save under way is on disk. Raises OSError where it has failed, and no
        more may."""
        try:
            self._manager.wait_until_finished()
            if self._saving is not None:
                self._check_place()  # the folder may have gone while this save began
                self._saving, self._lost, self._failed = None, None, 0
        except Exception as error:  # Orbax, TensorStore and the system each have their own
            return self._give_up(error)
        self._empty_bin()

    def _empty_bin(self) -> None:
        """Deletes what retention has taken from among the steps."""
        if not distributed.is_primary():
            return
        shutil.rmtree(self.directory / DELETED, ignore_errors=True)

    def close(self) -> None:
        """Waits and lets go of the folder. Raises OSError where the last save has failed."""
        try:
            self.wait()
        finally:
            self._manager.close()
            if self._place is not None:
                os.close(self._place)
                self._place = None
        self._raise_lost()


class _Imported:
    """Keeps what was imported: training goes on from it, and could not make it again."""

    def __init__(self, checkpoints: Checkpoints):
        self._checkpoints = checkpoints

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        """Orbax's `PreservationPolicy`."""
        return [not self._checkpoints.can_resume(each.step) for each in checkpoints]


def _saving(tree: Any) -> Any:
    # Orbax gathers a file in memory before it writes it, 2 GiB unless told otherwise.
    return ocp.args.PyTreeSave(tree, ocdbt_target_data_file_size=16 * 2**20)


def _restoring(abstract: Any) -> Any:
    return ocp.args.PyTreeRestore(
        abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract)
    )


def _tree(metadata: Any) -> Any:
    """An item's shapes and dtypes; older versions of Orbax wrap them."""
    return metadata.tree if hasattr(metadata, "tree") else metadata


def _shapes(tree: Any, exact: bool) -> dict[str, str]:
    """Shape and, if that is to be exact, dtype of every leaf by its path, as Orbax spells it: of
    dicts and lists alone."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    name = lambda part: str(getattr(part, "key", getattr(part, "idx", getattr(part, "name", part))))  # noqa: E731
    return {
        "/".join(
            map(name, path)
        ): f"{f'{jnp.dtype(leaf.dtype)} ' if exact else ''}{tuple(leaf.shape)}"
        for path, leaf in leaves
    }


def with_sharding(abstract: Any, sharding: NamedSharding) -> Any:
    """Adds a sharding to every leaf of an abstract tree."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), abstract
    )


def check_space(directory: Path, abstract: TrainState, copies: int) -> None:
    """Refuses to start where so many checkpoints do not fit. Raises InputError."""
    need = copies * sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract))
    free = shutil.disk_usage(directory).free
    if free < need:
        raise InputError(
            f"{directory} has {free / 2**30:.3g} GiB free, and {copies} checkpoints take {need / 2**30:.3g} GiB; another "
            "workdir, or fewer in training.keep_newest and keep_best, would do."
        )
