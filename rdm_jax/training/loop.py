"""The training of one stage: from a config and prepared images to checkpoints, metrics and previews."""

import collections
import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rdm_jax import randomness, sharding
from rdm_jax.config import Config, Stage, Training, to_dict
from rdm_jax.data.augment import Augmentation
from rdm_jax.data.image_sets import ImageSet
from rdm_jax.data.pipeline import TrainIterator, train_iterator
from rdm_jax.interrupt import StopOnSignal
from rdm_jax.randomness import Stream
from rdm_jax.terminal import log, progress
from rdm_jax.training import checkpoint, metrics
from rdm_jax.training.step import Objective, TrainState, init_state, make_step

Preview = Callable[[Any, Path], None]
Evaluate = Callable[[Any, int, Path], dict[str, float]]

# Steps whose metrics are awaited: few, so that a run of bad steps is noticed at once, but not 0, so that devices never idle.
STEPS_IN_FLIGHT = 2


class Diverged(RuntimeError):
    """Too many steps in a row had a loss or gradient that is not finite."""


def build_objective(stage: Stage, source: ImageSet) -> Objective:
    """What the stage learns from images of its own resolution, or of a later stage's."""
    training, classes = stage.training, len(source.class_names)
    return Objective(
        network=stage.build(source.image_shape[-1], classes),
        process=stage.process,
        precondition=stage.precondition,
        pool=source.image_shape[0] // stage.resolution[0],
        classes=classes,
        label_dropout=training.label_dropout,
        augmentation=Augmentation(training.augment) if training.augment else None,
        flip=training.flip,
    )


def build_optimizer(training: Training) -> optax.GradientTransformation:
    """Adam with a linear warm-up."""
    warmup = max(1, training.warmup // training.batch_size)
    rate = optax.linear_schedule(0.0, training.learning_rate, warmup)
    return optax.adam(rate, b1=training.beta1, b2=training.beta2, eps=training.epsilon)


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
        self.objective, optimizer = build_objective(self.stage, source), build_optimizer(self.training)
        self.mesh = sharding.data_mesh()
        key = lambda stream: randomness.stream_key(config.seed, number - 1, stream)  # noqa: E731
        self._step = make_step(
            self.objective,
            optimizer,
            key(Stream.TRAIN),
            batch_size=self.training.batch_size,
            accumulate=self.training.accumulate,
            ema_halflife=self.training.ema_halflife,
            ema_rampup=self.training.ema_rampup,
        )
        self._init = lambda: init_state(self.objective.network, optimizer, key(Stream.INIT))
        self.abstract = checkpoint.with_sharding(jax.eval_shape(self._init), sharding.replicated(self.mesh))
        self._validation_key, self._held_out = key(Stream.VALIDATE), held_out or source
        self._validated = dataclasses.replace(self.objective, augmentation=None, flip=False)
        self._about = {"stage": to_dict(config)[self.name], "classes": list(source.class_names), "seed": config.seed}
        self._workers = config.data.workers
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
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        checkpoints = checkpoint.Checkpoints(
            self.directory / "checkpoints", keep_newest=self.training.keep_newest, keep_best=self.training.keep_best
        )
        try:
            self._run(checkpoints, stop, preview, evaluate)
        finally:
            checkpoints.close()  # waits for a save under way, also when something else went wrong

    def _run(
        self, checkpoints: checkpoint.Checkpoints, stop: StopOnSignal, preview: Preview | None, evaluate: Evaluate | None
    ) -> None:
        iterator = self._iterator()
        state, step = self._start(checkpoints, iterator)
        every = self.training.evaluate_every if evaluate else 0

        def evaluation(writer: metrics.MetricWriter) -> None:
            images = step * self.training.batch_size
            values = evaluate(state.ema, images, self.directory / "evaluations" / f"{images:010d}")
            writer.write(step, images=images, **{f"evaluation/{name}": value for name, value in values.items()})

        if step and self._is_due(step, every) and not self._is_evaluated(step):  # it was stopped
            with contextlib.closing(metrics.MetricWriter(self.directory, step)) as writer:
                evaluation(writer)
        if step >= self.training.steps:
            log.info("%s: already trained on %s images", self.name, f"{step * self.training.batch_size:,}")
            return
        copies = self.training.keep_newest + self.training.keep_best + 1 - len(checkpoints.steps())
        checkpoint.check_space(self.directory, self.abstract, copies)
        compiled, validate = self._compile(state), jax.jit(self._validation_loss)
        writer, bar = metrics.MetricWriter(self.directory, step), progress(*self._bar(step))

        def save(state: TrainState) -> None:
            loss = float(np.mean([np.asarray(validate(state.ema, *part)) for part in self._held_images()]))
            writer.write(step, images=step * self.training.batch_size, validation_loss=loss)
            about = {**self._about, "data": iterator.get_state(), "validation_loss": loss}
            checkpoints.save(state, about)
            metrics.draw_curves(self.directory)

        window = _Window(self.training, writer, bar)
        try:
            while step < self.training.steps:
                state, values = compiled(state, sharding.put_batch(next(iterator), self.mesh))
                step += 1
                window.add(step, values)
                if preview and self._is_due(step, self.training.preview_every):
                    with window.paused():
                        preview(state.ema, self.directory / "previews" / f"{step * self.training.batch_size:010d}.png")
                evaluated = self._is_due(step, every)
                if self._is_due(step, self.training.checkpoint_every) or evaluated or stop.requested or window.diverged:
                    with window.paused():
                        save(state)
                    stop.check()
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
        seconds = window.seconds or float("nan")
        log.info("%s: trained, %.0f images/s, %d steps skipped", self.name, window.images / seconds, int(state.skipped))

    def _is_evaluated(self, step: int) -> bool:
        lines = [line for line in metrics.read(self.directory / "metrics.jsonl") if line["step"] == step]
        return any(name.startswith("evaluation/") for line in lines for name in line)

    def _is_due(self, step: int, every: int) -> bool:
        """Whether something that happens every so many images, if they are more than 0, and at the end, happens after a step."""
        return bool(every) and (_due(step, self.training.batch_size, every) or step == self.training.steps)

    def _iterator(self) -> TrainIterator:
        kwargs = {"process_index": jax.process_index(), "process_count": jax.process_count(), "workers": self._workers}
        return train_iterator(self.source, batch_size=self.training.batch_size, seed=self._data_seed, **kwargs)

    def _bar(self, step: int) -> tuple[int, str, int]:
        batch_size = self.training.batch_size
        return self.training.steps * batch_size, f"training {self.name}", step * batch_size

    def _start(self, checkpoints: checkpoint.Checkpoints, iterator: TrainIterator) -> tuple[TrainState, int]:
        """The state to go on from: of the newest checkpoint, or a new one, with given parameters if there are any."""
        steps = checkpoints.steps()
        if steps and checkpoints.can_resume(steps[-1]):
            state, about = checkpoints.restore(steps[-1], self.abstract)
            iterator.set_state(about["data"])
            self._about |= {k: about[k] for k in ("started_from",) if k in about}
            state = state.replace(skipped_in_a_row=jnp.zeros_like(state.skipped_in_a_row))  # a run that diverged may try again
            if steps[-1] < self.training.steps:
                log.info("%s: going on from %s images", self.name, f"{steps[-1] * self.training.batch_size:,}")
            return state, steps[-1]
        count = self.objective.network.count()
        log.info("%s: %s parameters, %d x %d pixels", self.name, f"{count:,}", *self.stage.resolution)
        shardings = jax.tree.map(lambda x: x.sharding, self.abstract)
        # It runs once: optimising the drawing of some hundred small arrays takes longer than drawing them.
        options = {"xla_backend_optimization_level": 0}
        state = jax.jit(self._init, out_shardings=shardings, compiler_options=options)()
        if steps:
            return self._with_parameters(state, checkpoints, steps[-1]), 0
        if self.training.start_from:
            folder, step = checkpoint.find(self.training.start_from, self.directory)
            given = checkpoint.Checkpoints(folder, read_only=True)
            state = self._with_parameters(state, given, step)
            given.close()
        return state, 0

    def _with_parameters(self, state: TrainState, given: checkpoint.Checkpoints, step: int) -> TrainState:
        """Puts averaged parameters of another training in place of random ones; the embedding of other classes stays random."""
        theirs, ours = given.abstract_ema(step), dict(self.abstract.ema)
        label = theirs.get("map_label")
        same = jax.tree.map(lambda x: x.shape, label) == jax.tree.map(lambda x: x.shape, ours.get("map_label"))
        if not same:
            ours.pop("map_label", None)
            ours |= {"map_label": checkpoint.with_sharding(label, sharding.replicated(self.mesh))} if label else {}
            log.info("%s: the embedding of the classes starts afresh, as they are others than the given parameters'", self.name)
        ema, about = given.restore_ema(step, ours)
        where = str(given.directory / str(step))
        self._about["started_from"] = {"checkpoint": where} | {k: about[k] for k in ("imported",) if k in about}
        if about["stage"]["precondition"] != self._about["stage"]["precondition"]:
            log.info("%s: the given parameters are of another preconditioning (%s)", self.name, about["stage"]["precondition"])
        ema = {k: ema[k] if k in ema and (same or k != "map_label") else fresh for k, fresh in state.ema.items()}
        log.info("%s: starting with the parameters in %s", self.name, given.directory / str(step))
        return state.replace(params=jax.tree.map(jnp.copy, ema), ema=ema)

    def _compile(self, state: TrainState):
        began, size = time.perf_counter(), self.training.batch_size
        log.info("%s: compiling the training step", self.name)
        batch = {
            "image": jax.ShapeDtypeStruct((size, *self.source.image_shape), jnp.uint8, sharding=sharding.batched(self.mesh)),
            "label": jax.ShapeDtypeStruct((size,), jnp.int32, sharding=sharding.batched(self.mesh)),
        }
        whole = sharding.replicated(self.mesh)
        shardings = jax.tree.map(lambda _: whole, self.abstract), whole
        compiled = jax.jit(self._step, donate_argnums=0, out_shardings=shardings).lower(state, batch).compile()
        log.info("%s: training step compiled in %.1f s", self.name, time.perf_counter() - began)
        return compiled

    def _held_images(self) -> Iterator[tuple[dict[str, jax.Array], jax.Array]]:
        """The images that tell the best checkpoint, evenly from their whole set (which may be sorted), in batches."""
        size, count = self.training.batch_size, jax.process_count()
        images = np.linspace(0, len(self._held_out) - 1, -(-self.training.validation // size) * size).astype(int)
        for first in range(0, len(images), size):
            here = np.arange(first, first + size).reshape(count, -1)[jax.process_index()]
            yield sharding.put_batch((self._held_out.batch(images[here]), here), self.mesh)

    def _validation_loss(self, params: Any, batch: dict[str, jax.Array], number: jax.Array) -> jax.Array:
        """The loss of fixed images, as they are, at fixed levels with fixed noise, labels dropped as in training."""
        return self._validated.loss(params, batch, randomness.image_keys(self._validation_key, number), None).mean()


class _Window:
    """Gathers the metrics of steps as they become known, writes their means, and watches for divergence.

    Attributes:
      images, seconds: trained so far, the time of pauses left out.
      diverged: what to tell the user once too many steps in a row were not finite, else ''.
    """

    def __init__(self, training: Training, writer: metrics.MetricWriter, bar):
        self._training, self._writer, self._bar = training, writer, bar
        self._pending: collections.deque = collections.deque()
        self._known: list[dict[str, float]] = []
        self._seconds_written, self._resumed = 0.0, time.perf_counter()
        self._known_to = 0
        self.images, self.seconds, self.diverged = 0, 0.0, ""

    def add(self, step: int, values: dict[str, jax.Array]) -> None:
        """Takes a step's metrics, which the device may still be computing."""
        self._pending.append((step, values))
        while len(self._pending) > STEPS_IN_FLIGHT:
            self._settle(*self._pending.popleft())

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Waits for all steps, and does not count the time of what is done meanwhile."""
        while self._pending:
            self._settle(*self._pending.popleft())
        yield
        self._resumed = time.perf_counter()

    def close(self) -> None:
        """Writes what has not been written yet."""
        if self._known:
            self._write(self._known_to)

    def _settle(self, step: int, values: dict[str, jax.Array]) -> None:
        known = {k: float(v) for k, v in jax.device_get(values).items()}
        self._known.append(known)
        self._known_to = step
        now, batch_size = time.perf_counter(), self._training.batch_size
        self.images, self.seconds, self._resumed = self.images + batch_size, self.seconds + now - self._resumed, now
        self._bar.update(batch_size)
        if _due(step, batch_size, self._training.log_every):
            self._write(step)
        if known["skipped_in_a_row"] >= self._training.max_skipped:
            self.diverged = (
                f"training stopped at step {step}: {int(known['skipped_in_a_row'])} steps in a row had a loss or gradient that "
                "is not finite (training.max_skipped); the last good state is saved, and another workdir with a smaller "
                "training.learning_rate would do."
            )

    def _write(self, step: int) -> None:
        means = {k: float(np.mean([m[k] for m in self._known])) for k in ("loss", "grad_norm")}
        images = len(self._known) * self._training.batch_size
        rate = images / max(self.seconds - self._seconds_written, 1e-9)
        skipped = sum(m["skipped_in_a_row"] > 0 for m in self._known)
        self._writer.write(step, images=step * self._training.batch_size, images_per_second=rate, skipped=skipped, **means)
        self._bar.set_postfix(loss=f"{means['loss']:.4f}", refresh=False)
        self._known, self._seconds_written = [], self.seconds


def _due(step: int, batch_size: int, every: int) -> bool:
    """Whether step `step` shows the first image of another `every` images; never for 0."""
    return bool(every) and step * batch_size // every > (step - 1) * batch_size // every
