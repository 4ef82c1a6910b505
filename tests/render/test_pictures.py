"""Pictures of samples."""

import numpy as np
import pytest
from PIL import ImageFont

from rdm_jax.data.image_sets import open_prepared
from rdm_jax.data.images import ImageSpec
from rdm_jax.data.prepare import prepare
from rdm_jax.render import pictures
from rdm_jax.render.text_lines import LINE, SIZE, wrapped
from tests.support.configs import write_images


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "images"
    write_images(folder)
    return open_prepared(prepare(f"folder:{folder}", f"{folder}_prepared", ImageSpec(8, 8)))


def test_nearest_real(source):
    wanted = source.batch([5, 17])["image"]
    noisy = np.clip(wanted.astype(int) + 2, 0, 255).astype(np.uint8)
    found, numbers = pictures.nearest_real(noisy, source, chunk=7)
    assert numbers.tolist() == [5, 17]
    np.testing.assert_array_equal(found, wanted)


def test_grid_shows_every_stage(source):
    images = source.batch(range(4))["image"]
    grid = np.asarray(
        pictures.relay_grid([images[:, :4, :4], images], images, [("a", [0, 1]), ("b", [2, 3])])
    )
    side = 96
    first = grid[pictures.HEADER : pictures.HEADER + side, pictures.LABEL :]
    for place, (image, size) in enumerate(
        [(images[0, :4, :4], 24), (images[0], 12), (images[0], 12)], 1
    ):
        left = place * (side + pictures.MARGIN)
        np.testing.assert_array_equal(first[::size, left : left + side : size], image)


def test_captions_are_drawn_below_their_images():
    """Enlarged by an integer, wrapped to the width of the picture."""
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (3, 48, 48, 3), np.uint8)
    texts = ["a cat", "a very long caption that needs more than one line", "b"]
    grid = np.asarray(pictures.plain_grid(images, columns=2, captions=texts))
    side, gap = 144, pictures.MARGIN
    assert grid.shape[1] == 2 * (side + gap) + gap
    lines = [wrapped(text, side) for text in texts]
    assert list(map(len, lines)) == [1, 3, 1]
    second = 2 * gap + side + LINE * 3
    for image, text, (top, left) in zip(
        images, lines, [(gap, gap), (gap, 2 * gap + side), (second, gap)], strict=True
    ):
        np.testing.assert_array_equal(grid[top : top + side : 3, left : left + side : 3], image)
        below = grid[top + side : top + side + LINE * 3, left : left + side]
        assert (below[: LINE * len(text)] < 128).any(), text
        assert (below[LINE * len(text) :] == 255).all(), text
    assert grid.shape[0] == second + side + LINE + gap


def test_relay_grid_has_captions(source):
    images = source.batch(range(3))["image"]
    stages, rows = [images[:, :4, :4], images], [("", [0, 1]), ("", [2])]
    grid = np.asarray(pictures.relay_grid(stages, images, rows, ["one", "two", "x" * 300]))
    side, gap = 128, pictures.MARGIN
    group = 4 * (side + gap) + 3 * gap
    assert grid.shape[1] == gap + 2 * group
    final = grid[pictures.HEADER : pictures.HEADER + side, gap + 2 * (side + gap) :][:, :side]
    np.testing.assert_array_equal(final[::16, ::16], images[0])
    assert len(wrapped("x" * 300, group - 4 * gap)) > 1
    assert grid.shape[0] > pictures.HEADER + 2 * (side + LINE + gap)


@pytest.mark.parametrize(
    ("text", "count"), [("", 0), ("a", 1), ("word " * 200, 4), ("x" * 1000, 4), ("漢字" * 300, 4)]
)
def test_lines_fit_the_width(text, count):
    lines = wrapped(text, 100)
    assert len(lines) == count
    assert all(ImageFont.load_default(SIZE).getlength(line) <= 100 for line in lines)
    assert not lines or lines[-1].endswith("...") == (count == 4)


def test_narrowest_picture_has_lines():
    assert wrapped("ab", 1) == ["a", "b"]
