"""Checkpoints with Orbax: asynchronous, atomic, the newest and the best kept.

They hold everything that a bit-exact resume needs. A step's folder appears complete, with the
checksums of its files, or not at all, and is compared with them before it is read.
"""

import errno
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from rdm_jax.checkpoints import trees
from rdm_jax.checkpoints.checksums import damage, write_checksums
from rdm_jax.checkpoints.folders import (
    RETRAIN,
    SECONDS_TO_APPEAR,
    absolute,
    being_saved,
    is_whole,
    rank,
    read_about,
    set_damaged_aside,
    unfinished,
    unreadable,
)
from rdm_jax.checkpoints.retention import DELETED, manager_options
from rdm_jax.config.saved import about_now
from rdm_jax.runtime import distributed, mounts
from rdm_jax.runtime.console import log, without_warnings_of_absl
from rdm_jax.runtime.errors import InputError, reason
from rdm_jax.runtime.files import log_write_errors
from rdm_jax.runtime.lazy import lazy_import
from rdm_jax.runtime.mounts import AnyPath

ocp = lazy_import("orbax.checkpoint")

# A training state: a dataclass of arrays with `step`, `ema`, `averages` and a method `replace`.
State = TypeVar("State", bound=Any)


class Checkpoints:
    """The checkpoints of one stage, one folder per step.

    Items of a step: 'train' (parameters, optimizer's moments, counters), 'ema' (the EMA
    parameters, all that sampling reads by default), 'averages' (further ones by name, if there are
    any) and 'about' (JSON: the stage's config, classes, validation loss and the images it was
    measured on, and the data iterator's state).

    Args:
      directory: of the stage's checkpoints. Unless `read_only`, damaged ones are moved out of it if
        another one is intact.
      keep_newest, keep_best: how many are kept.
      max_failed_saves: how many consecutive saves may fail (for example on a full disk) and be
        skipped.

    Raises:
      InputError: the checkpoints in `directory` are damaged.
    """

    def __init__(
        self,
        directory: AnyPath,
        *,
        keep_newest: int = 1,
        keep_best: int = 0,
        max_failed_saves: int = 0,
        read_only: bool = False,
    ):
        self.directory = directory
        self._sound: set[int] = set()  # steps that have been compared with their checksums
        self._validated_on = None
        self._saving: int | None = None
        self._lost: OSError | None = None
        self._failed = 0
        self._max_failed = max_failed_saves
        if not read_only:
            self._set_damaged_aside()
            self._empty_bin()
        options = manager_options(
            keep_newest=keep_newest,
            keep_best=keep_best,
            merit=self._merit,
            can_resume=self.can_resume,
            before_commit=self._write_checksums,
            read_only=read_only,
        )
        self._manager = self._open(options)
        # Held open, as a network file system may renumber a folder that the kernel has forgotten.
        self._descriptor = None  # a bucket has no folders
        if isinstance(directory, Path) and not read_only:
            self._descriptor = os.open(directory, os.O_RDONLY)

    def _set_damaged_aside(self) -> None:
        with distributed.raise_together():
            sound = set_damaged_aside(self.directory) if distributed.is_primary() else None
        # All its files have just been read: `restore` need not read them again.
        self._sound = {distributed.from_primary(-1 if sound is None else sound)}

    def _open(self, options: Any) -> Any:
        """Returns Orbax's manager of the checkpoints."""
        handlers = {
            "train": ocp.PyTreeCheckpointHandler(),
            "ema": ocp.PyTreeCheckpointHandler(),
            "averages": ocp.PyTreeCheckpointHandler(),
            "about": ocp.JsonCheckpointHandler(),
        }
        try:  # it reads the metrics of all checkpoints
            with without_warnings_of_absl():  # that nothing is written, if `read_only`
                return ocp.CheckpointManager(
                    absolute(self.directory), options=options, item_handlers=handlers
                )
        except Exception as error:
            raise unreadable(self.directory, error) from error

    def steps(self) -> list[int]:
        """Returns the steps of all complete checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def newest(self) -> int | None:
        """Returns the newest step as process 0 sees it, or None. All must call it together.

        Raises:
          InputError: after two minutes this process still sees another newest step, so that its
            folder is another one.
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
                raise InputError(
                    f"{self.directory}: process 0 sees checkpoint {step}, another one {seen}",
                    "Use a folder that all hosts share.",
                )
        return None if step == -1 else step

    def save(self, state: Any, about: dict[str, Any]) -> None:
        """Starts to save a training state in the background, after the previous save has ended.

        Args:
          state: may be donated to the next step once this returns.
          about: JSON. Its 'validation_loss' ranks the checkpoint (None is worst) among those with
            the same 'validated_on': losses on different images are not comparable.

        Raises:
          OSError: the previous save, or the start of this one, failed, and no more may fail.
        """
        self.wait()
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        items = {name: trees.save_args(item) for name, item in trees.items(state).items()}
        self._save(step, ocp.args.Composite(**items, about=ocp.args.JsonSave(about)), about)

    def save_ema(self, step: int, ema: Any, about: dict[str, Any]) -> None:
        """Saves EMA parameters only, to sample and to start from, and waits for the disk.

        Args:
          about: as for `save`, without a validation loss: any checkpoint trained from here ranks
            better.
        """
        args = ocp.args.Composite(ema=trees.save_args(ema), about=ocp.args.JsonSave(about))
        self._save(step, args, about)
        self.wait()

    def save_averages(self, step: int, averages: dict[str, Any], about: dict[str, Any]) -> None:
        """Starts to save averages only, as `save` does; unless the step has been saved."""
        self.wait()
        if step not in self._manager.all_steps():
            item = trees.save_args(averages)
            args = ocp.args.Composite(averages=item, about=ocp.args.JsonSave(about))
            self._save(step, args, about)

    def delete_after(self, step: int) -> None:
        """Deletes what is newer than a step. All processes must call it together."""
        for newer in [other for other in self.steps() if other > step]:
            self._manager.delete(newer)
        self._empty_bin()

    def can_resume(self, step: int) -> bool:
        """Whether the checkpoint holds a training state, not only EMA parameters."""
        return is_whole(self.directory / str(step))

    def abstract_ema(self, step: int) -> dict[str, Any]:
        """Returns the shapes of a checkpoint's EMA parameters, with dtype float32.

        Raises:
          InputError: it is damaged.
        """
        with self._readable(step):
            tree = trees.unwrapped(self._manager.item_metadata(step)["ema"])
            return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), tree)

    def restore(self, step: int, abstract: State) -> tuple[State, dict[str, Any]]:
        """Restores a training state with the shapes, dtypes and shardings of `abstract`.

        Returns:
          The state, and its 'about'.

        Raises:
          InputError: the checkpoint is damaged or of another network.
        """
        items = trees.items(abstract)
        args = {name: trees.restore_args(trees.spread(item)) for name, item in items.items()}
        read = self._read(step, args, items)
        restored = trees.gathered({name: read[name] for name in items}, items)
        return abstract.replace(**restored.pop("train"), **restored), self._about(step, read)

    def restore_ema(self, step: int, abstract: Any) -> tuple[Any, dict[str, Any]]:
        """Restores EMA parameters only, and 'about'. Raises InputError like `restore`."""
        restored = self._read(step, {"ema": trees.restore_args(abstract)}, {"ema": abstract})
        return restored.ema, self._about(step, restored)

    def restore_part(self, step: int, item: str, name: str, abstract: Any) -> Any:
        """Restores one of the trees of an item, such as 'params' of 'train', and nothing else.

        Raises:
          InputError: the checkpoint is damaged or of another network.
        """
        part = {name: abstract}
        args = {item: trees.restore_args(part, part=True)}
        return self._read(step, args, {item: part}, part=True)[item][name]

    def about(self, step: int) -> dict[str, Any]:
        """Returns 'about' of a checkpoint. Raises InputError if it is damaged."""
        return read_about(self.directory / str(step), self._fix(step), sound=step in self._sound)

    def _about(self, step: int, restored: Any) -> dict[str, Any]:
        return about_now(restored.about, f"checkpoint {self.directory / str(step)}")

    def _merit(self, metrics: dict[str, Any]) -> float:
        """Orbax's ranking (higher is better) of the metrics on disk."""
        comparable = metrics.get("validated_on", self._validated_on) == self._validated_on
        return -metrics["validation_loss"] if comparable else -math.inf

    def _save(self, step: int, args: Any, about: dict[str, Any]) -> None:
        self._saving = step
        self._validated_on = about.get("validated_on")
        metrics = {"validation_loss": rank(about), "validated_on": self._validated_on}
        mounts.check_owned(self.directory)
        try:
            self._check_directory()
            if self._failed:  # the store may have been away
                self._remove_unfinished()
            self._manager.save(step, args=args, metrics=metrics)
        except Exception as error:
            self._give_up(error)

    def _check_directory(self) -> None:
        """Raises OSError if the directory was deleted or replaced.

        Orbax would silently recreate it, hiding the loss of earlier checkpoints.
        """
        if self._descriptor is None:
            return
        if not os.path.samestat(os.fstat(self._descriptor), self.directory.stat()):
            raise OSError(
                errno.ESTALE, "the directory was replaced, and earlier checkpoints are gone"
            )

    def _write_checksums(self) -> None:
        """Adds the checksums to the folder that is being written.

        A bucket gets the metrics until then first: those of a resumed run have no gap.
        """
        with log_write_errors(self.directory):
            mounts.push()
        assert self._saving is not None
        write_checksums(being_saved(self.directory, self._saving))

    def _give_up(self, error: Exception) -> None:
        """Removes and logs a save that failed. Raises OSError if no more may fail."""
        if distributed.is_lost_peer(error):  # not the disk's fault
            raise error
        mounts.check_owned(self.directory)
        with suppress(OSError):
            self._remove_unfinished()
        lost = OSError(errno.EIO, reason(error), str(self.directory / str(self._saving)))
        self._saving = None
        self._lost = lost
        self._failed += 1
        # With several processes the others may be waiting for this one.
        if self._failed > self._max_failed or jax.process_count() > 1:
            self._raise_lost(error)
        log.warning(
            "checkpoint %s cannot be written: %s; training continues", lost.filename, lost.strerror
        )

    def _remove_unfinished(self) -> None:
        with mounts.talking_to(self.directory):
            for partial in unfinished(self.directory):
                mounts.remove_folder(partial)
            if self.directory.is_dir():
                self._manager.reload()

    def _raise_lost(self, error: Exception | None = None) -> None:
        lost, self._lost = self._lost, None
        if lost:
            raise lost from error

    def _read(
        self, step: int, args: dict[str, Any], expected: dict[str, Any], *, part: bool = False
    ) -> Any:
        with self._readable(step):
            self._check_sound(step)
            for item, abstract in expected.items():
                saved = trees.unwrapped(self._manager.item_metadata(step)[item])
                trees.check_same_shapes(
                    {name: saved[name] for name in abstract if name in saved} if part else saved,
                    abstract,
                    # EMA parameters are restored as float32, in whatever dtype they were imported.
                    dtypes=item == "train",
                    where=f"checkpoint {self.directory / str(step)}",
                )
            return self._manager.restore(
                step, args=ocp.args.Composite(**args, about=ocp.args.JsonRestore())
            )

    def _check_sound(self, step: int) -> None:
        """Raises InputError if a file of a checkpoint does not match its checksum."""
        if step in self._sound:
            return
        folder = self.directory / str(step)
        with distributed.raise_together():
            found = damage(folder) if distributed.is_primary() else ""
            if found:
                raise InputError(f"checkpoint {folder} is damaged ({found})", self._fix(step))
        self._sound |= {step}

    def _fix(self, step: int) -> str:
        """What to do about a damaged step."""
        others = [other for other in self.steps() if other != step]
        return f"Move it away, so that step {others[-1]} is the newest." if others else RETRAIN

    @contextmanager
    def _readable(self, step: int) -> Iterator[None]:
        """Turns any library's error about a damaged checkpoint into an InputError."""
        try:
            yield
        except InputError:
            raise
        except Exception as error:  # Orbax, TensorStore and JSON each raise their own
            where = f"checkpoint {self.directory / str(step)}"
            raise InputError(
                f"{where} cannot be read ({reason(error)})", self._fix(step)
            ) from error

    def wait(self) -> None:
        """Waits until the current save is on disk.

        Raises:
          OSError: it failed, and no more may fail.
        """
        try:
            self._manager.wait_until_finished()
            if self._saving is not None:
                self._check_directory()  # it may have gone while this save began
                self._saving = None
                self._lost = None
                self._failed = 0
        except Exception as error:  # Orbax, TensorStore and the system each raise their own
            return self._give_up(error)
        self._empty_bin()

    def _empty_bin(self) -> None:
        """Deletes the steps that were not kept."""
        if not distributed.is_primary():
            return
        if isinstance(self.directory, Path):
            mounts.remove_folder(self.directory / DELETED)

    def close(self) -> None:
        """Waits and releases the directory. Raises OSError if the last save failed."""
        try:
            self.wait()
        finally:
            self._manager.close()
            if self._descriptor is not None:
                os.close(self._descriptor)
                self._descriptor = None
        self._raise_lost()


def with_sharding(abstract: Any, sharding: NamedSharding) -> Any:
    """Adds a sharding to every leaf of an abstract tree."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), abstract
    )
