import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def folder(tmp_path):
    """Seven images of the size itself, in two classes."""
    rng = np.random.default_rng(0)
    for name in ("cat/0", "cat/1", "cat/2", "dog/0", "dog/1", "dog/2", "dog/3"):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 6, 3), np.uint8)).save(tmp_path / "images" / f"{name}.png")
    return tmp_path / "images"
