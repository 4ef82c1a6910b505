"""Curves of a training."""

from pathlib import Path
from typing import Any

from rdm_jax.runtime.files import atomic_write
from rdm_jax.runtime.lazy import lazy_import

matplotlib_figure = lazy_import("matplotlib.figure", "plots")


def draw_losses(lines: list[dict[str, Any]], path: Path) -> None:
    """Draws the training loss and the EMA's validation loss by images seen, as PNG.

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
