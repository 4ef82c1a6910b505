"""Small images in files, for an evaluation to read."""

import numpy as np
from PIL import Image


def write_npz(path, count=20, shape=(8, 8, 3), dtype=np.uint8, name="arr_0"):
    random = np.random.default_rng(0)
    np.savez(path, **{name: random.integers(0, 256, (count, *shape), np.uint8).astype(dtype)})


def write_folder(path, count=20, size=8, mode="RGB"):
    path.mkdir()
    for i, image in enumerate(
        np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)
    ):
        Image.fromarray(image).convert(mode).save(path / f"{i:02d}.png")
