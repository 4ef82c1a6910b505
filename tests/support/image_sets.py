"""Sets of images in memory."""

import numpy as np

from rdm_jax.data.image_sets import ImageSet


class Items(list):
    def identity(self) -> str:
        raise AssertionError("a set in memory is identified by its pixels")


def image_set(seed: int = 0, count: int = 24) -> ImageSet:
    random = np.random.default_rng(seed)
    items = Items((random.integers(0, 256, (4, 4, 3), np.uint8), i % 2) for i in range(count))
    images = ImageSet(items, (4, 4, 3), ("a", "b"))
    images.cache("decoding")
    return images
