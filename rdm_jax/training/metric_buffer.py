"""Metrics of steps that the devices are still computing, collected without waiting for them."""

import collections
import contextlib
import math
import time
from collections.abc import Iterator

import jax
import numpy as np
from tqdm import tqdm

from rdm_jax.config import Training
from rdm_jax.training import metric_writer
from rdm_jax.training.count import Count

# Steps whose metrics are still awaited: few, so that bad steps are noticed soon, but more than 0,
# so that the devices never idle.
STEPS_IN_FLIGHT = 2


class MetricBuffer:
    """Collects the metrics of steps as they become known, writes means, and detects divergence.

    Attributes:
      images, seconds: images trained so far, and the time that took, without pauses.
      request: the maximum of the metric 'request' so far; the caller may reset it.
      diverged: the error message once too many consecutive steps were not finite, else ''.
    """

    def __init__(
        self,
        training: Training,
        count: Count,
        writer: metric_writer.Writer,
        bar: tqdm,
    ):
        self.images = 0
        self.seconds = 0.0
        self.request = 0
        self.diverged = ""
        self._training = training
        self._count = count
        self._writer = writer
        self._bar = bar
        self._pending: collections.deque = collections.deque()
        self._known: list[dict[str, float]] = []
        self._known_to = 0
        self._seconds_written = 0.0
        self._began = self._resumed = time.perf_counter()

    def rates(self) -> str:
        """Images per second as text: without pauses, and in all the time since the start."""
        steady = self.images / (self.seconds or math.nan)
        overall = self.images / (time.perf_counter() - self._began)
        return f"{steady:.0f} images/s ({overall:.0f} with checkpoints and evaluations)"

    def add(self, step: int, values: dict[str, jax.Array]) -> None:
        """Adds a step's metrics, which may still be computing, and starts to copy them."""
        for value in values.values():
            value.copy_to_host_async()
        self._pending.append((step, values))
        while len(self._pending) > STEPS_IN_FLIGHT:
            self._settle(*self._pending.popleft())

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Waits for all steps; the time spent inside this context is not counted."""
        while self._pending:
            self._settle(*self._pending.popleft())
        yield
        self._resumed = time.perf_counter()

    def close(self) -> None:
        """Writes the metrics that have not been written yet."""
        if self._known:
            self._write(self._known_to)

    def _settle(self, step: int, values: dict[str, jax.Array]) -> None:
        known = {k: float(v) for k, v in jax.device_get(values).items()}
        self.request = max(self.request, int(known.pop("request", 0)))
        self._known.append(known)
        self._known_to = step
        now, batch_size = time.perf_counter(), self._training.batch_size
        self.images += batch_size
        self.seconds += now - self._resumed
        self._resumed = now
        self._bar.update(batch_size)
        if self._count.is_due(step, self._training.log_every):
            self._write(step)
        if known["skipped_in_a_row"] >= self._training.max_skipped:
            self.diverged = (
                f"training stopped at step {step}: {int(known['skipped_in_a_row'])} steps in a row "
                "had a loss or gradient that is not finite (training.max_skipped). The last good "
                "state is saved; resume with a smaller training.learning_rate and "
                "--allow_changes=learning_rate."
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
        self._known = []
        self._seconds_written = self.seconds


class Clock:
    """Tells when a number of seconds has passed since its last start; never for 0."""

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._began = time.monotonic()

    def is_over(self) -> bool:
        """Whether the time has passed."""
        return 0 < self._seconds <= time.monotonic() - self._began

    def restart(self) -> None:
        """Starts again from 0."""
        self._began = time.monotonic()
