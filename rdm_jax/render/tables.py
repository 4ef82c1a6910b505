"""Tables in Markdown, which a terminal shows as well, and numbers in them."""

from typing import Any

GIB = 2**30

# In the order of the columns, with the number of digits after the point.
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
}
PUBLISHED = (
    "fid",
    "sfid",
    "inception_score",
    "precision",
    "recall",
)  # what a config may have of a paper


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table whose columns line up."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    line = lambda cells: (
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(cells, widths, strict=True)) + " |"
    )  # noqa: E731
    return "\n".join(
        [line(header), "|" + "|".join("-" * (w + 2) for w in widths) + "|", *map(line, rows)]
    )


def result_table(results: dict[str, Any]) -> str:
    """A row a set of images, a column a metric, and below what is to be known of them."""
    columns = [
        name for name in METRICS if any(name in result["metrics"] for result in results.values())
    ]
    rows = [
        [
            name,
            f"{result['images']:,}",
            *(cell(column, result["metrics"].get(column)) for column in columns),
        ]
        for name, result in results.items()
    ]
    notes = [f"{name}: {note}" for name, result in results.items() for note in result["notes"]]
    header = [column.replace("_", " ") for column in columns]
    return "\n".join([markdown(["set", "images", *header], rows), *(["", *notes] if notes else [])])


def cell(metric: str, value: float | None) -> str:
    """A metric as text; '-' where there is none."""
    return "-" if value is None else f"{value:.{METRICS[metric]}f}"


def in_gib(size: int | float) -> str:
    """Bytes as GiB, or as MiB where they are few."""
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 or not size else f"{size / 2**20:.3g} MiB"


def short(value: int | float) -> str:
    """Four digits, and a letter for thousands."""
    for limit, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= limit:
            return f"{value / limit:.4g} {letter}"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
