"""The working directory of a run: its lock, its config.json, and the paths of everything in it."""

import contextlib
import errno
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from rdm_jax.checkpoints import averages, folders
from rdm_jax.config import Config, Stage, changes, parse, saved, to_dict
from rdm_jax.runtime import bucket_lock, distributed, locks, mounts
from rdm_jax.runtime.console import log
from rdm_jax.runtime.errors import InputError, remedy
from rdm_jax.runtime.files import atomic_write, local_path, log_write_errors, nearest

TOKEN = "token"  # of a run, in the folder of its lock in a bucket
SECONDS_TO_APPEAR = 60  # that a network file system may take to show the lock to other hosts
# Of a config, what all stages of a workdir share; the rest is compared stage by stage.
SHARED = ("seed", "data")


class Workdir:
    """The working directory of a run: a local folder, or one of a bucket.

    Creating the object writes nothing, and reads what small files the bucket has.

    Args:
      path: of the folder, which need not exist; or gs://BUCKET/FOLDER.

    Attributes:
      path: of the local folder, which may stand for one of a bucket (`mounts`).
      config_file: the config that the run was trained with, as JSON.
      captions: that the run was trained with, and held-out ones.
      contact_sheet: images of the training sets.
      report: folder of the report on evaluations.
      classifier: the network of the classifier's features, if this run has trained one.
      autoencoder: folder of the autoencoder, if this run has trained one.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = mounts.mounted(os.fspath(path)) if mounts.is_url(path) else Path(path)
        self.config_file = self.path / "config.json"
        self.captions = self.path / "captions.json"
        self.contact_sheet = self.path / "contact_sheet.png"
        self.report = self.path / "report"
        self.classifier = self.path / "classifier.safetensors"
        self.autoencoder = self.path / "autoencoder"
        self._lock = self.path / ".lock"

    @classmethod
    def from_flag(cls, path: str | os.PathLike[str], *, needed_by: str | None = None) -> "Workdir":
        """Returns the workdir that --workdir names, which is not created yet.

        Args:
          needed_by: what needs an existing run, such as '--mode=sample'; None if nothing does.

        Raises:
          InputError: the path is empty or a URL, or does not exist and is needed.
        """
        if not os.fspath(path).strip():
            raise InputError(
                "--workdir='' names no folder",
                "Pass the path of a folder, '.' for the current one.",
            )
        workdir = cls(path if mounts.is_url(path) else local_path(path, "--workdir"))
        if workdir._exists():
            return workdir
        similar = None if mounts.is_url(path) else nearest(workdir.path)
        if needed_by:
            fix = "Use the folder of a run, or train first (--mode=train)."
            raise InputError(
                f"{workdir} does not exist, and {needed_by} works on an existing run",
                f"Use --workdir={str(similar)!r}." if similar else fix,
            )
        if similar:
            log.warning("%s is a new run; %r exists", workdir, str(similar))
        return workdir

    def __str__(self) -> str:
        return f"--workdir={str(mounts.in_store(self.path))!r}"

    def _exists(self) -> bool:
        path = mounts.in_store(self.path)
        with mounts.talking_to(path):
            return path.exists()

    def stage(self, number: int) -> Path:
        """Returns the folder of a stage (from 1)."""
        return self.path / f"stage{number}"

    def checkpoints(self, number: int) -> mounts.AnyPath:
        """Returns the folder of a stage's checkpoints (from 1), which a bucket has itself."""
        return mounts.in_store(self.stage(number) / "checkpoints")

    def samples(self, config: Config) -> Path:
        """Returns the folder of the config's samples."""
        return self.path / config.sampling.name

    def evaluation(self, config: Config) -> Path:
        """Returns the folder of the config's evaluation."""
        return self.path / config.evaluation.name

    def outputs(self, config: Config) -> list[Path]:
        """Returns the folders that may hold images made by the run."""
        stages = [self.stage(stage.number) for stage in config.stages]
        return [*stages, self.samples(config), self.evaluation(config)]

    def stages_with_checkpoints(self, config: Config) -> list[int]:
        """Returns the numbers of the config's stages (from 1) that have checkpoints here."""
        numbers = [stage.number for stage in config.stages]
        return [number for number in numbers if self.checkpoints(number).is_dir()]

    def is_trained(self, number: int) -> bool:
        """Whether a stage (from 1) has been trained, as process 0 sees it. All must call it."""
        trained = distributed.is_primary() and folders.is_trained(self.checkpoints(number))
        return bool(distributed.from_primary(trained))

    def read_config(self) -> Config | None:
        """Returns the config in config.json; None if there is no such file."""
        return parse(saved.read_saved(self.config_file)) if self.config_file.exists() else None

    def write_config(self, config: Config) -> None:
        """Writes config.json atomically."""
        with atomic_write(self.config_file) as partial:
            saved.save_config(config, partial)

    def check_same_config(
        self, config: Config, *, trains: bool, allow_changes: Sequence[str] = ()
    ) -> None:
        """Refuses a config other than the one that the workdir was trained with.

        Imported weights alone do not bind the config.

        Args:
          trains: compare stages with their checkpoints too; sampling compares networks later.
          allow_changes: fields that may differ.

        Raises:
          InputError: names the fields that differ.
        """
        trained = [stage for stage in config.stages if self.is_trained(stage.number)]
        if not trained:
            return
        now = to_dict(config)
        if self.config_file.exists():
            before = saved.read_saved(self.config_file)
            found = changes.incompatible_changes(
                {key: before[key] for key in SHARED if key in before},
                {key: now[key] for key in SHARED},
            )
            changes.check_allowed(found, allow_changes, str(self))
        for stage in trained if trains else ():
            newest = folders.newest_trained(self.checkpoints(stage.number))
            if newest:  # else all are damaged, which training reports
                folder, about = newest
                stage_now = {"seed": config.seed, "stage": now[stage.name]}
                found = folders.changed_since(about, stage_now, stage.name)
                changes.check_allowed(found, allow_changes, f"checkpoint {folder}")

    def check_named_checkpoints(self, config: Config, training: Sequence[int]) -> None:
        """Refuses paths of checkpoints that are needed and missing, before anything is trained.

        Args:
          training: numbers of the stages that are going to be trained, from 1.

        Raises:
          InputError: names the field.
        """
        for stage in config.stages:
            if "/" in stage.checkpoint:
                folders.find(stage.checkpoint, Path(), f"config.{stage.name}.checkpoint")
            starts = not self.is_trained(stage.number) and stage.number in training
            start = stage.training.start_from
            if start and starts:
                folders.find(start, Path(), f"config.{stage.name}.training.start_from")

    def check_averages(self, stages: Sequence[Stage]) -> None:
        """Refuses averages that the checkpoints of these stages do not have.

        All processes must call it together.

        Raises:
          InputError: names the field, and what there is.
        """
        for stage in stages:
            if stage.average != "ema":
                field = f"config.{stage.name}.checkpoint"
                averages.choose(
                    stage, *folders.find(stage.checkpoint, self.checkpoints(stage.number), field)
                )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Creates the folder and keeps other runs out of it; the lock ends with process 0.

        All processes must enter it together. What is written meanwhile is in the bucket at the end.

        Raises:
          InputError: it cannot be written, is in use, or is not the same folder for all processes.
          OSError: what was written cannot be uploaded.
        """
        token = str(distributed.allgather(np.int32(time.time_ns() % 2**31))[0])
        with contextlib.ExitStack() as held:
            with distributed.raise_together():
                if distributed.is_primary():
                    held.enter_context(self._locked(token))
            with distributed.raise_together():
                if not self._shows(token):
                    raise InputError(
                        f"{self} is not the same for every process",
                        "Use a folder that all hosts share.",
                    )
                mounts.pull()
            try:
                yield
            except BaseException as error:
                if not getattr(error, "at_once", False):
                    with log_write_errors(self.path):
                        mounts.push()
                raise
            mounts.push()

    @contextmanager
    def _locked(self, token: str) -> Iterator[None]:
        lock = mounts.in_store(self._lock)
        with contextlib.ExitStack() as held:
            try:
                if isinstance(lock, Path):
                    self.path.mkdir(parents=True, exist_ok=True)
                    held.enter_context(locks.locked(lock))
                else:
                    held.enter_context(bucket_lock.locked(lock))
            except locks.InUse as error:
                whose = f" ({error})" if str(error) else ""
                raise InputError(
                    f"{self} is in use by another run{whose}", "Wait until that has ended."
                ) from error
            except OSError as error:
                raise InputError(
                    f"{self} cannot be written ({error.strerror})",
                    remedy(error, "Use another folder.")
                    if isinstance(lock, Path)
                    else mounts.ROLES,
                ) from error
            if isinstance(lock, Path):
                # Written in place: a renamed file would be another lock.
                with lock.open("r+") as file:
                    file.truncate(0)
                    file.write(token)
                    file.flush()
                    os.fsync(file.fileno())
            else:
                with mounts.talking_to(lock):
                    (lock / TOKEN).write_text(token)
            yield

    def _shows(self, token: str) -> bool:
        """Whether the lock has this text, which a network file system may show late."""
        lock = mounts.in_store(self._lock)
        lock = lock if isinstance(lock, Path) else lock / TOKEN
        for _ in range(SECONDS_TO_APPEAR):
            try:
                with mounts.talking_to(lock):
                    if lock.read_text() == token:
                        return True
            except OSError as error:
                # These pass, if another host has written it a moment ago.
                if not isinstance(error, FileNotFoundError) and error.errno != errno.ESTALE:
                    raise
            time.sleep(1)
        return False
