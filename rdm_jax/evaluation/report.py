"""One page of one or more evaluations: tables, the paper's figures beside ours, pictures, curves
over training."""

import json
import shutil
from pathlib import Path
from typing import Any

from rdm_jax.evaluation.evaluator import RESULT, picture_names, read_result
from rdm_jax.render.tables import METRICS, PUBLISHED, cell, markdown, result_table
from rdm_jax.runtime.console import log
from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.files import atomic_write, is_aside
from rdm_jax.runtime.lazy import lazy_import
from rdm_jax.workdir import Workdir

matplotlib_figure = lazy_import("matplotlib.figure", "plots")

PAGE = "report.md"


def write_report(workdir: Path, paths: list[Path]) -> None:
    """Writes workdir/report/report.md with its pictures beside it.

    Args:
      paths: of the evaluations; none for all in the workdir but those moved aside, those made
        during training as curves.

    Raises:
      InputError: a file is no evaluation, or there is none.
    """
    paths = paths or sorted(
        path for path in workdir.glob(f"*/{RESULT}") if not is_aside(path.parent)
    )
    results = [read_section(path) for path in paths]
    stages = [
        stage
        for folder in sorted({path.parent.parent for path in paths} | {workdir})
        for stage in folder.glob("stage*")
    ]
    curves = {
        title: _over_training(stage)
        for stage, title in zip(stages, _titles(stages, workdir), strict=True)
    }
    curves = {title: points for title, points in sorted(curves.items()) if points}
    if not results and not curves:
        raise InputError(
            f"there is no {RESULT} in {workdir}; --mode=evaluate first, or --evaluations=PATH, would do."
        )
    folder = Workdir(workdir).report
    folder.mkdir(parents=True, exist_ok=True)
    parts = ["# Evaluation"]
    titles = _titles([path.parent for path in paths], workdir)
    for number, (path, title, result) in enumerate(zip(paths, titles, results, strict=True), 1):
        parts += _section(title, result, _copied(path, result, folder, number))
    if curves:
        _draw(curves, folder / "curves.png")
        parts += [
            "## Over training",
            "![Every metric by the number of images that a stage has seen](curves.png)",
        ]
    with atomic_write(folder / PAGE) as partial:
        partial.write_text("\n\n".join(parts) + "\n")
    log.info("report: %d evaluations, %d curves -> %s", len(results), len(curves), folder / PAGE)


def _titles(folders: list[Path], workdir: Path) -> list[str]:
    """What folders are called: by their path in the workdir, or by as much of their own as tells
    them apart."""
    titles = []
    for folder in folders:
        parts, others = (
            folder.resolve().parts,
            [other.resolve().parts for other in folders if other != folder],
        )
        known = next(
            (n for n in range(2, len(parts)) if all(parts[-n:] != other[-n:] for other in others)),
            len(parts),
        )
        inside = folder.is_relative_to(workdir)
        titles.append(str(folder.relative_to(workdir)) if inside else "/".join(parts[-known:]))
    return titles


def read_section(path: Path) -> dict[str, Any]:
    """What makes a section of a page. Raises InputError where a file is no evaluation."""
    result = read_result(path)
    try:
        _section("", result, {})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        would_do = f"an {RESULT} that --mode=evaluate has written would do."
        raise InputError(f"{path} is no evaluation, or damaged; {would_do}") from error
    return result


def _section(title: str, result: dict[str, Any], shown: dict[str, str]) -> list[str]:
    made_with = result["made_with"]
    about = (
        f"Features: {made_with['features']['name']}. Reference: {_named(made_with['reference'])}. {result['devices']}, "
        + ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    )
    parts = [f"## {title}", result_table(result["results"]), about + "."]
    published = result["published"]
    known = [name for name in PUBLISHED if published[name]]
    if (
        known and made_with["features"]["name"] == "inception"
    ):  # in other features other numbers would be meant
        rows = [[f"paper ({published['where']})", *(cell(name, published[name]) for name in known)]]
        for name, ours in result["results"].items():
            rows.append(
                [
                    f"this project, {name}, {ours['images']:,} images",
                    *(cell(m, ours["metrics"].get(m)) for m in known),
                ]
            )
        parts += [
            "### The paper and this project",
            markdown(["", *(name.replace("_", " ") for name in known)], rows),
        ]
    for name, file in shown.items():
        parts += [f"### {name}", f"![The first images of {name}]({file})"]
    details = json.dumps(made_with, indent=2)
    return [
        *parts,
        f"<details><summary>What this was measured with</summary>\n\n```json\n{details}\n```\n\n</details>",
    ]


def _named(about: dict[str, Any]) -> str:
    """A set of images or a file of statistics, in a few words."""
    images = about.get("images")  # of our own statistics: a set; of others' nothing is known
    if isinstance(images, dict):
        return _named(images)
    return f"{about['set']} ({images:,} images)" if "set" in about else str(about.get("file"))


def _copied(path: Path, result: dict[str, Any], folder: Path, number: int) -> dict[str, str]:
    """The pictures of an evaluation, now beside the page, by the name of the set."""
    copied = {}
    for name, picture in picture_names(result["results"]).items():
        if (path.parent / picture).is_file():
            copied[name] = f"{number}-{picture}"
            shutil.copyfile(path.parent / picture, folder / copied[name])
    return copied


def _over_training(stage: Path) -> dict[int, dict[str, float]]:
    """The metrics of a stage by the images that it had seen."""
    points = {}
    for path in sorted(
        path for path in stage.glob(f"evaluations/*/{RESULT}") if not is_aside(path.parent)
    ):
        (result,) = read_section(path)["results"].values()
        points[int(path.parent.name)] = result["metrics"]
    return points


def _draw(curves: dict[str, dict[int, dict[str, float]]], path: Path) -> None:
    """A panel a metric, a curve a stage."""
    found = [
        name
        for name in METRICS
        if any(name in m for points in curves.values() for m in points.values())
    ]
    found = [name for name in found if name != "kid_standard_error"]
    columns = min(3, len(found))
    rows = -(-len(found) // columns)
    figure = matplotlib_figure.Figure(figsize=(4.5 * columns, 3 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel, name in zip(panels, found, strict=False):
        for title, points in curves.items():
            known = {images: values[name] for images, values in points.items() if name in values}
            panel.plot(list(known), list(known.values()), "o-", markersize=3, label=title)
        panel.set(title=name.replace("_", " "), xlabel="images seen")
        panel.grid(alpha=0.3)
    for panel in panels[len(found) :]:
        panel.axis("off")
    panels[0].legend()
    with atomic_write(path) as partial:
        figure.savefig(partial, format="png", dpi=110)
