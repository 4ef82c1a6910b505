"""Pictures: grids of samples, and the stages of the relay beside the nearest real images."""

from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image, ImageDraw

from rdm_jax.data.image_sets import ImageSet
from rdm_jax.runtime.files import atomic_write

MARGIN, HEADER, LABEL, CAPTION = 4, 16, 72, 132  # pixels


def _rgb(image: UInt8[np.ndarray, "h w c"], height: int, width: int) -> Image.Image:
    """One image as RGB, enlarged without smoothing, so that pixels stay visible."""
    picture = Image.fromarray(np.broadcast_to(image, (*image.shape[:2], 3)))
    return picture.resize((width, height), Image.Resampling.NEAREST)


def save_picture(picture: Image.Image, path: Path) -> None:
    """Writes a PNG atomically."""
    with atomic_write(path) as partial:
        picture.save(partial, format="PNG")


def _cell_size(height: int, width: int) -> tuple[int, int]:
    """The size at which an image is drawn: small ones are enlarged by an integer, to about 96."""
    times = max(1, 96 // max(height, width))
    return height * times, width * times


def plain_grid(images: UInt8[np.ndarray, "b h w c"], columns: int) -> Image.Image:
    """Draws images in reading order."""
    height, width = _cell_size(*images.shape[1:3])
    rows = -(-len(images) // columns)
    sheet = Image.new(
        "RGB", (columns * (width + MARGIN) + MARGIN, rows * (height + MARGIN) + MARGIN), "white"
    )
    for i, image in enumerate(images):
        place = (MARGIN + i % columns * (width + MARGIN), MARGIN + i // columns * (height + MARGIN))
        sheet.paste(_rgb(image, height, width), place)
    return sheet


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
) -> Image.Image:
    """Draws the relay at work, image by image.

    Shows every stage's image at its own size and enlarged, the final image, and the nearest real
    one.

    Args:
      stages: the images of each stage, the final ones last.
      nearest: the nearest real image of each final one; None to leave that column out.
      rows: the name of each row and the indices of its images.
    """
    height, width = _cell_size(*stages[-1].shape[1:3])
    captions = [text for i in range(1, len(stages)) for text in (f"stage {i}", "enlarged")]
    captions.append("final")
    if nearest is not None:
        captions.append("nearest real")
    group = len(captions) * (width + MARGIN) + 3 * MARGIN
    size = (
        LABEL + group * max(len(numbers) for _, numbers in rows),
        HEADER + len(rows) * (height + MARGIN),
    )
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for row, (name, numbers) in enumerate(rows):
        top = HEADER + row * (height + MARGIN)
        draw.text((MARGIN, top + height // 2 - 6), name[:11], fill="black")
        for column, number in enumerate(numbers):
            for place, tile in enumerate(_tiles(stages, nearest, number, height, width)):
                left = LABEL + column * group + place * (width + MARGIN)
                sheet.paste(tile, (left, top))
                if row == 0:
                    draw.text((left, 2), captions[place], fill="black")
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
