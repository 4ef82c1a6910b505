"""A run from config to samples, part by part; what `main` does, for notebooks too."""

import contextlib
import dataclasses
import fcntl
import functools
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from rdm_jax import checks, contact_sheet, distributed
from rdm_jax import config as configs
from rdm_jax.config import Config
from rdm_jax.data.image_sets import ImageSet
from rdm_jax.errors import InputError
from rdm_jax.evaluation.evaluate import Evaluator, generates, needs_data
from rdm_jax.evaluation.report import write_report
from rdm_jax.files import whole_file
from rdm_jax.interop.weights import (
    check_no_checkpoints,
    export_stage,
    open_weights,
    read_parameters,
    save_imported,
    stage_of,
)
from rdm_jax.interrupt import StopOnSignal
from rdm_jax.sampling.low_images import LowImages
from rdm_jax.sampling.preview import StageAlone
from rdm_jax.sampling.relay import Relay
from rdm_jax.sampling.results import sample_to_files
from rdm_jax.stage_data import open_sets, set_for_pictures
from rdm_jax.terminal import log
from rdm_jax.training import checkpoint
from rdm_jax.training.loop import Trainer
from rdm_jax.unchanged import changes

MODES = ("all", "prepare", "train", "sample", "evaluate", "report", "import", "export")
ALONE = ("report", "import", "export")  # modes of one process
LOCK, SECONDS_TO_APPEAR = ".lock", 60


def run(
    values: ConfigDict,
    workdir: str,
    *,
    mode: str = "all",
    stage: int | None = None,
    weights: str | None = None,
    skip_bad: bool = False,
    update: bool = False,
    evaluations: Sequence[str] = (),
) -> None:
    """Does one part of a run, or all of it; what is done already is left alone.

    Args:
      values: what a config file returns.
      workdir: folder of the run; made if it is not there.
      mode: one of MODES.
      stage: the stage to import or export, or with mode 'train' the only one to train, from 1.
      weights: the file to import from (.pkl, .pt, safetensors) or to export to (safetensors).
      evaluations: the evaluation.json files that a report is of; () for all in the workdir.
      skip_bad: prepare without the images that cannot be used, and list them in the manifest, instead of refusing the set.
      update: with mode 'prepare', compare prepared sets with their sources, and prepare those again that have changed.

    Raises:
      InputError: something that the user gave cannot be used; nothing was changed.
      Diverged, Interrupted: training stopped; what was done is saved.
    """
    config = configs.parse(values)
    _check_part(config, mode, stage, weights)
    checks.require(not update or mode == "prepare", "--update with --mode", mode, "--mode=prepare")
    folder = Path(workdir).expanduser()
    if jax.process_count() > 1 and mode in ALONE:
        raise InputError(f"--mode={mode} with {jax.process_count()} processes is no use; --coordinator=none would do.")
    if mode == "report":
        return write_report(folder, [Path(path).expanduser() for path in evaluations])
    if mode == "import":
        return _import(config, stage, Path(weights).expanduser(), folder)
    checks.check_config(config)
    checks.check_devices(config, jax.device_count(), jax.local_device_count())
    with _owned(folder), StopOnSignal() as stop:
        with distributed.together():
            _check_unchanged(config, folder)
        if mode == "export":
            return export_stage(config, stage, folder, Path(weights).expanduser())
        _work(config, mode, stage, folder, stop, skip_bad, update)
        stop.check()  # one that came when all was done is not lost on a caller with more to do
    log.info("%s: done", mode)


def _check_part(config: Config, mode: str, stage: int | None, weights: str | None) -> None:
    """Refuses flags that do not go together."""
    wanted = mode in ("import", "export")
    if stage is not None and (not 0 < stage <= len(config.stages) or mode not in ("train", "import", "export")):
        would_do = f"1 to {len(config.stages)} with --mode=train, import or export"
        raise InputError(f"--stage={stage} with --mode={mode} is no stage; {would_do} would do.")
    if wanted and stage is None:
        raise InputError(f"--stage=None with --mode={mode} is no stage; 1 to {len(config.stages)} would do.")
    if wanted != bool(weights):
        would_do = "the path of a file" if wanted else "--mode=import or --mode=export"
        raise InputError(f"--weights={weights} does not go with --mode={mode}; {would_do} would do.")


def _work(config: Config, mode: str, stage: int | None, folder: Path, stop: StopOnSignal, skip_bad: bool, update: bool) -> None:
    """Prepares, trains, samples and evaluates, or what of it the mode asks for."""
    about = (mode, jax.device_count(), jax.default_backend(), jax.process_count(), folder)
    log.info("%s on %d %s device(s) of %d process(es), workdir %s", *about)
    training = [n for n in range(1, len(config.stages) + 1) if mode in ("all", "train") and stage in (None, n)]
    with distributed.together():
        if config.sampling.low and mode in ("all", "sample"):
            LowImages(config)  # so that one that cannot be used is refused before training
        _check_named_checkpoints(config, folder, training)
    everything, last = list(range(1, len(config.stages) + 1)), len(config.stages)
    evaluating = _is_evaluated(config, mode, training)
    wanted = {"prepare": everything, "all": everything, "train": training}.get(mode, [])
    wanted = sorted({*wanted, *([last] if evaluating and needs_data(config) else [])})
    kwargs = {"workdir": folder, "skip_bad": skip_bad, "verify": mode == "prepare", "check_stop": stop.check}
    kwargs["update"] = update and distributed.is_first()  # once: the others then find it as it was left
    sets = distributed.first_before_others(lambda: open_sets(config, wanted, **kwargs))
    if mode in ("prepare", "all") and distributed.is_first():
        contact_sheet.draw(config, sets, folder / "contact_sheet.png", again=mode == "prepare")
    parts = {number: images.split(config.data.held_out) for number, images in sets.items()}
    evaluator = Evaluator(config, *parts.get(last, (None, None)), folder, stop) if evaluating else None
    if training:
        checks.check_classes(config, sets[training[0]].class_names)
        if distributed.is_first():
            _write_config(config, folder)
    for number in training:
        _train(config, number, *parts[number], folder, stop, evaluator)
        if distributed.gathered(np.int32(bool(stop.requested))).any():
            raise stop.interruption
    relay = Relay(config, folder) if mode in ("all", "sample") or (mode == "evaluate" and generates(config)) else None
    if mode in ("all", "sample"):
        sample_to_files(relay, sets.get(last) or set_for_pictures(config), folder, stop)
    if mode in ("all", "evaluate") and evaluator:
        evaluator.run(relay)


def _is_evaluated(config: Config, mode: str, training: list[int]) -> bool:
    """Whether anything is measured. Raises InputError where that is asked for and there are no features to do it with."""
    features = config.evaluation.features
    if mode == "evaluate" and features == "none":
        raise InputError("config.evaluation.features='none' with --mode=evaluate; 'inception' or 'classifier' would do.")
    during_training = any(config.stages[number - 1].training.evaluate_every for number in training)
    return features != "none" and (mode in ("all", "evaluate") or during_training)


def _import(config: Config, number: int, path: Path, workdir: Path) -> None:
    """Puts weights into a stage of a workdir, with a config.json that fits them and what was imported before."""
    with open_weights(path) as weights, _owned(workdir), StopOnSignal() as stop:
        check_no_checkpoints(workdir, number)
        fitting, classes = stage_of(weights, _with_imported(config, workdir), number)
        checks.check_config(fitting)
        _check_unchanged(fitting, workdir)
        parameters = read_parameters(weights, fitting, number, classes, path)
        stop.check()
        _write_config(fitting, workdir)
        save_imported(weights, fitting, number, parameters, path, workdir)
    count = sum(leaf.size for leaf in jax.tree.leaves(parameters))
    log.info("import: %s parameters, %d classes -> stage%d of %s", f"{count:,}", classes, number, workdir)
    if fitting != config:
        log.info("import: with these weights goes --config configs/saved.py:%s", workdir / "config.json")


def _with_imported(config: Config, workdir: Path) -> Config:
    """The config with the networks of the stages that have been imported into the workdir before."""
    path = workdir / "config.json"
    if not path.exists():
        return config
    saved, stages = configs.parse(configs.read_saved(path)), list(config.stages)
    for index, before in enumerate(saved.stages[: len(stages)]):
        if (workdir / f"stage{index + 1}" / "checkpoints").is_dir():
            kept = {field: getattr(before, field) for field in ("resolution", "network", "precondition")}
            stages[index] = dataclasses.replace(stages[index], **kept)
    return dataclasses.replace(config, stages=tuple(stages))


def _train(
    config: Config,
    number: int,
    images: ImageSet,
    held_out: ImageSet | None,
    workdir: Path,
    stop: StopOnSignal,
    evaluator: Evaluator | None,
) -> None:
    """Trains a stage, with pictures and, if there is an evaluator, figures of what it makes."""
    alone = functools.cache(lambda: StageAlone(config, number, held_out or images))  # only once it is needed

    def evaluate(params: Any, images_seen: int, folder: Path) -> dict[str, float]:
        try:
            return evaluator.run_stage(number, alone(), params, images_seen, folder)
        except (InputError, OSError) as error:  # no reason to lose a training
            if isinstance(error, OSError) and jax.process_count() > 1:  # of this process alone, and others wait for it
                raise
            log.info("stage%d: not evaluated at %s images: %s", number, f"{images_seen:,}", error)
            return {}

    trainer = Trainer(config, number, images, workdir / f"stage{number}", held_out)
    trainer.run(stop, lambda params, path: alone().preview(params, path), evaluate if evaluator else None)


@contextmanager
def _owned(workdir: Path) -> Iterator[None]:
    """Makes the workdir and keeps other runs out of it; the lock goes with the first process, however it ends."""
    token = str(distributed.gathered(np.int32(time.time_ns() % 2**31))[0])
    with contextlib.ExitStack() as held:
        with distributed.together():
            if distributed.is_first():
                held.enter_context(_locked(workdir, token))
        with distributed.together():
            if not _appears(workdir / LOCK, token):
                would_do = "a folder that all hosts share"
                raise InputError(f"--workdir={str(workdir)!r} is not the same for every process; {would_do} would do.")
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
        lock = (workdir / LOCK).open("a")
    except OSError as error:
        raise InputError(f"--workdir={str(workdir)!r} cannot be written ({error.strerror}); another folder would do.") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(f"--workdir={str(workdir)!r} is in use by another run; waiting for it would do.") from error
        lock.truncate(0)
        lock.write(token)
        lock.flush()
        os.fsync(lock.fileno())
        yield


def _check_unchanged(config: Config, workdir: Path) -> None:
    """Refuses a config that another run of the workdir did not train with. Imported weights alone bind nothing here."""
    path = workdir / "config.json"
    trained = [n for n in range(1, len(config.stages) + 1) if checkpoint.is_trained(workdir / f"stage{n}" / "checkpoints")]
    if not trained:
        return
    now = json.loads(json.dumps(configs.to_dict(config)))
    before = configs.read_saved(path) if path.exists() else {**now, **_trained_with(workdir, trained)}
    bound = [key for key in {**before, **now} if not key.startswith("stage") or key in {f"stage{n}" for n in trained}]
    pairs = [({key: both.get(key) for key in bound}) for both in (before, now)]
    listed = changes(*pairs, "config")
    if listed:
        raise InputError(f"--workdir={str(workdir)!r} was made with another config ({listed}); another workdir would do.")


def _trained_with(workdir: Path, numbers: list[int]) -> dict[str, Any]:
    """What the checkpoints of these stages know of their config."""
    known = {}
    for number in numbers:
        folder, step = checkpoint.find("newest", workdir / f"stage{number}" / "checkpoints")
        checkpoints = checkpoint.Checkpoints(folder, read_only=True)
        about = checkpoints.about(step)
        checkpoints.close()
        known |= {"seed": about["seed"], f"stage{number}": about["stage"]}
    return known


def _write_config(config: Config, workdir: Path) -> None:
    with whole_file(workdir / "config.json") as partial:
        partial.write_text(json.dumps(configs.to_dict(config), indent=2))


def _check_named_checkpoints(config: Config, workdir: Path, training: list[int]) -> None:
    """Refuses the path of a checkpoint that is needed and not there before anything is trained."""
    for number, stage in enumerate(config.stages, 1):
        if "/" in stage.checkpoint:
            checkpoint.find(stage.checkpoint, Path())
        trained = checkpoint.is_trained(workdir / f"stage{number}" / "checkpoints")
        if stage.training.start_from and number in training and not trained:
            try:
                checkpoint.find(stage.training.start_from, Path())
            except InputError as error:
                raise InputError(f"config.stage{number}.training.start_from: {error}") from error
