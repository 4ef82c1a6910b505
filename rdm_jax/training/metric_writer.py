"""Metrics on disk: JSON lines, TensorBoard events, and plots of the losses."""

import contextlib
import json
import math
import os
import time
from pathlib import Path
from typing import Any

from rdm_jax.config import Config
from rdm_jax.render.curves import draw_losses
from rdm_jax.runtime import distributed
from rdm_jax.runtime.console import log
from rdm_jax.runtime.errors import Interrupted
from rdm_jax.runtime.files import atomic_write, log_write_errors, parse_json
from rdm_jax.runtime.lazy import is_available, lazy_import
from rdm_jax.training.trackers import Background, open_tracker

event_file = lazy_import("tensorboardX.event_file_writer", "tensorboard")
protocol = lazy_import("tensorboardX.proto.event_pb2", "tensorboard")
summary = lazy_import("tensorboardX.summary", "tensorboard")

SECONDS_BETWEEN_CURVES = 60


class MetricWriter:
    """Appends metrics of one stage to `metrics.jsonl` and to TensorBoard events.

    Failed writes are logged and do not stop training: lines are retried with the next ones, events
    are lost. As a context it is closed at the end.

    Args:
      directory: of the stage.
      step: the step that training resumes from; lines of an interrupted run beyond it are dropped.
      tracker: gets the metrics and pictures as well; None for none.

    Raises:
      OSError: the directory cannot be written to at the start.
    """

    def __init__(self, directory: Path, step: int, tracker: Background | None = None):
        self._tracker = tracker
        self._path = directory / "metrics.jsonl"
        self._waiting = ""
        lines = _parsed(self._path)
        for number, line in enumerate(lines[:-1], 1):
            if line is None:
                log.warning("%s: line %d is damaged and skipped", self._path, number)
        with atomic_write(self._path) as partial:
            partial.write_text(
                "".join(json.dumps(line) + "\n" for line in lines if line and line["step"] <= step)
            )
        self._events = _Events(directory / "tensorboard", step)

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, _: object, error: BaseException | None, *__: object) -> None:
        self.close(hurried=isinstance(error, Interrupted))

    def write(self, step: int, **values: float | int) -> None:
        """Appends a line: the step, and any numbers by name; null for NaN and infinity."""
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        line = {"step": step, **dict.fromkeys(values), **finite}
        self._waiting += json.dumps(line) + "\n"
        with log_write_errors(self._path):
            self._append()
        with log_write_errors(self._events.directory):
            self._events.write(step, finite)
        if self._tracker:
            self._tracker.write({"step": step, **finite})

    def picture(self, path: Path, images: int) -> None:
        """Sends a preview, drawn after so many images, to the tracker."""
        if self._tracker:
            self._tracker.picture(path, images)

    def _append(self) -> None:
        """Writes all waiting lines or none."""
        size = self._path.stat().st_size if self._path.exists() else 0  # a user may have moved it
        try:
            with self._path.open("a") as file:
                file.write(self._waiting)
        except OSError:
            with contextlib.suppress(OSError):  # if the file is gone, the first error says so
                os.truncate(self._path, size)
            raise
        self._waiting = ""

    def close(self, *, hurried: bool = False) -> None:
        """Writes the waiting lines, if that is possible now; `hurried`: see `Background.close`."""
        if self._waiting:
            with log_write_errors(self._path):
                self._append()
        self._events.close()
        if self._tracker:
            self._tracker.close(hurried=hurried)


class _Events:
    """TensorBoard events, written synchronously.

    tensorboardX's own writer uses a thread, and hangs after that has failed.
    """

    def __init__(self, directory: Path, step: int):
        self.directory = directory
        self._step = step
        self._writer: Any = None
        self._files = 0
        self._available = is_available("tensorboardX", "tensorboard", f"{directory} is not written")

    def write(self, step: int, values: dict[str, float | int]) -> None:
        """Raises OSError; the next events then start another file."""
        if not self._available:
            return
        try:
            self._writer = self._writer or self._open()
            for name, value in values.items():
                self._writer.write_event(
                    protocol.Event(
                        wall_time=time.time(), step=step, summary=summary.scalar(name, value)
                    )
                )
            self._writer.flush()
        except OSError:
            self._writer = None
            raise

    def _open(self) -> Any:
        self._files += 1
        self.directory.mkdir(exist_ok=True)
        writer = event_file.EventsWriter(
            str(self.directory / "events"), f".{os.getpid()}.{self._files}"
        )
        if self._step:  # hides the events of an interrupted run beyond it
            started = protocol.SessionLog(status=protocol.SessionLog.START)
            writer.write_event(
                protocol.Event(wall_time=time.time(), step=self._step + 1, session_log=started)
            )
        return writer

    def close(self) -> None:
        """Closes the file."""
        if self._writer:
            with contextlib.suppress(OSError):
                self._writer.close()


class NoWriter:
    """Takes the place of a `MetricWriter` in all processes but the first."""

    def __enter__(self) -> "NoWriter":
        return self

    def __exit__(self, *_: object) -> None:
        """Does nothing."""

    def write(self, step: int, **values: float | int) -> None:
        """Does nothing."""

    def picture(self, path: Path, images: int) -> None:
        """Does nothing."""

    def close(self, *, hurried: bool = False) -> None:
        """Does nothing."""


Writer = MetricWriter | NoWriter


def open_writer(config: Config, directory: Path, step: int) -> Writer:
    """The writer of a stage's metrics; only that of the first process writes.

    Args:
      config: of the run.
      directory, step: as for `MetricWriter`.
    """
    if not distributed.is_primary():
        return NoWriter()
    return MetricWriter(directory, step, open_tracker(config, directory))


def read(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of a `metrics.jsonl` but for truncated and damaged ones."""
    return [line for line in _parsed(path) if line is not None]


def _parsed(path: Path) -> list[dict[str, Any] | None]:
    """Returns every line; None for invalid ones."""
    lines: list[dict[str, Any] | None] = []
    for text in path.read_bytes().splitlines() if path.exists() else []:
        try:
            line = parse_json(text)
        except ValueError:
            line = None
        lines.append(line if isinstance(line, dict) and isinstance(line.get("step"), int) else None)
    return lines


def is_evaluated(directory: Path, step: int) -> bool:
    """Whether a stage has an evaluation of a step, as process 0 sees it. All must call it."""
    found = False
    if distributed.is_primary():
        lines = [line for line in read(directory / "metrics.jsonl") if line["step"] == step]
        found = any(name.startswith("evaluation/") for line in lines for name in line)
    return bool(distributed.from_primary(found))


class Curves:
    """Plots a stage's `metrics.jsonl` as `loss.png`, at most once a minute as training waits."""

    def __init__(self, directory: Path):
        self._directory = directory
        self._due = time.monotonic() + SECONDS_BETWEEN_CURVES
        self._available = is_available(
            "matplotlib.figure", "plots", f"{directory / 'loss.png'} is not drawn"
        )

    def draw(self, last: bool) -> None:
        """Draws the plot if a minute has passed, or if it is the last one."""
        if self._available and (last or time.monotonic() >= self._due):
            with log_write_errors(self._directory / "loss.png"):
                draw_losses(read(self._directory / "metrics.jsonl"), self._directory / "loss.png")
            self._due = time.monotonic() + SECONDS_BETWEEN_CURVES
