"""Metrics on disk: JSON lines, TensorBoard events, and curves as a picture."""

import json
import math
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from tensorboardX import SummaryWriter

from rdm_jax.files import whole_file


class MetricWriter:
    """Appends metrics of one stage to `metrics.jsonl` and to TensorBoard events.

    Args:
      directory: of the stage.
      step: the step that training goes on from; what an interrupted run wrote beyond it is dropped.
    """

    def __init__(self, directory: Path, step: int):
        self._path = directory / "metrics.jsonl"
        kept = [line for line in read(self._path) if line["step"] <= step]
        with whole_file(self._path) as partial:
            partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self._lines = self._path.open("a")
        self._events = SummaryWriter(str(directory / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, step: int, **values: float | int) -> None:
        """One line: the step, and any numbers by name."""
        values = {k: v if math.isfinite(v) else None for k, v in values.items()}  # JSON knows no NaN
        self._lines.write(json.dumps({"step": step, **values}) + "\n")
        self._lines.flush()
        for name, value in values.items():
            if value is not None:
                self._events.add_scalar(name, value, step)

    def close(self) -> None:
        """Closes both."""
        self._lines.close()
        self._events.close()


class NoWriter:
    """Stands for a `MetricWriter` where another process writes."""

    def write(self, step: int, **values: float | int) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`; a last line cut short by a kill is left out."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def draw_curves(directory: Path) -> None:
    """Draws `metrics.jsonl` as `loss.png`: the training loss and the averaged parameters' validation loss, by images seen."""
    lines = read(directory / "metrics.jsonl")
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, style in (("loss", "-"), ("validation_loss", "o-")):
        points = [(line["images"], line[name]) for line in lines if line.get(name) is not None and line.get("images")]
        if points:
            axes.plot(*zip(*points, strict=True), style, markersize=3, label=name.replace("_", " "))
            axes.legend()
    axes.set(xlabel="images seen", ylabel="weighted squared error", title=directory.name, yscale="log")
    axes.grid(alpha=0.3)
    with whole_file(directory / "loss.png") as partial:
        figure.savefig(partial, format="png", dpi=110)
