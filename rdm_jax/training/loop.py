"""The training of one stage: from a config and prepared images to checkpoints, metrics and
previews."""

import collections
import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rdm_jax.checkpoints import folders, store
from rdm_jax.config import Config, to_dict
from rdm_jax.config.changes import Change, check_allowed, incompatible_changes
from rdm_jax.config.saved import VERSION
from rdm_jax.data.classes import Classes, matched, of_checkpoint
from rdm_jax.data.image_sets import ImageSet
from rdm_jax.data.pipeline import TrainIterator, train_iterator
from rdm_jax.runtime import distributed, random_streams, sharding
from rdm_jax.runtime.console import log, progress
from rdm_jax.runtime.errors import Diverged, Interrupted
from rdm_jax.runtime.files import log_write_errors
from rdm_jax.runtime.random_streams import RandomStream
from rdm_jax.runtime.signals import StopOnSignal
from rdm_jax.training import metric_writer
from rdm_jax.training.count import Count
from rdm_jax.training.metric_buffer import Clock, MetricBuffer
from rdm_jax.training.program import PROGRAMS, Program
from rdm_jax.training.step import TrainState
from rdm_jax.training.validation import Validation

Preview = Callable[[Any, Path], None]
Evaluate = Callable[[Any, int, Path], dict[str, float]]

# Batches on their way to the devices while a step runs.
BATCHES_AHEAD = 2
# What processes tell each other with every step: nothing, that the first one wants a save, that one
# has had a signal.
SAVE, STOP = 1, 2


class Point(NamedTuple):
    """Where a training is.

    Attributes:
      state: as checkpoints have it.
      step: steps taken.
      data: the data iterator's state.
    """

    state: TrainState
    step: int
    data: dict[str, int]


class Trainer:
    """One stage's training, ready to run: everything is built, and nothing is read or compiled yet.

    Args:
      config: of the run.
      number: of the stage, from 1.
      source: the images to learn.
      directory: of the stage, for checkpoints, metrics and previews.
      held_out: the images whose loss tells the best checkpoint; None for those of `source`.
      allow_changes: fields of the config that may have changed since the newest checkpoint
        (`unchanged.check_names`).

    Attributes:
      abstract: the state's shapes and shardings.
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
        self.name, self.stage = f"stage{number}", config.stage(number)
        self.training, self.source, self.directory = self.stage.training, source, directory
        self._key = lambda stream: random_streams.stream_key(config.seed, number - 1, stream)
        self.mesh, self._mode = (
            sharding.make_mesh(config.parallel.data, config.parallel.fsdp),
            config.parallel.mode,
        )
        self._count = self._before = Count(
            self.training.batch_size
        )  # of the steps to come, and of those that were taken
        self._program = self._build()
        self.objective, self.abstract = self._program.objective, self._program.abstract
        self._allow_changes = tuple(allow_changes)
        key = self._key(RandomStream.VALIDATE)
        self._validation = Validation(
            self.objective, held_out or source, self.training, key, self.mesh
        )
        self._about = {
            "version": VERSION,
            "stage": to_dict(config)[self.name],
            "classes": list(source.class_names),
            "seed": config.seed,
        }
        self._worker_options = {
            "workers": config.data.workers,
            "worker_timeout": config.data.worker_timeout,
        }
        self._data_seed = (
            config.seed * 2**8 + number
        )  # no stage of a run shares its order with another run's

    def run(
        self, stop: StopOnSignal, preview: Preview | None = None, evaluate: Evaluate | None = None
    ) -> None:
        """Trains to the configured number of images, from the newest checkpoint if there is one.

        Args:
          stop: looked at after every step; when a signal has come, the state is saved at once and
            `Interrupted` raised.
          preview: called with the averaged parameters and the path of a picture to draw, every
            `preview_every` images.
          evaluate: called with the averaged parameters, the images seen and a folder for the
            results, every `evaluate_every` images: an evaluation that is stopped is gone on with
              before training is. Returns metrics.

        Whatever may take long (a preview, an evaluation) comes after a checkpoint, as a signal is
        not obeyed before it ends.

        Raises:
          Diverged: after `max_skipped` steps in a row that were not finite; the last good state is
            saved.
          InputError: the checkpoint cannot be used, or the disk is too small for more.
          OSError: the last save has failed, or more than `max_failed_saves` in a row.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        self._about["images"] = {"count": len(self.source), "identity": self.source.identity}
        self._about["validated_on"] = self._validation.identity
        checkpoints = store.Checkpoints(
            self.directory / "checkpoints",
            keep_newest=self.training.keep_newest,
            keep_best=self.training.keep_best,
            max_failed_saves=self.training.max_failed_saves,
        )
        waits = True
        try:
            self._run(checkpoints, stop, preview, evaluate)
        except Interrupted as interruption:
            waits = not interruption.at_once
            raise
        finally:
            if waits:
                checkpoints.close()  # after a save under way, also when something else went wrong

    def _run(
        self,
        checkpoints: store.Checkpoints,
        stop: StopOnSignal,
        preview: Preview | None,
        evaluate: Evaluate | None,
    ) -> None:
        point = self._start(checkpoints)
        evaluate_every, last = (
            self.training.evaluate_every if evaluate else 0,
            self._count.steps_for(self.training.images),
        )
        preview_every = self.training.preview_every if preview else 0
        due = evaluate_every and (
            self._before.is_due(point.step, evaluate_every) or point.step == last
        )
        if point.step and due and not self._is_evaluated(point.step):  # it was stopped
            with contextlib.closing(self._writer(point.step)) as writer:
                self._evaluate(evaluate, point, writer)
        if point.step >= last:
            log.info(
                "%s: already trained on %s images",
                self.name,
                f"{self._count.images_at(point.step):,}",
            )
            return
        copies = self.training.keep_newest + self.training.keep_best + 1 - len(checkpoints.steps())
        store.check_space(self.directory, self.abstract, copies)
        self._compile()
        iterator, clock = self._iterator(point.data), Clock(60 * self.training.checkpoint_minutes)
        writer, bar, curves = (
            self._writer(point.step),
            progress(*self._bar(point.step)),
            metric_writer.Curves(self.directory),
        )
        window, batches = (
            MetricBuffer(self.training, self._count, writer, bar),
            self._batches(iterator),
        )
        running, step = self._program.place(point.state), point.step
        try:
            while step < last:
                batch, data_state = next(batches)
                running, values = self._program(running, batch)
                step += 1
                window.add(step, values | self._told(stop, clock))
                previewed, evaluated = (
                    self._is_due(step, preview_every),
                    self._is_due(step, evaluate_every),
                )
                due = previewed or evaluated or self._is_due(step, self.training.checkpoint_every)
                if not due and not self._asked(window, stop, clock) and not window.diverged:
                    continue
                with window.paused():
                    point = Point(self._program.whole(running), step, data_state)
                    if self._asked(window, stop, clock) == STOP:
                        self._save(
                            checkpoints, point, None
                        )  # and nothing before it: there may be no more than seconds
                        raise stop.interruption
                    self._save(checkpoints, point, self._validate(point, writer, stop))
                    if distributed.in_any_process(
                        bool(stop.requested)
                    ):  # while it was validated: nothing is measured or drawn
                        raise stop.interruption
                    clock.restart()
                    window.told = 0
                    if distributed.is_primary():
                        curves.draw(last=step == last or bool(window.diverged))
                    if window.diverged:
                        raise Diverged(window.diverged)
                    if previewed:
                        self._draw(preview, point)
                    if evaluated:
                        checkpoints.wait()  # an evaluation that is stopped is gone on with from this checkpoint
                        self._evaluate(evaluate, point, writer)
        finally:
            iterator.close()
            window.close()
            bar.close()
            writer.close()
        rate, skipped = (
            window.images / (window.seconds or float("nan")),
            int(self._program.whole(running).skipped),
        )
        log.info("%s: trained, %.0f images/s, %d steps skipped", self.name, rate, skipped)

    @property
    def _alone(self) -> bool:
        return jax.process_count() == 1

    def _told(self, stop: StopOnSignal, clock: Clock) -> dict[str, jax.Array]:
        """A metric by which all processes learn, at the same step, what one of them wants: SAVE,
        STOP or neither."""
        if self._alone:
            return {}
        wanted = (
            STOP if stop.requested else SAVE if distributed.is_primary() and clock.is_over() else 0
        )
        return {"told": distributed.largest(wanted)}

    def _asked(self, window: MetricBuffer, stop: StopOnSignal, clock: Clock) -> int:
        """What is to be done after this step besides what is due: SAVE, STOP or neither, the same
        in all processes."""
        if not self._alone:
            return window.told
        return STOP if stop.requested else SAVE if clock.is_over() else 0

    def _save(self, checkpoints: store.Checkpoints, point: Point, loss: float | None) -> None:
        checkpoints.save(point.state, {**self._about, "data": point.data, "validation_loss": loss})

    def _validate(
        self,
        point: Point,
        writer: metric_writer.MetricWriter | metric_writer.NoWriter,
        stop: StopOnSignal,
    ) -> float | None:
        """Measures the validation loss and writes it down; None where it is not finite, or a signal
        has come meanwhile."""
        loss = self._validation.loss(point.state.ema, stop)
        if loss is None:
            return None
        writer.write(point.step, images=self._count.images_at(point.step), validation_loss=loss)
        return loss if math.isfinite(loss) else None

    def _evaluate(
        self,
        evaluate: Evaluate,
        point: Point,
        writer: metric_writer.MetricWriter | metric_writer.NoWriter,
    ) -> None:
        images = self._count.images_at(point.step)
        values = evaluate(
            self._here(point.state), images, self.directory / "evaluations" / f"{images:010d}"
        )
        writer.write(
            point.step,
            images=images,
            **{f"evaluation/{name}": value for name, value in values.items()},
        )

    def _writer(self, step: int) -> metric_writer.MetricWriter | metric_writer.NoWriter:
        return (
            metric_writer.MetricWriter(self.directory, step)
            if distributed.is_primary()
            else metric_writer.NoWriter()
        )

    def _here(self, state: TrainState) -> Any:
        """The averaged parameters, whole on each of this process's devices."""
        return sharding.on_this_process(state.ema, sharding.local_mesh())

    def _batches(
        self, iterator: TrainIterator
    ) -> Iterator[tuple[dict[str, jax.Array], dict[str, int]]]:
        """Batches that are on their way to the devices already, each with the iterator's state
        after it."""
        size = self.training.batch_size
        position = np.arange(size, dtype=np.int32).reshape(jax.process_count(), -1)[
            jax.process_index()
        ]
        ahead: collections.deque = collections.deque()
        while True:
            while len(ahead) <= BATCHES_AHEAD:
                ahead.append(
                    (
                        self._program.put(next(iterator) | {"position": position}),
                        iterator.get_state(),
                    )
                )
            yield ahead.popleft()

    def _is_evaluated(self, step: int) -> bool:
        """Whether an evaluation of that step was written down, as the first process sees it."""
        lines = (
            metric_writer.read(self.directory / "metrics.jsonl") if distributed.is_primary() else []
        )
        found = any(
            name.startswith("evaluation/")
            for line in lines
            if line["step"] == step
            for name in line
        )
        return bool(distributed.from_primary(found))

    def _is_due(self, step: int, every: int) -> bool:
        """Whether something that happens every so many images, if they are more than 0, and at the
        end, happens after a step."""
        return bool(every) and (
            self._count.is_due(step, every) or step == self._count.steps_for(self.training.images)
        )

    def _iterator(self, state: dict[str, int]) -> TrainIterator:
        iterator = train_iterator(
            self.source,
            batch_size=self.training.batch_size,
            seed=self._data_seed,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            first=(self._count.step, self._count.images),
            **self._worker_options,
        )
        iterator.set_state(state)
        return iterator

    def _draw(self, preview: Preview, point: Point) -> None:
        params = self._here(point.state)
        if distributed.is_primary():
            path = self.directory / "previews" / f"{self._count.images_at(point.step):010d}.png"
            with log_write_errors(path):
                preview(params, path)

    def _bar(self, step: int) -> tuple[int, str, int]:
        last = self._count.steps_for(self.training.images)
        return self._count.images_at(last), f"training {self.name}", self._count.images_at(step)

    def _start(self, checkpoints: store.Checkpoints) -> Point:
        """Where to go on from: the newest checkpoint, or the beginning, with given parameters if
        there are any."""
        newest = checkpoints.newest()
        if newest is not None and checkpoints.can_resume(newest):
            return self._resume(checkpoints, newest)
        count = self.objective.network.num_parameters
        log.info(
            "%s: %s parameters, %d x %d pixels", self.name, f"{count:,}", *self.stage.resolution
        )
        state = self._program.init(self._key(RandomStream.INIT))
        if newest is not None:
            state = self._with_parameters(state, checkpoints, newest)
        elif self.training.start_from:
            folder, step = folders.find(self.training.start_from, self.directory)
            with contextlib.closing(store.Checkpoints(folder, read_only=True)) as given:
                state = self._with_parameters(state, given, step)
        return Point(state, 0, {"next_index": 0})

    def _resume(self, checkpoints: store.Checkpoints, step: int) -> Point:
        about = checkpoints.about(step)
        found = changed_since(about, self._about, self.name)
        before = Count(about["stage"]["training"]["batch_size"], **about.get("count", {}))
        if (
            before.images_at(step) >= self.training.images
        ):  # nothing more is learnt, from whatever images
            found = [change for change in found if not change.field.startswith("config.data.")]
        check_allowed(found, self._allow_changes, f"checkpoint {checkpoints.directory / str(step)}")
        self._keep_history(about, step, found, before)
        state, _ = checkpoints.restore(step, self.abstract)
        state = state.replace(
            skipped_in_a_row=jnp.zeros_like(state.skipped_in_a_row)
        )  # a run that diverged may try again
        images = self._count.images_at(step)
        if step < self._count.steps_for(self.training.images):
            for change in found:
                log.warning(
                    "%s: from step %d (%s images) on, %s", self.name, step, f"{images:,}", change
                )
            log.info("%s: going on from %s images", self.name, f"{images:,}")
        return Point(state, step, about["data"])

    def _keep_history(
        self, about: dict[str, Any], step: int, found: Sequence[Change], before: Count
    ) -> None:
        """Takes over what a checkpoint knows of the training before it, with what changes now."""
        self._about |= {
            name: about[name] for name in ("started_from", "changes", "count") if name in about
        }
        if found:
            self._about["changes"] = [
                *self._about.get("changes", []),
                *({"step": step, **each._asdict()} for each in found),
            ]
        self._before, self._count = before, before.changed(self.training.batch_size, step)
        if self._count.step:
            self._about["count"] = {"step": self._count.step, "images": self._count.images}
            self._program = self._build()

    def _build(self) -> Program:
        kind, classes = PROGRAMS[self._mode], len(self.source.class_names)
        return kind(
            self.stage,
            self.source.image_shape,
            classes,
            self._key(RandomStream.TRAIN),
            self.mesh,
            self._count,
        )

    def _with_parameters(
        self, state: TrainState, given: store.Checkpoints, step: int
    ) -> TrainState:
        """Puts averaged parameters of another training in place of random ones; the embedding of
        other classes stays random."""
        theirs, ours, about = given.abstract_ema(step), dict(self.abstract.ema), given.about(step)
        names = self.stage.network.condition_parameters
        embedding = {name: theirs[name] for name in names if name in theirs}
        same = jax.tree.map(lambda x: x.shape, embedding) == jax.tree.map(
            lambda x: x.shape, {name: ours[name] for name in names if name in ours}
        )
        places = (
            matched(Classes(tuple(self._about["classes"])), of_checkpoint(about)) if same else None
        )
        same = places == tuple(range(len(self._about["classes"])))
        if not same:
            ours = {name: part for name, part in ours.items() if name not in names}
            ours |= sharding.by_rules(embedding, self.mesh)
            log.info(
                "%s: the embedding of the classes starts afresh, as they are others than the given parameters'",
                self.name,
            )
        ema, about = given.restore_ema(step, ours)
        where = str(given.directory / str(step))
        self._about["started_from"] = {"checkpoint": where} | {
            k: about[k] for k in ("imported",) if k in about
        }
        if about["stage"]["precondition"] != self._about["stage"]["precondition"]:
            log.info(
                "%s: the given parameters are of another preconditioning (%s)",
                self.name,
                about["stage"]["precondition"],
            )
        ema = {
            k: ema[k] if k in ema and (same or k not in names) else fresh
            for k, fresh in state.ema.items()
        }
        log.info("%s: starting with the parameters in %s", self.name, given.directory / str(step))
        return state.replace(params=jax.tree.map(jnp.copy, ema), ema=ema)

    def _compile(self) -> None:
        """Compiles all that comes between a signal and its checkpoint, and the validation loss,
        before anything can be lost."""
        began = time.perf_counter()
        log.info("%s: compiling the training step", self.name)
        self._program.compile()
        log.info("%s: training step compiled in %.1f s", self.name, time.perf_counter() - began)
        self._validation.compile(self.abstract.ema)


def changed_since(about: dict[str, Any], now: dict[str, Any], name: str) -> list[Change]:
    """What is different between two checkpoints of the stage `name`, by what they know of
    themselves, and not free.

    Those of older versions do not know their images.
    """
    known = about.keys() & now.keys()
    as_config = lambda it: {  # noqa: E731
        **{key: it[key] for key in ("seed", "classes") if key in known},
        name: it["stage"],
        "data": {"images": it["images"]} if "images" in known else {},
    }
    return incompatible_changes(as_config(about), as_config(now))
