"""Pictures: grids of samples, and the stages of the relay beside the nearest real images."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image, ImageDraw

from rdm_jax.data.image_sets import ImageSet
from rdm_jax.render.text_lines import LINE, draw_lines, wrapped
from rdm_jax.runtime.files import atomic_write

MARGIN, HEADER, LABEL, CAPTION = 4, 16, 72, 132  # pixels
WITH_CAPTION = 128  # pixels of an image with a caption below it, at least


def _rgb(image: UInt8[np.ndarray, "h w c"], height: int, width: int) -> Image.Image:
    """One image as RGB, enlarged without smoothing, so that pixels stay visible."""
    picture = Image.fromarray(np.broadcast_to(image, (*image.shape[:2], 3)))
    return picture.resize((width, height), Image.Resampling.NEAREST)


def save_picture(picture: Image.Image, path: Path) -> None:
    """Writes a PNG atomically."""
    with atomic_write(path) as partial:
        picture.save(partial, format="PNG")


def _cell_size(height: int, width: int, *, captions: bool = False) -> tuple[int, int]:
    """The size at which an image is drawn: small ones are enlarged by an integer, to about 96.

    With captions, to at least `WITH_CAPTION`.
    """
    longest = max(height, width)
    times = -(-WITH_CAPTION // longest) if captions else max(1, 96 // longest)
    return height * times, width * times


def plain_grid(
    images: UInt8[np.ndarray, "b h w c"], columns: int, captions: Sequence[str] | None = None
) -> Image.Image:
    """Draws images in reading order, with the caption of each below it."""
    height, width = _cell_size(*images.shape[1:3], captions=captions is not None)
    lines = [wrapped(text, width) for text in captions or [""] * len(images)]
    places = [range(first, len(images))[:columns] for first in range(0, len(images), columns)]
    tops = _tops(MARGIN, height, [[lines[i] for i in row] for row in places])
    sheet = Image.new("RGB", (columns * (width + MARGIN) + MARGIN, tops[-1]), "white")
    drawing = ImageDraw.Draw(sheet)
    for top, row in zip(tops, places, strict=False):
        for column, i in enumerate(row):
            left = MARGIN + column * (width + MARGIN)
            sheet.paste(_rgb(images[i], height, width), (left, top))
            draw_lines(drawing, lines[i], left, top + height)
    return sheet


def _tops(first: int, height: int, lines: list[list[list[str]]]) -> list[int]:
    """Where each row of images of this height begins, and where the last one ends.

    Args:
      first: where the first row begins.
      height: of the images.
      lines: below each image of each row.
    """
    below = [LINE * max(map(len, row), default=0) for row in lines]
    return list(itertools.accumulate((height + each + MARGIN for each in below), initial=first))


def labelled_rows(
    rows: list[tuple[str, UInt8[np.ndarray, "b _h _w c"]]], columns: list[str]
) -> Image.Image:
    """Draws rows of images, all at the size of the largest, with captions of rows and columns."""
    height, width = _cell_size(*max(images.shape[1:3] for _, images in rows))
    size = (CAPTION + len(columns) * (width + MARGIN), HEADER + len(rows) * (height + MARGIN))
    sheet = Image.new("RGB", size, "white")
    drawing = ImageDraw.Draw(sheet)
    for column, name in enumerate(columns):
        drawing.text((CAPTION + column * (width + MARGIN), 2), name[: width // 6], fill="black")
    for row, (caption, images) in enumerate(rows):
        top = HEADER + row * (height + MARGIN)
        drawing.text((MARGIN, top + height // 2 - 6), caption, fill="black")
        for column, image in enumerate(images):
            sheet.paste(_rgb(image, height, width), (CAPTION + column * (width + MARGIN), top))
    return sheet


def relay_grid(
    stages: list[UInt8[np.ndarray, "b _h _w c"]],
    nearest: UInt8[np.ndarray, "b _h _w c"] | None,
    rows: list[tuple[str, list[int]]],
    captions: Sequence[str] | None = None,
) -> Image.Image:
    """Draws the relay at work, image by image.

    Shows every stage's image at its own size and enlarged, the final image, and the nearest real
    one.

    Args:
      stages: the images of each stage, the final ones last.
      nearest: the nearest real image of each final one; None to leave that column out.
      rows: the name of each row and the indices of its images.
      captions: drawn below each final image and what belongs to it; then no names are drawn.
    """
    height, width = _cell_size(*stages[-1].shape[1:3], captions=captions is not None)
    titles = [text for i in range(1, len(stages)) for text in (f"stage {i}", "enlarged")]
    titles.append("final")
    if nearest is not None:
        titles.append("nearest real")
    group, indent = len(titles) * (width + MARGIN) + 3 * MARGIN, MARGIN if captions else LABEL
    lines = [wrapped(text, group - 4 * MARGIN) for text in captions or [""] * len(stages[-1])]
    tops = _tops(HEADER, height, [[lines[number] for number in numbers] for _, numbers in rows])
    columns = max(len(numbers) for _, numbers in rows)
    sheet = Image.new("RGB", (indent + group * columns, tops[-1]), "white")
    draw = ImageDraw.Draw(sheet)
    for top, (name, numbers) in zip(tops, rows, strict=False):
        if not captions:
            draw.text((MARGIN, top + height // 2 - 6), name[:11], fill="black")
        for column, number in enumerate(numbers):
            draw_lines(draw, lines[number], indent + column * group, top + height)
            for place, tile in enumerate(_tiles(stages, nearest, number, height, width)):
                left = indent + column * group + place * (width + MARGIN)
                sheet.paste(tile, (left, top))
                if top == HEADER:
                    draw.text((left, 2), titles[place], fill="black")
    return sheet


def _tiles(
    stages: list, nearest: np.ndarray | None, number: int, height: int, width: int
) -> list[Image.Image]:
    tiles = []
    for images in stages[:-1]:
        h, w = (
            size * images.shape[axis] // stages[-1].shape[axis]
            for axis, size in ((1, height), (2, width))
        )
        true_size = Image.new("RGB", (width, height), "lightgrey")
        true_size.paste(_rgb(images[number], h, w), ((width - w) // 2, (height - h) // 2))
        tiles += [true_size, _rgb(images[number], height, width)]
    real = [] if nearest is None else [_rgb(nearest[number], height, width)]
    return [*tiles, _rgb(stages[-1][number], height, width), *real]


def nearest_real(
    images: UInt8[np.ndarray, "b h w c"], source: ImageSet, chunk: int = 256
) -> tuple[UInt8[np.ndarray, "b h w c"], Int[np.ndarray, " b"]]:
    """The nearest image of a set to each image, by the squared distance of pixels.

    Args:
      images: (b, h, w, c).
      source: the set.
      chunk: images of the set that are compared at a time.

    Returns:
      The nearest images, and their indices, int64 (b,).
    """
    flat = images.reshape(len(images), -1).astype(np.float32)
    best = np.full(len(images), np.inf, np.float32)
    number = np.zeros(len(images), np.int64)
    for first in range(0, len(source), chunk):
        real = source.batch(np.arange(first, min(first + chunk, len(source))))["image"]
        real = real.reshape(len(real), -1).astype(np.float32)
        distance = (real**2).sum(1) - 2 * flat @ real.T + (flat**2).sum(1, keepdims=True)
        candidate = distance.argmin(1)
        candidate_distance = distance[np.arange(len(flat)), candidate]
        closer = candidate_distance < best
        number[closer] = first + candidate[closer]
        best[closer] = candidate_distance[closer]
    return source.batch(number)["image"], number
