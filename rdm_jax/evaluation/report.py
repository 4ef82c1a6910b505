"""A page of one or more evaluations: tables, published metrics, pictures, curves over training."""

import json
import shutil
from pathlib import Path
from typing import Any

from rdm_jax.evaluation.result_files import RESULT, picture_names, read_result
from rdm_jax.render.curves import draw_metrics
from rdm_jax.render.tables import PUBLISHED, cell, markdown, result_table
from rdm_jax.runtime.console import log
from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.files import atomic_write, is_aside
from rdm_jax.workdir import Workdir

PAGE = "report.md"


def write_report(workdir: Path, paths: list[Path]) -> None:
    """Writes workdir/report/report.md with its pictures beside it.

    Args:
      workdir: of the run.
      paths: of the evaluation.json files; empty for all in the workdir, except those moved aside.
        Evaluations during training become curves.

    Raises:
      InputError: a file is not an evaluation, or there is none.
    """
    paths = paths or sorted(
        path for path in workdir.glob(f"*/{RESULT}") if not is_aside(path.parent)
    )
    results = [read_section(path) for path in paths]
    roots = sorted({path.parent.parent for path in paths} | {workdir})
    stages = [stage for root in roots for stage in root.glob("stage*")]
    titles = _titles(stages, workdir)
    curves = {t: _over_training(stage) for t, stage in zip(titles, stages, strict=True)}
    curves = {title: points for title, points in sorted(curves.items()) if points}
    if not results and not curves:
        raise InputError(
            f"there is no {RESULT} in {workdir}",
            "Evaluate first (--mode=evaluate), or pass --evaluations=PATH.",
        )
    folder = Workdir(workdir).report
    folder.mkdir(parents=True, exist_ok=True)
    parts = ["# Evaluation"]
    titles = _titles([path.parent for path in paths], workdir)
    for number, (path, title, result) in enumerate(zip(paths, titles, results, strict=True), 1):
        parts += _section(title, result, _copied(path, result, folder, number))
    if curves:
        draw_metrics(curves, folder / "curves.png")
        parts += [
            "## Over training",
            "![Every metric by the number of images that a stage has seen](curves.png)",
        ]
    with atomic_write(folder / PAGE) as partial:
        partial.write_text("\n\n".join(parts) + "\n")
    log.info("report: %d evaluations, %d curves -> %s", len(results), len(curves), folder / PAGE)


def _titles(folders: list[Path], workdir: Path) -> list[str]:
    """Titles of folders: the path in the workdir, or the shortest unique end of the path."""
    resolved = [folder.resolve().parts for folder in folders]
    titles = []
    for folder, parts in zip(folders, resolved, strict=True):
        if folder.is_relative_to(workdir):
            titles.append(str(folder.relative_to(workdir)))
            continue
        others = [other for other in resolved if other != parts]
        length = next(
            (n for n in range(2, len(parts)) if all(parts[-n:] != other[-n:] for other in others)),
            len(parts),
        )
        titles.append("/".join(parts[-length:]))
    return titles


def read_section(path: Path) -> dict[str, Any]:
    """Reads an evaluation for a section of the page.

    Raises:
      InputError: the file is not an evaluation.
    """
    result = read_result(path)
    try:
        _section("", result, {})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{path} is not an evaluation, or damaged",
            f"Use an {RESULT} that --mode=evaluate has written.",
        ) from error
    return result


def _section(title: str, result: dict[str, Any], shown: dict[str, str]) -> list[str]:
    made_with = result["made_with"]
    space = made_with["features"]["name"]
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    about = (
        f"Features: {space}. Reference: {_named(made_with['reference'])}. "
        f"{result['devices']}, {versions}."
    )
    parts = [f"## {title}", result_table(result["results"]), about]
    published = result["published"]
    known = [name for name in PUBLISHED if published[name]]
    if known and space == "inception":  # published metrics are of Inception's features
        parts += ["### The paper and this project", _beside_paper(result, known)]
    for name, file in shown.items():
        parts += [f"### {name}", f"![The first images of {name}]({file})"]
    details = json.dumps(made_with, indent=2)
    parts.append(
        "<details><summary>What this was measured with</summary>\n\n"
        f"```json\n{details}\n```\n\n</details>"
    )
    return parts


def _beside_paper(result: dict[str, Any], known: list[str]) -> str:
    """A table of the published metrics and the measured ones."""
    published = result["published"]
    rows = [[f"paper ({published['where']})", *(cell(name, published[name]) for name in known)]]
    for name, ours in result["results"].items():
        cells = [cell(metric, ours["metrics"].get(metric)) for metric in known]
        rows.append([f"this project, {name}, {ours['images']:,} images", *cells])
    return markdown(["", *(name.replace("_", " ") for name in known)], rows)


def _named(about: dict[str, Any]) -> str:
    """A short description of a set of images or a file of statistics."""
    images = about.get("images")  # only statistics of this project say which set they are of
    if isinstance(images, dict):
        return _named(images)
    return f"{about['set']} ({images:,} images)" if "set" in about else str(about.get("file"))


def _copied(path: Path, result: dict[str, Any], folder: Path, number: int) -> dict[str, str]:
    """Copies the pictures of an evaluation beside the page; file names by set."""
    copied = {}
    for name, picture in picture_names(result["results"]).items():
        if (path.parent / picture).is_file():
            copied[name] = f"{number}-{picture}"
            shutil.copyfile(path.parent / picture, folder / copied[name])
    return copied


def _over_training(stage: Path) -> dict[int, dict[str, float]]:
    """The metrics of a stage by the number of images seen."""
    points = {}
    for path in sorted(stage.glob(f"evaluations/*/{RESULT}")):
        if is_aside(path.parent):
            continue
        (result,) = read_section(path)["results"].values()
        points[int(path.parent.name)] = result["metrics"]
    return points
