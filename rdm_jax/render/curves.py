"""Curves over training, as PNG."""

from pathlib import Path
from typing import Any

from rdm_jax.render.tables import BESIDE, METRICS
from rdm_jax.runtime.files import atomic_write
from rdm_jax.runtime.lazy import lazy_import

matplotlib_figure = lazy_import("matplotlib.figure", "plots")


def draw_losses(lines: list[dict[str, Any]], path: Path) -> None:
    """Draws the training loss and the EMA's validation loss over the images seen.

    Args:
      lines: of a `metrics.jsonl`.
      path: the file to write; the name of its folder is the title.
    """
    figure = matplotlib_figure.Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, style in (("loss", "-"), ("validation_loss", "o-")):
        points = [
            (line["images"], line[name])
            for line in lines
            if line.get(name) is not None and line.get("images")
        ]
        if points:
            axes.plot(*zip(*points, strict=True), style, markersize=3, label=name.replace("_", " "))
            axes.legend()
    axes.set(
        xlabel="images seen", ylabel="weighted squared error", title=path.parent.name, yscale="log"
    )
    axes.grid(alpha=0.3)
    with atomic_write(path) as partial:
        figure.savefig(partial, format="png", dpi=110)


def draw_metrics(curves: dict[str, dict[int, dict[str, float]]], path: Path) -> None:
    """Draws one panel per metric, with one curve per stage.

    Args:
      curves: metrics by images seen, by the title of the stage.
      path: the file to write.
    """
    measured = {
        name for points in curves.values() for metrics in points.values() for name in metrics
    }
    shown = [name for name in METRICS if name in measured and name not in BESIDE]
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    figure = matplotlib_figure.Figure(figsize=(4.5 * columns, 3 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel, name in zip(panels, shown, strict=False):
        for title, points in curves.items():
            known = {images: values[name] for images, values in points.items() if name in values}
            panel.plot(list(known), list(known.values()), "o-", markersize=3, label=title)
        panel.set(title=name.replace("_", " "), xlabel="images seen")
        panel.grid(alpha=0.3)
    for panel in panels[len(shown) :]:
        panel.axis("off")
    panels[0].legend()
    with atomic_write(path) as partial:
        figure.savefig(partial, format="png", dpi=110)
