import numpy as np
import pytest
from PIL import Image

from tests.support.archive_members import write_folder, write_tar, write_zip


@pytest.fixture
def folder(tmp_path):
    """Seven images of the requested size, in two classes."""
    rng = np.random.default_rng(0)
    for name in ("cat/0", "cat/1", "cat/2", "dog/0", "dog/1", "dog/2", "dog/3"):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 6, 3), np.uint8)).save(
            tmp_path / "images" / f"{name}.png"
        )
    return tmp_path / "images"


@pytest.fixture(params=["zip", "folder", "tar"])
def written(request, tmp_path):
    """Returns a function that writes members as a zip, a folder or a tar, and returns its spec."""
    write = {"zip": write_zip, "folder": write_folder, "tar": write_tar}[request.param]
    return lambda members: write(tmp_path / f"set.{request.param}", members)
