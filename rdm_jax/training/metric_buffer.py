"""Metrics of steps that the devices are still computing, taken in without holding them up."""

import collections
import contextlib
import time
from collections.abc import Iterator

import jax
import numpy as np

from rdm_jax.config import Training
from rdm_jax.training import metric_writer
from rdm_jax.training.count import Count

# Steps whose metrics are awaited: few, so that a run of bad steps is noticed at once, but not 0, so
# that devices never idle.
STEPS_IN_FLIGHT = 2


class MetricBuffer:
    """Gathers the metrics of steps as they become known, writes their means, and watches for
    divergence.

    Attributes:
      images, seconds: trained so far, the time of pauses left out.
      told: the largest value yet of the metric 'told' of a step; the caller may set it back.
      diverged: what to tell the user once too many steps in a row were not finite, else ''.
    """

    def __init__(self, training: Training, count: Count, writer: metric_writer.MetricWriter, bar):
        self._training, self._count, self._writer, self._bar = training, count, writer, bar
        self._pending: collections.deque = collections.deque()
        self._known: list[dict[str, float]] = []
        self._seconds_written, self._resumed = 0.0, time.perf_counter()
        self._known_to = 0
        self.images, self.seconds, self.told, self.diverged = 0, 0.0, 0, ""

    def add(self, step: int, values: dict[str, jax.Array]) -> None:
        """Takes a step's metrics, which the device may still be computing; they travel here as soon
        as they are known."""
        for value in values.values():
            value.copy_to_host_async()
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
        self.told = max(self.told, int(known.pop("told", 0)))
        self._known.append(known)
        self._known_to = step
        now, batch_size = time.perf_counter(), self._training.batch_size
        self.images, self.seconds, self._resumed = (
            self.images + batch_size,
            self.seconds + now - self._resumed,
            now,
        )
        self._bar.update(batch_size)
        if self._count.is_due(step, self._training.log_every):
            self._write(step)
        if known["skipped_in_a_row"] >= self._training.max_skipped:
            self.diverged = (
                f"training stopped at step {step}: {int(known['skipped_in_a_row'])} steps in a row had a loss or gradient that "
                "is not finite (training.max_skipped); the last good state is saved, and a smaller training.learning_rate with "
                "--allow_changes=learning_rate would do."
            )

    def _write(self, step: int) -> None:
        means = {k: float(np.mean([m[k] for m in self._known])) for k in ("loss", "grad_norm")}
        images = len(self._known) * self._training.batch_size
        rate = images / max(self.seconds - self._seconds_written, 1e-9)
        skipped = sum(m["skipped_in_a_row"] > 0 for m in self._known)
        self._writer.write(
            step,
            images=self._count.images_at(step),
            images_per_second=rate,
            skipped=skipped,
            **means,
        )
        self._bar.set_postfix(loss=f"{means['loss']:.4f}", refresh=False)
        self._known, self._seconds_written = [], self.seconds


class Clock:
    """Tells when so many seconds have passed since it was last started; never for 0."""

    def __init__(self, seconds: float):
        self._seconds, self._began = seconds, time.monotonic()

    def is_over(self) -> bool:
        """Whether they have."""
        return 0 < self._seconds <= time.monotonic() - self._began

    def restart(self) -> None:
        """Counts them anew."""
        self._began = time.monotonic()
