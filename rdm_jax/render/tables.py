"""Tables in Markdown that are legible in a terminal too, and the numbers in them."""

from typing import Any

GIB = 2**30

# Metrics in the order of the columns, with their decimal digits.
METRICS = {
    "fid": 2,
    "sfid": 2,
    "frechet_distance": 3,
    "spatial_frechet_distance": 3,
    "inception_score": 2,
    "classifier_score": 3,
    "accuracy": 3,
    "precision": 3,
    "recall": 3,
    "kid": 5,
    "kid_standard_error": 5,
    "high_frequency_ratio": 3,
    "retrieval_1": 3,
    "retrieval_1_chance": 3,
    "retrieval_5": 3,
    "retrieval_5_chance": 3,
}
# What another metric is compared with, and no curve of its own shows.
BESIDE = ("kid_standard_error", "retrieval_1_chance", "retrieval_5_chance")
# Metrics that a config may have from a paper.
PUBLISHED = ("fid", "sfid", "inception_score", "precision", "recall")


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table with aligned columns."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: list[str]) -> str:
        padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        return f"| {' | '.join(padded)} |"

    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([line(header), rule, *map(line, rows)])


def result_table(results: dict[str, Any]) -> str:
    """A row per set of images, a column per metric, and notes below."""
    columns = [
        name for name in METRICS if any(name in result["metrics"] for result in results.values())
    ]
    rows = []
    for name, result in results.items():
        cells = [cell(column, result["metrics"].get(column)) for column in columns]
        rows.append([name, f"{result['images']:,}", *cells])
    notes = [f"{name}: {note}" for name, result in results.items() for note in result["notes"]]
    header = [column.replace("_", " ") for column in columns]
    return "\n".join([markdown(["set", "images", *header], rows), *(["", *notes] if notes else [])])


def cell(metric: str, value: float | None) -> str:
    """A metric as text; '-' for None."""
    return "-" if value is None else f"{value:.{METRICS[metric]}f}"


def in_gib(size: int | float) -> str:
    """Bytes as text in GiB, or in MiB if they are few."""
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 or not size else f"{size / 2**20:.3g} MiB"


def short(value: int | float) -> str:
    """A number as text: four digits and a prefix (M, G, ...)."""
    for limit, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= limit:
            return f"{value / limit:.4g} {letter}"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
