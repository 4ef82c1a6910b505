"""A run from config to samples, part by part; what `main` does, for notebooks too."""

import contextlib
import functools
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from rdm_jax import config as configs
from rdm_jax.checkpoints import folders as checkpoint_folders
from rdm_jax.config import Config, changes, saved, validate
from rdm_jax.data.image_sets import ImageSet
from rdm_jax.evaluation.evaluator import Evaluator, generates, needs_data
from rdm_jax.evaluation.report import write_report
from rdm_jax.interop.import_export import (
    check_no_checkpoints,
    export_stage,
    fit_resolutions,
    open_weights,
    read_parameters,
    save_imported,
    stage_of,
)
from rdm_jax.render import contact_sheet
from rdm_jax.runtime import distributed, locks
from rdm_jax.runtime.console import log
from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.files import atomic_write, local_path, nearest
from rdm_jax.runtime.signals import StopOnSignal
from rdm_jax.sampling.earlier import check_settings
from rdm_jax.sampling.low_images import LowImages
from rdm_jax.sampling.pipeline import RelayPipeline
from rdm_jax.sampling.stage_preview import StagePreview
from rdm_jax.sampling.write_samples import sample_to_files
from rdm_jax.stage_datasets import open_sets, set_for_pictures
from rdm_jax.training.loop import Trainer, changed_since

MODES = ("all", "prepare", "train", "sample", "evaluate", "report", "import", "export")
ALONE = ("report", "import", "export")  # modes of one process
LOCK, SECONDS_TO_APPEAR = ".lock", 60


def run(
    values: Config | ConfigDict | dict[str, Any],
    workdir: str | os.PathLike,
    *,
    mode: str = "all",
    stage: int | None = None,
    weights: str | None = None,
    skip_bad: bool = False,
    update: bool = False,
    evaluations: Sequence[str] = (),
    allow_changes: Sequence[str] = (),
) -> None:
    """Does one part of a run, or all of it; what is done already is left alone.

    In the main thread the first Ctrl-C or SIGTERM saves and stops; in any other thread signals are
    left to the caller.

    Args:
      values: a config, or what a config file returns.
      workdir: folder of the run; made if it is not there and the mode needs nothing in it.
      mode: one of MODES.
      stage: the stage to import or export, or with mode 'train' the only one to train, from 1.
      weights: the file to import from (.pkl, .pt, safetensors) or to export to (safetensors).
      evaluations: the evaluation.json files that a report is of; () for all in the workdir.
      allow_changes: fields of the config, such as 'learning_rate', that may be others than those
        the run was trained with so far (`changes.check_names`); training goes on with the new ones,
        and checkpoints say from which step on.
      skip_bad: prepare without the images that cannot be used, and list them in the manifest,
        instead of refusing the set.
      update: with mode 'prepare', compare prepared sets with their sources, and prepare those again
        that have changed.

    Raises:
      InputError: something that the user gave cannot be used; nothing was changed.
      Diverged, Interrupted: training stopped; what was done is saved.
    """
    config = configs.parse(values)
    _check_part(config, mode, stage, weights)
    validate.require(
        not update or mode == "prepare", "--update with --mode", mode, "--mode=prepare"
    )
    _check_paths(config)
    with distributed.raise_together():
        folder = _workdir(config, workdir, mode, evaluations)
    paths = [local_path(path, "--evaluations") for path in evaluations]
    weights = local_path(weights, "--weights") if weights else None
    if jax.process_count() > 1 and mode in ALONE:
        raise InputError(
            f"--mode={mode} with {jax.process_count()} processes is no use; --coordinator=none would do."
        )
    if mode == "report":
        return write_report(folder, paths)
    if mode == "import":
        return _import(config, stage, weights, folder)
    evaluates = mode in ("all", "evaluate") or (
        mode == "train" and any(s.training.evaluate_every for s in config.stages)
    )
    validate.check_config(config, evaluates=evaluates)
    validate.check_devices(
        config, jax.device_count(), jax.local_device_count(), evaluates=evaluates
    )
    changes.check_names(allow_changes, config)
    with _owned(folder), StopOnSignal() as stop:
        with distributed.raise_together():
            _check_unchanged(config, folder, mode in ("all", "train"), allow_changes)
        if mode == "export":
            return export_stage(config, stage, folder, weights)
        _work(config, mode, stage, folder, stop, skip_bad, update, allow_changes)
        stop.check()  # one that came when all was done is not lost on a caller with more to do
    log.info("%s: done", mode)


def _check_part(config: Config, mode: str, stage: int | None, weights: str | None) -> None:
    """Refuses flags that do not go together."""
    wanted = mode in ("import", "export")
    if stage is not None and (
        not 0 < stage <= len(config.stages) or mode not in ("train", "import", "export")
    ):
        would_do = f"1 to {len(config.stages)} with --mode=train, import or export"
        raise InputError(f"--stage={stage} with --mode={mode} is no stage; {would_do} would do.")
    if wanted and stage is None:
        raise InputError(
            f"--stage=None with --mode={mode} is no stage; 1 to {len(config.stages)} would do."
        )
    if wanted != bool(weights):
        would_do = "the path of a file" if wanted else "--mode=import or --mode=export"
        raise InputError(
            f"--weights={weights} does not go with --mode={mode}; {would_do} would do."
        )


def _workdir(
    config: Config, workdir: str | os.PathLike, mode: str, evaluations: Sequence[str]
) -> Path:
    """The folder of a run. Refuses one that is not there where the mode goes on from what is in it,
    before anything is made."""
    if not os.fspath(workdir).strip():
        raise InputError(
            "--workdir='' names no folder; the path of a folder, '.' for the current one, would do."
        )
    folder = local_path(workdir, "--workdir")
    if folder.exists():
        return folder
    reads = {
        "sample": True,
        "export": True,
        "report": not evaluations,
        "evaluate": generates(config),
    }.get(mode, False)
    elsewhere = any(
        "/" in stage.checkpoint for stage in config.stages
    )  # the checkpoints of another run
    close = nearest(folder)
    if reads and not (elsewhere and mode != "report"):
        would_do = (
            f"--workdir={str(close)!r}"
            if close
            else "the folder of a run, or training first (--mode=train),"
        )
        raise InputError(
            f"--workdir={str(folder)!r} does not exist, and --mode={mode} works on an existing run; {would_do} would do."
        )
    if close:
        log.warning("--workdir=%r is a new run; %r exists", str(folder), str(close))
    return folder


def _check_paths(config: Config) -> None:
    """Refuses URLs among the checkpoints that a config names."""
    for number, stage in enumerate(config.stages, 1):
        local_path(stage.checkpoint, f"config.stage{number}.checkpoint")
        local_path(stage.training.start_from, f"config.stage{number}.training.start_from")


def _work(
    config: Config,
    mode: str,
    stage: int | None,
    folder: Path,
    stop: StopOnSignal,
    skip_bad: bool,
    update: bool,
    allow_changes: Sequence[str],
) -> None:
    """Prepares, trains, samples and evaluates, or what of it the mode asks for."""
    about = (mode, jax.device_count(), jax.default_backend(), jax.process_count(), folder)
    log.info("%s on %d %s device(s) of %d process(es), workdir %s", *about)
    training = [
        n
        for n in range(1, len(config.stages) + 1)
        if mode in ("all", "train") and stage in (None, n)
    ]
    with distributed.raise_together():
        if mode in ("all", "sample"):  # so that what cannot be used is refused before training
            low = LowImages(config) if config.sampling.low else None
            check_settings(config, low.stage + 1 if low else 1, folder)
        _check_named_checkpoints(config, folder, training)
    everything, last = list(range(1, len(config.stages) + 1)), len(config.stages)
    evaluating = _is_evaluated(config, mode, training)
    wanted = {"prepare": everything, "all": everything, "train": training}.get(mode, [])
    wanted = sorted({*wanted, *([last] if evaluating and needs_data(config) else [])})
    kwargs = {
        "workdir": folder,
        "skip_bad": skip_bad,
        "verify": mode == "prepare",
        "check_stop": stop.check,
    }
    kwargs["update"] = (
        update and distributed.is_primary()
    )  # once: the others then find it as it was left
    sets = distributed.primary_first(lambda: open_sets(config, wanted, **kwargs))
    if mode in ("prepare", "all") and distributed.is_primary():
        contact_sheet.draw(config, sets, folder / "contact_sheet.png", again=mode == "prepare")
    parts = {number: images.split(config.data.held_out) for number, images in sets.items()}
    evaluator = (
        Evaluator(config, *parts.get(last, (None, None)), folder, stop) if evaluating else None
    )
    if training:
        validate.check_classes(config, sets[training[0]].class_names, training)
        if distributed.is_primary():
            _write_config(config, folder)
    for number in training:
        _train(config, number, *parts[number], folder, stop, evaluator, allow_changes)
        if distributed.allgather(np.int32(bool(stop.requested))).any():
            raise stop.interruption
    relay = (
        RelayPipeline(config, folder)
        if mode in ("all", "sample") or (mode == "evaluate" and generates(config))
        else None
    )
    if mode in ("all", "sample"):
        sample_to_files(relay, sets.get(last) or set_for_pictures(config), folder, stop)
    if mode in ("all", "evaluate") and evaluator:
        evaluator.run(relay)


def _is_evaluated(config: Config, mode: str, training: list[int]) -> bool:
    """Whether anything is measured. Raises InputError where that is asked for and there are no
    features to do it with."""
    features = config.evaluation.features
    if mode == "evaluate" and features == "none":
        raise InputError(
            "config.evaluation.features='none' with --mode=evaluate; 'inception' or 'classifier' would do."
        )
    during_training = any(config.stage(number).training.evaluate_every for number in training)
    return features != "none" and (mode in ("all", "evaluate") or during_training)


def _import(config: Config, number: int, path: Path, workdir: Path) -> None:
    """Puts weights into a stage of a workdir, with a config.json that fits them and what was
    imported before."""
    with open_weights(path) as weights, _owned(workdir), StopOnSignal() as stop:
        check_no_checkpoints(workdir, number)
        before = _with_imported(config, workdir)
        fitting, classes = stage_of(weights, before, number)
        if fitting.stages[number - 1].resolution != before.stages[number - 1].resolution:
            fitting = fit_resolutions(fitting, number, _imported(config, workdir))
        validate.check_config(fitting, evaluates=False)
        _check_unchanged(fitting, workdir, True, ())
        parameters = read_parameters(weights, fitting, number, classes, path)
        stop.check()
        _write_config(fitting, workdir)
        save_imported(weights, fitting, number, parameters, path, workdir)
    count = sum(leaf.size for leaf in jax.tree.leaves(parameters))
    log.info(
        "import: %s parameters, %d classes -> stage%d of %s", f"{count:,}", classes, number, workdir
    )
    if fitting != config:
        log.info("import: with these weights goes --config %s", workdir)


def _with_imported(config: Config, workdir: Path) -> Config:
    """The config with the networks of the stages that have been imported into the workdir
    before."""
    path = workdir / "config.json"
    if not path.exists():
        return config
    imported = configs.parse(saved.read_saved(path))
    for number in [n for n in _imported(config, workdir) if n <= len(imported.stages)]:
        stage = imported.stage(number)
        config = config.with_stage(
            number,
            resolution=stage.resolution,
            network=stage.network,
            precondition=stage.precondition,
        )
    return config


def _imported(config: Config, workdir: Path) -> list[int]:
    """The stages, from 1, that have checkpoints in the workdir."""
    return [
        n
        for n in range(1, len(config.stages) + 1)
        if (workdir / f"stage{n}" / "checkpoints").is_dir()
    ]


def _train(
    config: Config,
    number: int,
    images: ImageSet,
    held_out: ImageSet | None,
    workdir: Path,
    stop: StopOnSignal,
    evaluator: Evaluator | None,
    allow_changes: Sequence[str],
) -> None:
    """Trains a stage, with pictures and, if there is an evaluator, figures of what it makes."""
    alone = functools.cache(
        lambda: StagePreview(config, number, held_out or images)
    )  # only once it is needed

    def evaluate(params: Any, images_seen: int, folder: Path) -> dict[str, float]:
        try:
            return evaluator.run_stage(number, alone(), params, images_seen, folder)
        except (InputError, OSError) as error:  # no reason to lose a training
            if (
                isinstance(error, OSError) and jax.process_count() > 1
            ):  # of this process alone, and others wait for it
                raise
            log.info("stage%d: not evaluated at %s images: %s", number, f"{images_seen:,}", error)
            return {}

    trainer = Trainer(config, number, images, workdir / f"stage{number}", held_out, allow_changes)
    trainer.run(
        stop, lambda params, path: alone().preview(params, path), evaluate if evaluator else None
    )


@contextmanager
def _owned(workdir: Path) -> Iterator[None]:
    """Makes the workdir and keeps other runs out of it; the lock goes with the first process,
    however it ends."""
    token = str(distributed.allgather(np.int32(time.time_ns() % 2**31))[0])
    with contextlib.ExitStack() as held:
        with distributed.raise_together():
            if distributed.is_primary():
                held.enter_context(_locked(workdir, token))
        with distributed.raise_together():
            if not _appears(workdir / LOCK, token):
                would_do = "a folder that all hosts share"
                raise InputError(
                    f"--workdir={str(workdir)!r} is not the same for every process; {would_do} would do."
                )
        yield


def _appears(path: Path, text: str) -> bool:
    """Whether a file has this text, or will soon: file systems over a network may show it late."""
    for _ in range(SECONDS_TO_APPEAR):
        if path.is_file() and path.read_text() == text:
            return True
        time.sleep(1)
    return False


@contextmanager
def _locked(workdir: Path, token: str) -> Iterator[None]:
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / LOCK).touch()
    except OSError as error:
        raise InputError(
            f"--workdir={str(workdir)!r} cannot be written ({error.strerror}); another folder would do."
        ) from error
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(locks.locked(workdir / LOCK))
        except locks.InUse as error:
            raise InputError(
                f"--workdir={str(workdir)!r} is in use by another run; waiting for it would do."
            ) from error
        with (workdir / LOCK).open(
            "r+"
        ) as lock:  # not by renaming another file, which would be another lock
            lock.truncate(0)
            lock.write(token)
            lock.flush()
            os.fsync(lock.fileno())
        yield


def _check_unchanged(
    config: Config, workdir: Path, trains: bool, allow_changes: Sequence[str]
) -> None:
    """Refuses a config that another run of the workdir did not train with. Imported weights alone
    bind nothing here.

    Args:
      trains: stages are compared with their checkpoints too; what only samples them compares the
        network later.
      allow_changes: what may differ all the same.
    """
    now, path = configs.to_dict(config), workdir / "config.json"
    folders = {
        f"stage{n}": workdir / f"stage{n}" / "checkpoints" for n in range(1, len(config.stages) + 1)
    }
    trained = {
        name: folder
        for name, folder in folders.items()
        if distributed.from_primary(_is_trained(folder))
    }
    if not trained:
        return
    if path.exists():
        before, bound = saved.read_saved(path), ("seed", "data")
        found = changes.incompatible_changes(
            *({key: values[key] for key in bound if key in values} for values in (before, now))
        )
        changes.check_allowed(found, allow_changes, f"--workdir={str(workdir)!r}")
    for name, folder in trained.items() if trains else ():
        newest = checkpoint_folders.newest_trained(folder)
        if newest:  # else they are damaged, and training says so
            step_folder, about = newest
            found = changed_since(about, {"seed": config.seed, "stage": now[name]}, name)
            changes.check_allowed(found, allow_changes, f"checkpoint {step_folder}")


def _is_trained(folder: Path) -> bool:
    """Whether a stage has been trained, as the first process sees it; others may see that later."""
    return distributed.is_primary() and checkpoint_folders.is_trained(folder)


def _write_config(config: Config, workdir: Path) -> None:
    with atomic_write(workdir / "config.json") as partial:
        saved.save_config(config, partial)


def _check_named_checkpoints(config: Config, workdir: Path, training: list[int]) -> None:
    """Refuses the path of a checkpoint that is needed and not there before anything is trained."""
    for number, stage in enumerate(config.stages, 1):
        if "/" in stage.checkpoint:
            checkpoint_folders.find(stage.checkpoint, Path())
        trained = distributed.from_primary(_is_trained(workdir / f"stage{number}" / "checkpoints"))
        if stage.training.start_from and number in training and not trained:
            try:
                checkpoint_folders.find(stage.training.start_from, Path())
            except InputError as error:
                raise InputError(f"config.stage{number}.training.start_from: {error}") from error
