"""The training of one stage: from a config and images to checkpoints, metrics and previews."""

import collections
import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Key

from rdm_jax.checkpoints import space, store
from rdm_jax.config import Config, to_dict
from rdm_jax.config.saved import VERSION
from rdm_jax.config.validate import check_captions
from rdm_jax.data.image_sets import ImageSet
from rdm_jax.data.pipeline import TrainIterator, as_trained, train_iterator
from rdm_jax.runtime import distributed, mounts, random_streams, sharding
from rdm_jax.runtime.console import log, progress
from rdm_jax.runtime.errors import Diverged, Interrupted
from rdm_jax.runtime.files import log_write_errors
from rdm_jax.runtime.random_streams import RandomStream
from rdm_jax.runtime.signals import StopOnSignal
from rdm_jax.training import metric_writer
from rdm_jax.training.count import Count
from rdm_jax.training.metric_buffer import Clock, MetricBuffer
from rdm_jax.training.probe import Probe
from rdm_jax.training.program import PROGRAMS, Program, Trained, latent_objective
from rdm_jax.training.session import Due, Session
from rdm_jax.training.snapshots import Snapshots
from rdm_jax.training.start import Progress, Starter
from rdm_jax.training.step import Loss, TrainState
from rdm_jax.training.validation import Validation

BATCHES_AHEAD = 2  # on their way to the devices while a step runs
# What processes exchange with every step: nothing (0), that process 0 wants to save, or
# that one of them has received a signal.
SAVE = 1
STOP = 2


class Trainer:
    """The training of one stage. Building it reads and compiles nothing.

    Args:
      config: of the run.
      number: of the stage, from 1.
      source: the images to train on, or sums of their cells.
      directory: of the stage, for checkpoints, metrics and previews.
      held_out: the images whose loss ranks checkpoints; None for images of `source`.
      allow_changes: fields of the config that may differ from the newest checkpoint's
        (`config.changes.check_names`).

    Attributes:
      abstract: shapes, dtypes and shardings of the training state.
    """

    def __init__(
        self,
        config: Config,
        number: int,
        source: ImageSet,
        directory: Path,
        held_out: ImageSet | None = None,
        allow_changes: Sequence[str] = (),
    ):
        self.stage: Any = self._subject(config, number, source)
        self.name = self.stage.name
        self.training = self.stage.training
        cell = source.image_shape[0] // self.stage.resolution[0]
        self.source, held_out = as_trained(cell, source, held_out or source)
        self.directory = directory
        self.mesh = sharding.make_mesh(config.parallel.data, config.parallel.fsdp)
        self._config, self._number = config, number
        self._allow_changes = tuple(allow_changes)
        # No two stages share an order of images, not even those of runs with other seeds.
        self._data_seed = config.seed * 2**8 + number
        # Of the steps to come, and of those taken.
        self._count = self._before = Count(self.training.batch_size)
        self._program = self._build()
        self.objective = self._program.objective
        self.abstract = self._program.abstract
        self._validation = Validation(
            self.objective,
            held_out,
            self.training,
            self._key(RandomStream.VALIDATE),
            self.mesh,
        )
        self._about = {
            "version": VERSION,
            "stage": to_dict(config)[self.name],
            "classes": list(source.class_names),
            "seed": config.seed,
        }
        if self.source.latent_spec:
            self._about["latents"] = self.source.latent_spec._asdict()
        if "text" in self._program.inputs:
            self._about["text"] = source.text._asdict()

    def _subject(self, config: Config, number: int, source: ImageSet) -> Trained:
        """What is trained."""
        check_captions(config, {number: source.text})
        return config.stage(number)

    def _objective(self) -> Loss | None:
        """What is trained instead of the stage's own objective."""
        return latent_objective(self.stage, self.source)

    def run(self, stop: StopOnSignal, probe: Probe | None = None) -> None:
        """Trains to the configured number of images, resuming from the newest checkpoint.

        Args:
          stop: read after every step; once a signal has come, the state is saved and `Interrupted`
            raised.
          probe: draws a preview every `preview_every` images and evaluates every `evaluate_every`;
            an interrupted evaluation is resumed before training is.

        Previews and evaluations come after a checkpoint, as signals are only handled at their end.

        Raises:
          Diverged: after `max_skipped` consecutive steps that were not finite; the last good state
            is saved.
          InputError: the checkpoint cannot be used, or the disk is too small for more.
          OSError: the last save failed, or more than `max_failed_saves` consecutive ones.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        self._about["images"] = {"count": len(self.source), "identity": self.source.identity}
        self._about["validated_on"] = self._validation.identity
        checkpoints = store.Checkpoints(
            mounts.in_store(self.directory / "checkpoints"),
            keep_newest=self.training.keep_newest,
            keep_best=self.training.keep_best,
            max_failed_saves=self.training.max_failed_saves,
        )
        snapshots, wait = Snapshots(checkpoints.directory, self.training), True
        with contextlib.ExitStack() as at_end:  # for the writer, as a tracker may keep it waiting
            try:
                self._run(checkpoints, snapshots, stop, probe, at_end)
            except Interrupted as interruption:
                wait = not interruption.at_once
                raise
            finally:
                if wait:  # for the current saves, also if something else failed
                    with contextlib.closing(snapshots):
                        checkpoints.close()

    def _run(
        self,
        checkpoints: store.Checkpoints,
        snapshots: Snapshots,
        stop: StopOnSignal,
        probe: Probe | None,
        at_end: contextlib.ExitStack,
    ) -> None:
        point = self._start(checkpoints)
        snapshots.resume(self._before, point.state, self._about_at(point))
        self._finish_evaluation(point, probe)
        if point.step >= self._last_step:
            images = self._count.images_at(point.step)
            log.info("%s: already trained on %s images", self.name, f"{images:,}")
            return

        # What may fail or take long comes before the first step.
        copies = self.training.keep_newest + self.training.keep_best + 1 - len(checkpoints.steps())
        more = snapshots.to_come(self._count, point.step)
        space.check_space(checkpoints.directory, self.abstract, copies, more)
        self._compile()
        iterator = self._iterator(point.data)
        clock = Clock(60 * self.training.checkpoint_minutes)
        opened = metric_writer.open_writer(self._config, self.directory, point.step)
        writer = at_end.enter_context(opened)
        total = self._count.images_at(self._last_step)
        bar = progress(total, f"training {self.name}", self._count.images_at(point.step))
        curves = metric_writer.Curves(self.directory)
        buffer = MetricBuffer(self.training, self._count, writer, bar)
        session = Session(checkpoints, snapshots, stop, probe, writer, buffer, clock, curves)

        # Steps, and what comes between them.
        batches = self._batches(iterator)
        running, step = self._program.place(point.state), point.step
        try:
            while step < self._last_step:
                batch, data_state = next(batches)
                running, metrics = self._program(running, batch)
                step += 1
                buffer.add(step, metrics | self._request(session))
                due = self._due(step, session)
                if not any(due) and not self._requested(session) and not buffer.diverged:
                    continue
                with buffer.paused():
                    point = Progress(self._program.whole(running), step, data_state)
                    self._pause(session, point, due)
        finally:
            iterator.close()
            buffer.close()
            bar.close()
        skipped = int(self._program.whole(running).skipped)
        log.info("%s: trained, %s, %d steps skipped", self.name, buffer.rates(), skipped)

    def _pause(self, session: Session, point: Progress, due: Due) -> None:
        """Saves a snapshot, a checkpoint unless that is all, then draws and evaluates what is due.

        All processes come here after the same step, and the metrics of all steps are known.
        """
        # A signal: nothing comes before the save, as there may be seconds left.
        if self._requested(session) == STOP:
            self._save(session, point, loss=None)
            raise session.stop.interruption

        if due.snapshot:
            session.snapshots.save(point.state, self._about_at(point))
        if not any(due._replace(snapshot=False)) and not (
            self._requested(session) or session.buffer.diverged
        ):
            return

        # The checkpoint. A signal during the validation skips what would follow.
        self._save(session, point, loss=self._validate(session, point))
        if distributed.in_any_process(bool(session.stop.requested)):
            raise session.stop.interruption
        session.clock.restart()
        session.buffer.request = 0

        # What may take long.
        diverged = session.buffer.diverged
        if distributed.is_primary():
            session.curves.draw(last=point.step == self._last_step or bool(diverged))
        if diverged:
            raise Diverged(diverged)
        if due.preview:
            self._preview(session.probe, point, session.writer)
            distributed.meet("process 0, which draws a preview")
        if due.evaluation:
            session.checkpoints.wait()  # an interrupted evaluation is resumed from this checkpoint
            self._evaluate(session.probe, point, session.writer)

    def _start(self, checkpoints: store.Checkpoints) -> Progress:
        """Resumes or initialises; from here on the training counts as its checkpoints do."""
        start = Starter(
            name=self.name,
            stage=self.stage,
            about=self._about,
            program=self._program,
            key=self._key(RandomStream.INIT),
            allow_changes=self._allow_changes,
        ).start(checkpoints)
        self._about |= start.history
        self._before = start.before
        self._count = start.count
        if self._count.step:  # the batch size has changed, and with it the learning rate's schedule
            self._program = self._build()
        return start.progress

    def _build(self) -> Program:
        return PROGRAMS[self._config.parallel.mode](
            self.stage,
            self.source.image_shape,
            len(self.source.class_names),
            self._key(RandomStream.TRAIN),
            self.mesh,
            self._count,
            self.source.cell,
            self._objective(),
        )

    def _key(self, stream: RandomStream) -> Key[Array, ""]:
        return random_streams.stream_key(self._config.seed, self._number - 1, stream)

    def _compile(self) -> None:
        """Compiles all that runs between a signal and its checkpoint, and the validation loss."""
        began = time.perf_counter()
        log.info("%s: compiling the training step", self.name)
        with ThreadPoolExecutor(1) as pool:  # XLA compiles a program on one core for the most part
            validation = pool.submit(self._validation.compile, self.abstract.ema)
            self._program.compile()
            validation.result()
        log.info("%s: training step compiled in %.1f s", self.name, time.perf_counter() - began)

    def _iterator(self, state: dict[str, int]) -> TrainIterator:
        iterator = train_iterator(
            self.source,
            batch_size=self.training.batch_size,
            seed=self._data_seed,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            first=(self._count.step, self._count.images),
            workers=self._config.data.workers,
            worker_timeout=self._config.data.worker_timeout,
            text="text" in self._program.inputs,
        )
        iterator.set_state(state)
        return iterator

    def _batches(
        self, iterator: TrainIterator
    ) -> Iterator[tuple[dict[str, jax.Array], dict[str, int]]]:
        """Yields batches that are on their way to the devices, with the iterator's state after."""
        indices = np.arange(self.training.batch_size, dtype=np.int32)
        position = indices.reshape(jax.process_count(), -1)[jax.process_index()]
        ahead: collections.deque = collections.deque()
        while True:
            while len(ahead) <= BATCHES_AHEAD:
                batch = next(iterator) | {"position": position}
                batch = self._program.put({name: batch[name] for name in self._program.inputs})
                ahead.append((batch, iterator.get_state()))
            yield ahead.popleft()

    @property
    def _last_step(self) -> int:
        return self._count.steps_for(self.training.images)

    def _due(self, step: int, session: Session) -> Due:
        probe = session.probe
        return Due(
            preview=probe is not None and self._is_due(step, self.training.preview_every),
            evaluation=self._is_due(step, self._evaluate_every(probe)),
            checkpoint=self._is_due(step, self.training.checkpoint_every),
            snapshot=session.snapshots.is_due(self._count, step),
        )

    def _is_due(self, step: int, every: int) -> bool:
        """Whether something happens after a step: every so many images, and at the end.

        Never for 0 images.
        """
        return bool(every) and (self._count.is_due(step, every) or step == self._last_step)

    def _evaluate_every(self, probe: Probe | None) -> int:
        return self.training.evaluate_every if probe is not None and probe.evaluates else 0

    def _request(self, session: Session) -> dict[str, jax.Array]:
        """Returns a metric that tells all processes, at the same step, what one of them wants."""
        if jax.process_count() == 1:
            return {}
        wanted = 0
        distributed.hear_preemption(session.stop)
        if session.stop.requested:
            wanted = STOP
        elif distributed.is_primary() and session.clock.is_over():
            wanted = SAVE
        return {"request": distributed.largest(wanted)}

    def _requested(self, session: Session) -> int:
        """Returns STOP, SAVE or 0: what is to be done now, the same in all processes."""
        if jax.process_count() > 1:
            return session.buffer.request
        if session.stop.requested:
            return STOP
        return SAVE if session.clock.is_over() else 0

    def _save(self, session: Session, point: Progress, loss: float | None) -> None:
        session.snapshots.wait()  # a resumed run has those before its checkpoint
        about = {**self._about_at(point), "data": point.data, "validation_loss": loss}
        session.checkpoints.save(point.state, about)

    def _about_at(self, point: Progress) -> dict[str, Any]:
        return {**self._about, "images_seen": self._count.images_at(point.step)}

    def _validate(self, session: Session, point: Progress) -> float | None:
        """Measures and writes the validation loss; None if not finite, or if a signal came."""
        loss = self._validation.loss(point.state.ema, session.stop)
        if loss is None:
            return None
        images = self._count.images_at(point.step)
        session.writer.write(point.step, images=images, validation_loss=loss)
        return loss if math.isfinite(loss) else None

    def _preview(self, probe: Probe, point: Progress, writer: metric_writer.Writer) -> None:
        params, images = self._local_ema(point.state), self._count.images_at(point.step)
        if distributed.is_primary():
            path = self.directory / "previews" / f"{images:010d}.png"
            with log_write_errors(path):
                probe.preview(params, path)
                writer.picture(path, images)

    def _evaluate(self, probe: Probe, point: Progress, writer: metric_writer.Writer) -> None:
        images = self._count.images_at(point.step)
        folder = self.directory / "evaluations" / f"{images:010d}"
        metrics = probe.evaluate(self._local_ema(point.state), images, folder)
        named = {f"evaluation/{name}": value for name, value in metrics.items()}
        writer.write(point.step, images=images, **named)

    def _finish_evaluation(self, point: Progress, probe: Probe | None) -> None:
        """Resumes the evaluation of the newest checkpoint if it was interrupted."""
        every = self._evaluate_every(probe)
        due = every and (self._before.is_due(point.step, every) or point.step == self._last_step)
        if point.step and due and not metric_writer.is_evaluated(self.directory, point.step):
            with metric_writer.open_writer(self._config, self.directory, point.step) as writer:
                self._evaluate(probe, point, writer)

    def _local_ema(self, state: TrainState) -> Any:
        """The EMA parameters, replicated on this process's devices."""
        return sharding.on_this_process(state.ema, sharding.local_mesh())
