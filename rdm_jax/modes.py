"""The modes of a run: prepare, train, sample, evaluate, report, import, export, or all of it; and
the training of an autoencoder.

`main` calls it for the command line; notebooks call it directly.
"""

import contextlib
import dataclasses
import os
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from rdm_jax import config as configs
from rdm_jax.checkpoints import averages, folders, shared, store
from rdm_jax.cli.run_flags import ONE_PROCESS, check_flags, check_paths, needs_run
from rdm_jax.config import Config, Stage, changes, validate, validate_autoencoder
from rdm_jax.config.load import load_config
from rdm_jax.data.classes import Classes
from rdm_jax.data.image_sets import ImageSet
from rdm_jax.data.text_table import TextSpec
from rdm_jax.evaluation.evaluator import Evaluator, generates, needs_data
from rdm_jax.evaluation.report import write_report
from rdm_jax.evaluation.stage_probe import StageProbe
from rdm_jax.interop import autoencoder_files, latent_space
from rdm_jax.interop.import_export import export_stage
from rdm_jax.interop.import_stage import import_stage
from rdm_jax.interop.share import export_relay, import_relay
from rdm_jax.render import contact_sheet
from rdm_jax.runtime import distributed, hub, mounts
from rdm_jax.runtime.console import log
from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.files import local_path
from rdm_jax.runtime.signals import StopOnSignal
from rdm_jax.sampling import guides
from rdm_jax.sampling.earlier import check_settings
from rdm_jax.sampling.low_images import LowImages
from rdm_jax.sampling.pipeline import RelayPipeline
from rdm_jax.sampling.prompts import check_labels, check_prompts, takes_text
from rdm_jax.sampling.run_captions import Captions, pairs_of
from rdm_jax.sampling.write_samples import sample_to_files
from rdm_jax.stage_datasets import open_sets, set_for_pictures
from rdm_jax.training import trackers
from rdm_jax.training.autoencoder import AutoencoderTrainer, ReconstructionProbe, measure
from rdm_jax.training.loop import Trainer
from rdm_jax.workdir import Workdir


def run(
    values: Config | ConfigDict | dict[str, Any] | str,
    workdir: str | os.PathLike,
    *,
    mode: str = "all",
    stage: int | None = None,
    weights: str | None = None,
    weights_key: str | None = None,
    skip_bad: bool = False,
    update: bool = False,
    evaluations: Sequence[str] = (),
    allow_changes: Sequence[str] = (),
) -> None:
    """Runs one mode; what is done already is left alone.

    In the main thread the first Ctrl-C or SIGTERM saves and stops; in any other thread signals are
    left to the caller.

    Args:
      values: a config, what a config file returns, or the name of a packaged config or a file.
      workdir: folder of the run; created unless the mode needs an existing run.
      mode: one of `cli.run_flags.MODES`.
      stage: the stage to import or export, or with mode 'train' the only one to train, from 1.
        None to import or export a whole relay, in a folder to share.
      weights: the file to import (.pkl, .pt, .pth, safetensors) or to export to (safetensors); of a
        whole relay, the folder, or to import it hf://OWNER/NAME[@REVISION].
      weights_key: with mode 'import', the network in the file; None for 'ema', or 'model_ema1' in
        JiT's.
      skip_bad: prepare without the images that cannot be used, and list them in the manifest,
        instead of refusing the set.
      update: with mode 'prepare', compare prepared sets with their sources, and prepare changed
        ones again.
      evaluations: the evaluation.json files that a report is of; () for all in the workdir.
      allow_changes: fields of the config, such as 'learning_rate', that may differ from those that
        the run was trained with so far (`changes.check_names`); training continues with the new
        values, and checkpoints record from which step on.

    Raises:
      InputError: the user's input cannot be used; nothing was changed.
      Diverged, Interrupted: training stopped; finished work is saved.
    """
    config = load_config(values) if isinstance(values, str) else configs.parse(values)
    if mode == "autoencoder":
        config = latent_space.in_pixels(config)
    check_flags(config, mode, stage, weights, update, weights_key)
    check_paths(config)
    with distributed.raise_together():
        samples = mode == "evaluate" and generates(config)
        needed = needs_run(config, mode, evaluations, generates=samples)
        needed_by = f"--mode={mode}" if needed else None
        folder = Workdir.from_flag(workdir, needed_by=needed_by)
    reported = [local_path(path, "--evaluations") for path in evaluations]
    by_name = weights and hub.is_url(weights) and mode == "import" and stage is None
    weights_file = local_path(weights, "--weights") if weights and not by_name else None
    if jax.process_count() > 1 and mode in ONE_PROCESS:
        raise InputError(
            f"--mode={mode} runs in a single process, but this run has {jax.process_count()}",
            "Pass --coordinator=none.",
        )
    if mode == "report":
        write_report(folder.path, reported)
        return mounts.push()
    if mode == "import":
        if stage is None:
            relay = shared.fetch(weights, "--weights") if by_name else weights_file
            return import_relay(relay, folder)
        return import_stage(config, stage, weights_file, folder, weights_key)

    evaluates = mode in ("all", "evaluate") or (
        mode == "train" and any(s.training.evaluate_every for s in config.stages)
    )
    validate.check_config(config, evaluates=evaluates)
    validate.check_devices(
        config, jax.device_count(), jax.local_device_count(), evaluates=evaluates
    )
    latent_space.check(config)
    if mode == "autoencoder":
        validate_autoencoder.check(config, jax.device_count())
    changes.check_names(allow_changes, config)
    with folder.locked(), StopOnSignal() as stop:
        with distributed.raise_together():
            if mode in ("all", "train", "evaluate"):
                mounts.pull(folder.evaluation(config))
            if mode in ("all", "sample", "evaluate"):
                mounts.pull(folder.samples(config))
            folder.check_same_config(
                config, trains=mode in ("all", "train"), allow_changes=allow_changes
            )
        if mode == "export" and stage is None:
            return export_relay(config, folder, weights_file)
        if mode == "export":
            return export_stage(config, stage, folder.path, weights_file)
        _work(Job(config, folder, mode, stage, stop, skip_bad, update, tuple(allow_changes)))
        stop.check()  # a signal at the very end still stops a caller that has more to do
    log.info("%s: done", mode)


class Split(NamedTuple):
    """The images of a stage: all, those to train on, and those held out."""

    all: ImageSet
    training: ImageSet
    held_out: ImageSet | None


@dataclasses.dataclass(frozen=True)
class Job:
    """What the modes share: the arguments of `run`, and the parts that modes are made of."""

    config: Config
    workdir: Workdir
    mode: str
    stage: int | None
    stop: StopOnSignal
    skip_bad: bool
    update: bool
    allow_changes: tuple[str, ...]

    @property
    def numbers(self) -> list[int]:
        """The numbers of all stages, from 1."""
        return list(range(1, len(self.config.stages) + 1))

    @property
    def trained(self) -> list[int]:
        """The numbers of the stages to train."""
        if self.mode not in ("all", "train"):
            return []
        return [self.stage] if self.stage is not None else self.numbers

    def open_sets(self, numbers: Iterable[int]) -> dict[int, Split]:
        """Prepares and opens the images of these stages: process 0 first, then the others."""
        sets = distributed.primary_first(
            "prepares the images",
            lambda: open_sets(
                self.config,
                sorted(set(numbers)),
                workdir=self.workdir.path,
                skip_bad=self.skip_bad,
                verify=self.mode == "prepare",
                # Once: the others then find the set as process 0 has left it.
                update=self.update and distributed.is_primary(),
                check_stop=self.stop.check,
            ),
        )
        with distributed.raise_together("process 0, which draws the contact sheet"):
            if self.mode in ("all", "prepare") and distributed.is_primary():
                self.draw_contact_sheet(sets)
        held_out = self.config.data.held_out
        return {number: Split(images, *images.split(held_out)) for number, images in sets.items()}

    def draw_contact_sheet(self, sets: dict[int, ImageSet]) -> None:
        """Draws what the stages are trained on."""
        decode, latents = None, next(iter(sets.values())).latents
        if latents is not None:
            codec = latent_space.open_codec(self.config)
            decode = latent_space.decoder_on_host(codec, latents.latent_spec)
        path, again = self.workdir.contact_sheet, self.mode == "prepare"
        contact_sheet.draw(self.config, sets, path, again=again, decode=decode)

    def evaluator(self, sets: dict[int, Split]) -> Evaluator:
        """Returns what measures images, with the last stage's sets if they are open."""
        last = sets.get(self.numbers[-1])
        return Evaluator(
            self.config,
            last.training if last else None,
            last.held_out if last else None,
            self.workdir.path,
            self.stop,
        )

    def train(self, sets: dict[int, Split], evaluator: Evaluator | None) -> None:
        """Trains the stages one after the other."""
        first = sets[self.trained[0]]
        names = first.all.class_names
        validate.check_classes(self.config, names, self.trained)
        texts = {number: sets[number].all.text for number in self.trained}
        validate.check_captions(self.config, texts)
        self.check_guides(Classes(names), first.all.text)
        if self.mode == "all" and any(
            guides.depends_on_classes(stage, len(names)) for stage in self.config.stages
        ):
            check_labels(self.config)
        if distributed.is_primary():
            self.workdir.write_config(self.config)
            self.write_captions(sets)
        for number in self.trained:
            images, held_out = sets[number].training, sets[number].held_out
            directory = self.workdir.stage(number)
            trainer = Trainer(self.config, number, images, directory, held_out, self.allow_changes)
            trainer.run(self.stop, StageProbe(self.config, number, held_out or images, evaluator))
            if distributed.in_any_process(bool(self.stop.requested)):
                raise self.stop.interruption
        distributed.wait_for_all("end their training")

    def write_captions(self, sets: dict[int, Split]) -> None:
        """Keeps captions that a stage is trained on in the workdir, to sample with."""
        numbers = [number for number in self.trained if takes_text(self.config.stage(number))]
        if numbers:
            images, held_out = sets[numbers[-1]].training, sets[numbers[-1]].held_out
            unseen = pairs_of(held_out) if held_out else ()
            Captions.of(pairs_of(images), unseen).write(self.workdir.captions)

    def check_guides(self, classes: Classes | None = None, text: TextSpec | None = None) -> None:
        """Refuses guides that cannot guide the stages to train, whose previews need them."""
        channels = latent_space.channels(self.config)
        for number in self.trained:
            guides.check(self.config.stage(number), channels, classes, text)

    def pipeline(self) -> RelayPipeline:
        """Loads the stages' checkpoints."""
        return RelayPipeline(self.config, self.workdir.path)


def _work(job: Job) -> None:
    """Runs a mode that uses the devices."""
    log.info(
        "%s on %d %s device(s) of %d process(es), workdir %s",
        job.mode,
        jax.device_count(),
        jax.default_backend(),
        jax.process_count(),
        job.workdir.path,
    )
    with distributed.raise_together():  # refusals, before anything takes long
        generating = job.mode == "evaluate" and generates(job.config)
        if job.mode in ("all", "sample") or generating:
            low = LowImages(job.config) if job.config.sampling.low else None
            first = low.stage + 1 if low else 1
            if not generating:
                check_settings(job.config, first, job.workdir.path)
            check_prompts(job.config, encode=job.mode == "all")
            _check_averages(job, job.config.stages[first - 1 :])
        job.workdir.check_named_checkpoints(job.config, job.trained)
        if job.trained and distributed.is_primary():
            trackers.check(job.config)
        job.check_guides()
    modes = {
        "all": _all,
        "prepare": _prepare,
        "train": _train,
        "sample": _sample,
        "evaluate": _evaluate,
        "autoencoder": _autoencoder,
    }
    modes[job.mode](job)


def _check_averages(job: Job, stages: Sequence[Stage]) -> None:
    """Refuses averages to sample with that there are not, or that training will not leave."""
    if job.mode != "all":
        return job.workdir.check_averages(stages)
    for stage in stages:
        if "/" not in stage.checkpoint:
            averages.check_planned(stage)


def _all(job: Job) -> None:
    sets = job.open_sets(job.numbers)
    evaluator = job.evaluator(sets) if job.config.evaluation.features != "none" else None
    job.train(sets, evaluator)
    pipeline = job.pipeline()
    sample_to_files(pipeline, sets[job.numbers[-1]].all, job.workdir.path, job.stop)
    if evaluator:
        evaluator.run(pipeline)


def _prepare(job: Job) -> None:
    job.open_sets(job.numbers)


def _train(job: Job) -> None:
    evaluates = job.config.evaluation.features != "none" and any(
        job.config.stage(number).training.evaluate_every for number in job.trained
    )
    last = job.numbers[-1:] if evaluates and needs_data(job.config) else []
    sets = job.open_sets([*job.trained, *last])
    job.train(sets, job.evaluator(sets) if evaluates else None)


def _sample(job: Job) -> None:
    sample_to_files(job.pipeline(), set_for_pictures(job.config), job.workdir.path, job.stop)


def _evaluate(job: Job) -> None:
    if job.config.evaluation.features == "none":
        raise InputError(
            "config.evaluation.features='none' with --mode=evaluate measures nothing",
            "Use 'inception', 'efficientnet' or 'classifier'.",
        )
    sets = job.open_sets(job.numbers[-1:] if needs_data(job.config) else [])
    evaluator = job.evaluator(sets)
    evaluator.run(job.pipeline() if generates(job.config) else None)


def _autoencoder(job: Job) -> None:
    """Trains the autoencoder, and writes it as published ones are."""
    last, network = job.numbers[-1], job.config.autoencoder.network
    images = job.open_sets([last])[last]
    unseen = images.held_out or images.training
    directory = job.workdir.autoencoder
    trainer = AutoencoderTrainer(
        job.config, images.training, directory, images.held_out, job.allow_changes
    )
    trainer.run(job.stop, ReconstructionProbe(network, unseen))
    step = folders.newest_trained(directory / "checkpoints")
    with contextlib.closing(store.Checkpoints(directory / "checkpoints", read_only=True)) as found:
        params, _ = found.restore_ema(int(step[0].name), trainer.abstract.ema)
    measured = measure(network, params, unseen, job.config.autoencoder.training.validation)
    autoencoder_files.save(measured.network, params, directory)
    log.info(
        "autoencoder: factor %d, PSNR of reconstructions %.2f dB, latents' scale %.4g, shift %.4g "
        "-> %s",
        network.factor,
        measured.psnr,
        measured.network.scale,
        measured.network.shift,
        directory / autoencoder_files.WEIGHTS,
    )
