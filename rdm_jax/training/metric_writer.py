"""Metrics on disk: JSON lines, TensorBoard events, and curves as a picture."""

import contextlib
import json
import math
import os
import time
from pathlib import Path
from typing import Any

from rdm_jax.render.curves import draw_losses
from rdm_jax.runtime.console import log
from rdm_jax.runtime.files import atomic_write, log_write_errors, parse_json
from rdm_jax.runtime.lazy import is_installed, lazy_import

event_file = lazy_import("tensorboardX.event_file_writer", "tensorboard")
protocol = lazy_import("tensorboardX.proto.event_pb2", "tensorboard")
summary = lazy_import("tensorboardX.summary", "tensorboard")

SECONDS_BETWEEN_CURVES = 60


class MetricWriter:
    """Appends metrics of one stage to `metrics.jsonl` and to TensorBoard events.

    Where the disk does not take them, that is said, and training goes on: lines wait for the next
    ones, events are lost.

    Args:
      directory: of the stage.
      step: the step that training goes on from; what an interrupted run wrote beyond it is dropped.

    Raises:
      OSError: the directory cannot be written to as yet.
    """

    def __init__(self, directory: Path, step: int):
        self._path, self._waiting = directory / "metrics.jsonl", ""
        lines = _parsed(self._path)
        for number, line in enumerate(lines[:-1], 1):
            if line is None:
                log.warning("%s: line %d is damaged, and left out", self._path, number)
        with atomic_write(self._path) as partial:
            partial.write_text(
                "".join(json.dumps(line) + "\n" for line in lines if line and line["step"] <= step)
            )
        self._events = _Events(directory / "tensorboard", step)

    def write(self, step: int, **values: float | int) -> None:
        """One line: the step, and any numbers by name."""
        values = {
            k: v if math.isfinite(v) else None for k, v in values.items()
        }  # JSON knows no NaN
        self._waiting += json.dumps({"step": step, **values}) + "\n"
        with log_write_errors(self._path):
            self._append()
        with log_write_errors(self._events.directory):
            self._events.write(
                step, {name: value for name, value in values.items() if value is not None}
            )

    def _append(self) -> None:
        """Writes the lines that wait, all or none."""
        size = (
            self._path.stat().st_size if self._path.exists() else 0
        )  # someone may have moved it away
        try:
            with self._path.open("a") as file:
                file.write(self._waiting)
        except OSError:
            with contextlib.suppress(OSError):  # where it is gone, the first error says so
                os.truncate(self._path, size)
            raise
        self._waiting = ""

    def close(self) -> None:
        """Writes what waits, if that can be written now."""
        if self._waiting:
            with log_write_errors(self._path):
                self._append()
        self._events.close()


class _Events:
    """TensorBoard events, written at once: the library's own writer has a thread, and waits for
    ever where that has failed."""

    def __init__(self, directory: Path, step: int):
        self.directory, self._step, self._writer, self._files = directory, step, None, 0
        self._installed = is_installed("tensorboardX", "tensorboard", f"{directory} is not written")

    def write(self, step: int, values: dict[str, float | int]) -> None:
        """Raises OSError; the next events begin another file then."""
        if not self._installed:
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
        if self._step:  # hides what an interrupted run has written beyond it
            started = protocol.SessionLog(status=protocol.SessionLog.START)
            writer.write_event(
                protocol.Event(wall_time=time.time(), step=self._step + 1, session_log=started)
            )
        return writer

    def close(self) -> None:
        """Lets go of the file."""
        if self._writer:
            with contextlib.suppress(OSError):
                self._writer.close()


class NoWriter:
    """Stands for a `MetricWriter` where another process writes."""

    def write(self, step: int, **values: float | int) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`; those that a kill has cut short, or that are damaged, are
    left out."""
    return [line for line in _parsed(path) if line is not None]


def _parsed(path: Path) -> list[dict[str, Any] | None]:
    """Every line; None for those that are none of ours."""
    lines: list[dict[str, Any] | None] = []
    for text in path.read_bytes().splitlines() if path.exists() else []:
        try:
            line = parse_json(text)
        except ValueError:
            line = None
        lines.append(line if isinstance(line, dict) and isinstance(line.get("step"), int) else None)
    return lines


class Curves:
    """Draws a stage's `metrics.jsonl` as `loss.png`: at most once a minute, as training waits for
    it."""

    def __init__(self, directory: Path):
        self._directory, self._due = directory, time.monotonic() + SECONDS_BETWEEN_CURVES
        self._installed = is_installed(
            "matplotlib", "plots", f"{directory / 'loss.png'} is not drawn"
        )

    def draw(self, last: bool) -> None:
        """Draws them if a minute has passed, or if it is for the last time."""
        if self._installed and (last or time.monotonic() >= self._due):
            with log_write_errors(self._directory / "loss.png"):
                draw_losses(read(self._directory / "metrics.jsonl"), self._directory / "loss.png")
            self._due = time.monotonic() + SECONDS_BETWEEN_CURVES
