"""Pictures of samples."""

import numpy as np
import pytest

from rdm_jax.data.image_sets import open_prepared
from rdm_jax.data.images import ImageSpec
from rdm_jax.data.prepare import prepare
from rdm_jax.render import pictures
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
