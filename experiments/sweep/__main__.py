"""Averages of a stage's parameters against weights of its guidance. README.md explains it.

    python -m experiments.sweep --workdir runs/digits --stage 2 --averages ema,raw,0.05,0.1 \
        --guidance 1,1.5,2 --images 500

Every cell is an evaluation of the run in the folder `sweep` of the workdir; the same command
resumes.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from matplotlib.figure import Figure

from experiments import common
from rdm_jax.checkpoints import folders
from rdm_jax.cli.command import command
from rdm_jax.config import Config, validate
from rdm_jax.config.load import load_config
from rdm_jax.render.tables import cell, markdown
from rdm_jax.runtime.console import log
from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.files import atomic_write
from rdm_jax.runtime.ranges import parse_list
from rdm_jax.workdir import Workdir

_WORKDIR = flags.DEFINE_string("workdir", None, "Of a trained run.")
_STAGE = flags.DEFINE_integer("stage", None, "To vary, from 1; by default the last.")
_AVERAGES = flags.DEFINE_string("averages", "ema,raw", "Of its parameters: ema, raw, widths.")
_GUIDANCE = flags.DEFINE_string("guidance", "1", "Weights of its guidance; 1 for none.")
_IMAGES = flags.DEFINE_integer("images", 500, "Samples per cell, of the seeds from 0 on.")
_FEATURES = flags.DEFINE_string("features", "", "To measure with; by default the run's.")


class Cell(NamedTuple):
    """A pair of settings, and the metrics of its samples."""

    average: str
    guidance: float
    metrics: dict[str, float]


def configs_of_run(workdir: Workdir) -> tuple[int, dict[tuple[str, float], Config]]:
    """The stage's number, and the run's config with every pair of settings.

    All have the checkpoints that the run's config names now.

    Raises:
      InputError: there is no such run, or a flag cannot be used.
    """
    base = _base(workdir)
    number = len(base.stages) if _STAGE.value is None else _STAGE.value
    if not 1 <= number <= len(base.stages):
        raise InputError(f"--stage={number} is not a stage", f"Use 1 to {len(base.stages)}.")
    overrides: dict[str, Any] = {}
    for stage in base.stages:
        field = f"config.{stage.name}.checkpoint"
        folder, step = folders.find(stage.checkpoint, workdir.checkpoints(stage.number), field)
        overrides[stage.name] = {"checkpoint": str((folder / str(step)).resolve())}
    found = {}
    for average in parse_list(_AVERAGES.value, "--averages"):
        for weight in parse_list(_GUIDANCE.value, "--guidance"):
            changed = {"average": average, "guidance": _number(weight)}
            varied = {f"stage{number}": overrides[f"stage{number}"] | changed}
            config = load_config(str(workdir.path), **overrides | varied)
            config = dataclasses.replace(config, evaluation=base.evaluation)
            validate.check_config(config)
            workdir.check_averages(config.stages)
            found[average, changed["guidance"]] = config
    return number, found


def _base(workdir: Workdir) -> Config:
    if not workdir.config_file.is_file():
        raise InputError(f"{workdir} has no config.json", "Use the folder of a trained run.")
    base = load_config(str(workdir.path))
    features = _FEATURES.value or base.evaluation.features
    if features == "none":
        raise InputError(
            f"evaluation.features='none' in {workdir.config_file} measures nothing",
            "Pass --features=inception, efficientnet or classifier.",
        )
    base = common.with_evaluation(base, features=features, seeds=f"0-{_IMAGES.value - 1}")
    own = workdir.classifier
    if features == "classifier" and not base.evaluation.weights and own.is_file():
        base = common.with_evaluation(base, weights=str(own))
    return base


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise InputError(f"--guidance={text!r} is not a number", "Use such as 1,1.5,2.") from error


def write(cells: list[Cell], number: int, root: Path) -> str:
    """Writes the tables as Markdown and as JSON. Returns the Markdown."""
    with atomic_write(root / "sweep.json") as partial:
        rows = [each._asdict() for each in cells]
        partial.write_text(json.dumps({"stage": number, "cells": rows}, indent=2))
    columns = common.columns(cells[0].metrics)
    header = ["average", "guidance", *columns]
    body = [
        [each.average, f"{each.guidance:g}", *(cell(name, each.metrics[name]) for name in columns)]
        for each in cells
    ]
    best = min(cells, key=lambda each: common.distance(each.metrics))
    text = (
        f"{markdown(header, body)}\n\nStage {number}; the smallest {columns[0]} is that of average "
        f"{best.average} and guidance {best.guidance:g}.\n"
    )
    with atomic_write(root / "sweep.md") as partial:
        partial.write_text(text)
    return text


def draw(cells: list[Cell], number: int, path: Path) -> None:
    """Draws the distances as a heat map: averages by weights of guidance."""
    averages = list(dict.fromkeys(each.average for each in cells))
    weights = list(dict.fromkeys(each.guidance for each in cells))
    values = np.full((len(averages), len(weights)), np.nan)
    for each in cells:
        place = averages.index(each.average), weights.index(each.guidance)
        values[place] = common.distance(each.metrics)
    name = common.columns(cells[0].metrics)[0]
    size = (2.5 + 0.8 * len(weights), 1.5 + 0.45 * len(averages))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values, cmap="Blues", aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        color = "white" if image.norm(value) > 0.5 else "black"
        axes.text(column, row, cell(name, value), ha="center", va="center", color=color)
    axes.set_xticks(range(len(weights)), [f"{weight:g}" for weight in weights])
    axes.set_yticks(range(len(averages)), averages)
    axes.set(xlabel="guidance", ylabel="average", title=f"stage {number}")
    figure.colorbar(image, label=name.replace("_", " "))
    with atomic_write(path) as partial:
        figure.savefig(partial, format="png", dpi=110)


def sweep() -> None:
    """Measures every pair, prints the table, and draws it."""
    if _IMAGES.value < 4:
        raise InputError(f"--images={_IMAGES.value} cannot be measured", "Use 4 or more.")
    workdir = Workdir.from_flag(_WORKDIR.value or "", needed_by="experiments.sweep")
    root = workdir.path / "sweep"
    number, configs = configs_of_run(workdir)
    first = next(iter(configs.values()))
    evaluation = first.evaluation
    if first.data.held_out:  # measured once for all cells, and so is the reference
        evaluation = common.prepared(first, root)[0].evaluation
    cells: list[Cell] = []
    for (average, guidance), config in configs.items():
        log.info("sweep: %d of %d, %s, %g", len(cells) + 1, len(configs), average, guidance)
        config = dataclasses.replace(config, evaluation=evaluation)
        name = f"stage{number}_average_{average}_guidance_{guidance:g}"
        cells.append(Cell(average, guidance, common.measured(config, root, name)))
        text = write(cells, number, root)
    draw(cells, number, root / "sweep.png")
    print(f"\n{text}")


if __name__ == "__main__":
    common.start()
    command(sweep, lambda: _WORKDIR.value)
