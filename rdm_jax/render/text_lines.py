"""Text below pictures: wrapped to their width, in a size that is legible."""

import bisect
import functools

from PIL import ImageDraw, ImageFont

SIZE, LINE = 13, 16  # pixels: of the font, and from one line to the next
MOST_LINES = 4  # of a caption; a longer one ends in dots


def wrapped(text: str, width: int) -> list[str]:
    """Splits a text into lines of at most `width` pixels, at spaces where possible."""
    lines, line = [], ""
    for word in text[: (MOST_LINES + 1) * width].split():  # a pixel per character, at least
        if line and not _fits(f"{line} {word}", width):
            lines.append(line)
            line = ""
        line = f"{line} {word}" if line else word
        while not _fits(line, width) and len(line) > 1:  # a long word
            fits = _characters(line, width)
            lines.append(line[:fits])
            line = line[fits:]
    lines += [line] if line else []
    if len(lines) <= MOST_LINES:
        return lines
    last = lines[MOST_LINES - 1]
    while last and not _fits(f"{last}...", width):
        last = last[:-1]
    return [*lines[: MOST_LINES - 1], f"{last}..."]


def draw_lines(drawing: ImageDraw.ImageDraw, lines: list[str], left: int, top: int) -> None:
    """Draws lines below each other, `LINE` pixels apart."""
    for number, line in enumerate(lines):
        drawing.text((left, top + number * LINE), line, fill="black", font=_font())


@functools.cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(SIZE)


def _characters(text: str, width: int) -> int:
    """How many characters of a text fit, at least 1."""
    counts = range(1, len(text))
    return max(1, bisect.bisect_right(counts, width, key=lambda n: _font().getlength(text[:n])))


def _fits(text: str, width: int) -> bool:
    return _font().getlength(text) <= width
