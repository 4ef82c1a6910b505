"""The training of one stage: from a config and prepared images to checkpoints, metrics and previews."""

import collections
import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rdm_jax import distributed, randomness, sharding
from rdm_jax.config import Config, to_dict
from rdm_jax.data.image_sets import ImageSet
from rdm_jax.data.pipeline import TrainIterator, train_iterator
from rdm_jax.errors import InputError
from rdm_jax.files import dispensable
from rdm_jax.interrupt import Interrupted, StopOnSignal
from rdm_jax.randomness import Stream
from rdm_jax.terminal import log, progress
from rdm_jax.training import checkpoint, metrics
from rdm_jax.training.program import PROGRAMS
from rdm_jax.training.step import TrainState
from rdm_jax.training.window import Window, is_due
from rdm_jax.unchanged import changes

Preview = Callable[[Any, Path], None]
Evaluate = Callable[[Any, int, Path], dict[str, float]]

# Batches on their way to the devices while a step runs.
BATCHES_AHEAD = 2


class Diverged(RuntimeError):
    """Too many steps in a row had a loss or gradient that is not finite."""


class Trainer:
    """One stage's training, ready to run: everything is built, and nothing is read or compiled yet.

    Args:
      config: of the run.
      number: of the stage, from 1.
      source: the images to learn.
      directory: of the stage, for checkpoints, metrics and previews.
      held_out: the images whose loss tells the best checkpoint; None for those of `source`.

    Attributes:
      abstract: the state's shapes and shardings.
    """

    def __init__(self, config: Config, number: int, source: ImageSet, directory: Path, held_out: ImageSet | None = None):
        self.name, self.stage = f"stage{number}", config.stages[number - 1]
        self.training, self.source, self.directory = self.stage.training, source, directory
        key = lambda stream: randomness.stream_key(config.seed, number - 1, stream)  # noqa: E731
        self.mesh = sharding.make_mesh(config.parallel.data, config.parallel.fsdp)
        kind, classes = PROGRAMS[config.parallel.mode], len(source.class_names)
        self._program = kind(self.stage, source.image_shape, classes, key(Stream.TRAIN), self.mesh)
        self.objective, self.abstract = self._program.objective, self._program.abstract
        self._init_key, self._validation_key, self._held_out = key(Stream.INIT), key(Stream.VALIDATE), held_out or source
        self._validated = dataclasses.replace(self.objective, augmentation=None, flip=False)
        self._about = {"stage": to_dict(config)[self.name], "classes": list(source.class_names), "seed": config.seed}
        self._worker_options = {"workers": config.data.workers, "worker_timeout": config.data.worker_timeout}
        self._data_seed = config.seed * 2**8 + number  # no stage of a run shares its order with another run's

    def run(self, stop: StopOnSignal, preview: Preview | None = None, evaluate: Evaluate | None = None) -> None:
        """Trains to the configured number of images, from the newest checkpoint if there is one.

        Args:
          stop: looked at after every step; when a signal has come, the state is saved and `Interrupted` raised.
          preview: called with the averaged parameters and the path of a picture to draw, every `preview_every` images.
          evaluate: called with the averaged parameters, the images seen and a folder for the results, every `evaluate_every`
            images, after a checkpoint: an evaluation that is stopped is gone on with before training is. Returns metrics.

        Raises:
          Diverged: after `max_skipped` steps in a row that were not finite; the last good state is saved.
          InputError: the checkpoint cannot be used, or the disk is too small for more.
          OSError: the last save has failed, or more than `max_failed_saves` in a row.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        checkpoints = checkpoint.Checkpoints(
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
        self, checkpoints: checkpoint.Checkpoints, stop: StopOnSignal, preview: Preview | None, evaluate: Evaluate | None
    ) -> None:
        iterator = self._iterator()
        state, step = self._start(checkpoints, iterator)
        every = self.training.evaluate_every if evaluate else 0

        def evaluation(writer: metrics.MetricWriter) -> None:
            images = step * self.training.batch_size
            values = evaluate(self._here(state), images, self.directory / "evaluations" / f"{images:010d}")
            writer.write(step, images=images, **{f"evaluation/{name}": value for name, value in values.items()})

        if step and self._is_due(step, every) and not self._is_evaluated(step):  # it was stopped
            with contextlib.closing(self._writer(step)) as writer:
                evaluation(writer)
        if step >= self.training.steps:
            log.info("%s: already trained on %s images", self.name, f"{step * self.training.batch_size:,}")
            return
        copies = self.training.keep_newest + self.training.keep_best + 1 - len(checkpoints.steps())
        checkpoint.check_space(self.directory, self.abstract, copies)
        self._compile()
        validate = jax.jit(self._validation_loss, out_shardings=sharding.replicated(self.mesh))
        writer, bar, curves = self._writer(step), progress(*self._bar(step)), metrics.Curves(self.directory)

        def save(last: bool) -> None:
            loss = float(np.mean([np.asarray(validate(state.ema, *part)) for part in self._held_images()]))
            writer.write(step, images=step * self.training.batch_size, validation_loss=loss)
            about = {**self._about, "data": data_state, "validation_loss": loss if math.isfinite(loss) else None}
            checkpoints.save(state, about)
            if distributed.is_first():
                curves.draw(last)

        window, batches = Window(self.training, writer, bar), self._batches(iterator)
        running = self._program.place(state)
        try:
            while step < self.training.steps:
                batch, data_state = next(batches)
                running, values = self._program(running, batch)
                step += 1
                window.add(step, values | self._stop_of_any(stop))
                if preview and self._is_due(step, self.training.preview_every):
                    with window.paused():
                        self._draw(preview, self._here(self._program.whole(running)), step)
                # What the steps in flight have found is known after a preview, so that only now it is clear what is to be saved.
                evaluated, stopped = self._is_due(step, every), window.stopped or (self._alone and bool(stop.requested))
                ends = step == self.training.steps or stopped or bool(window.diverged)
                if self._is_due(step, self.training.checkpoint_every) or evaluated or ends:
                    with window.paused():
                        state = self._program.whole(running)
                        save(last=ends)
                    if stopped:
                        raise stop.interruption
                if window.diverged:
                    raise Diverged(window.diverged)
                if evaluated:
                    with window.paused():
                        checkpoints.wait()  # an evaluation that is stopped is gone on with from this checkpoint
                        evaluation(writer)
        finally:
            iterator.close()
            window.close()
            bar.close()
            writer.close()
        rate, skipped = window.images / (window.seconds or float("nan")), int(self._program.whole(running).skipped)
        log.info("%s: trained, %.0f images/s, %d steps skipped", self.name, rate, skipped)

    @property
    def _alone(self) -> bool:
        return jax.process_count() == 1

    def _stop_of_any(self, stop: StopOnSignal) -> dict[str, jax.Array]:
        """A metric by which all processes learn, at the same step, that one of them was told to stop."""
        return {} if self._alone else {"stop": distributed.any_process(bool(stop.requested))}

    def _writer(self, step: int) -> metrics.MetricWriter | metrics.NoWriter:
        return metrics.MetricWriter(self.directory, step) if distributed.is_first() else metrics.NoWriter()

    def _here(self, state: TrainState) -> Any:
        """The averaged parameters, whole on each of this process's devices."""
        return sharding.on_this_process(state.ema, sharding.local_mesh())

    def _batches(self, iterator: TrainIterator) -> Iterator[tuple[dict[str, jax.Array], dict[str, int]]]:
        """Batches that are on their way to the devices already, each with the iterator's state after it."""
        size = self.training.batch_size
        position = np.arange(size, dtype=np.int32).reshape(jax.process_count(), -1)[jax.process_index()]
        ahead: collections.deque = collections.deque()
        while True:
            while len(ahead) <= BATCHES_AHEAD:
                ahead.append((self._program.put(next(iterator) | {"position": position}), iterator.get_state()))
            yield ahead.popleft()

    def _is_evaluated(self, step: int) -> bool:
        lines = [line for line in metrics.read(self.directory / "metrics.jsonl") if line["step"] == step]
        return any(name.startswith("evaluation/") for line in lines for name in line)

    def _is_due(self, step: int, every: int) -> bool:
        """Whether something that happens every so many images, if they are more than 0, and at the end, happens after a step."""
        return bool(every) and (is_due(step, self.training.batch_size, every) or step == self.training.steps)

    def _iterator(self) -> TrainIterator:
        kwargs = {"process_index": jax.process_index(), "process_count": jax.process_count()} | self._worker_options
        return train_iterator(self.source, batch_size=self.training.batch_size, seed=self._data_seed, **kwargs)

    def _draw(self, preview: Preview, params: Any, step: int) -> None:
        if distributed.is_first():
            path = self.directory / "previews" / f"{step * self.training.batch_size:010d}.png"
            with dispensable(path):
                preview(params, path)

    def _bar(self, step: int) -> tuple[int, str, int]:
        batch_size = self.training.batch_size
        return self.training.steps * batch_size, f"training {self.name}", step * batch_size

    def _start(self, checkpoints: checkpoint.Checkpoints, iterator: TrainIterator) -> tuple[TrainState, int]:
        """The state to go on from: of the newest checkpoint, or a new one, with given parameters if there are any."""
        steps = checkpoints.steps()
        if steps and checkpoints.can_resume(steps[-1]):
            self._check_unchanged(checkpoints.about(steps[-1]), checkpoints.directory / str(steps[-1]))
            state, about = checkpoints.restore(steps[-1], self.abstract)
            iterator.set_state(about["data"])
            self._about |= {k: about[k] for k in ("started_from",) if k in about}
            state = state.replace(skipped_in_a_row=jnp.zeros_like(state.skipped_in_a_row))  # a run that diverged may try again
            if steps[-1] < self.training.steps:
                log.info("%s: going on from %s images", self.name, f"{steps[-1] * self.training.batch_size:,}")
            return state, steps[-1]
        count = self.objective.network.count()
        log.info("%s: %s parameters, %d x %d pixels", self.name, f"{count:,}", *self.stage.resolution)
        state = self._program.init(self._init_key)
        if steps:
            return self._with_parameters(state, checkpoints, steps[-1]), 0
        if self.training.start_from:
            folder, step = checkpoint.find(self.training.start_from, self.directory)
            given = checkpoint.Checkpoints(folder, read_only=True)
            state = self._with_parameters(state, given, step)
            given.close()
        return state, 0

    def _check_unchanged(self, about: dict[str, Any], where: Path) -> None:
        """Refuses to go on from what was learnt otherwise, whatever the workdir's config.json says. Raises InputError."""
        fields = {"seed": "seed", "classes": "classes", self.name: "stage"}
        before, now = ({field: known.get(name) for field, name in fields.items()} for known in (about, self._about))
        listed = changes(before, json.loads(json.dumps(now)), "config")
        if listed:
            raise InputError(f"checkpoint {where} was trained with another config ({listed}); another workdir would do.")

    def _with_parameters(self, state: TrainState, given: checkpoint.Checkpoints, step: int) -> TrainState:
        """Puts averaged parameters of another training in place of random ones; the embedding of other classes stays random."""
        theirs, ours = given.abstract_ema(step), dict(self.abstract.ema)
        label = theirs.get("map_label")
        same = jax.tree.map(lambda x: x.shape, label) == jax.tree.map(lambda x: x.shape, ours.get("map_label"))
        if not same:
            ours.pop("map_label", None)
            ours |= {"map_label": sharding.by_rules(label, self.mesh)} if label else {}
            log.info("%s: the embedding of the classes starts afresh, as they are others than the given parameters'", self.name)
        ema, about = given.restore_ema(step, ours)
        where = str(given.directory / str(step))
        self._about["started_from"] = {"checkpoint": where} | {k: about[k] for k in ("imported",) if k in about}
        if about["stage"]["precondition"] != self._about["stage"]["precondition"]:
            log.info("%s: the given parameters are of another preconditioning (%s)", self.name, about["stage"]["precondition"])
        ema = {k: ema[k] if k in ema and (same or k != "map_label") else fresh for k, fresh in state.ema.items()}
        log.info("%s: starting with the parameters in %s", self.name, given.directory / str(step))
        return state.replace(params=jax.tree.map(jnp.copy, ema), ema=ema)

    def _compile(self) -> None:
        began = time.perf_counter()
        log.info("%s: compiling the training step", self.name)
        self._program.compile()
        log.info("%s: training step compiled in %.1f s", self.name, time.perf_counter() - began)

    def _held_images(self) -> Iterator[tuple[dict[str, jax.Array], jax.Array]]:
        """The images that tell the best checkpoint, evenly from their set (which may be sorted), in parts like training's."""
        batch_size, count = self.training.batch_size, jax.process_count()
        images = np.linspace(0, len(self._held_out) - 1, -(-self.training.validation // batch_size) * batch_size).astype(int)
        size = batch_size // self.training.accumulate
        for first in range(0, len(images), size):
            here = np.arange(first, first + size).reshape(count, -1)[jax.process_index()]
            yield sharding.put_batch((self._held_out.batch(images[here]), here), self.mesh)

    def _validation_loss(self, params: Any, batch: dict[str, jax.Array], number: jax.Array) -> jax.Array:
        """The loss of fixed images, as they are, at fixed levels with fixed noise, labels dropped as in training."""
        return self._validated.loss(params, batch, randomness.image_keys(self._validation_key, number), dropout=False).mean()
