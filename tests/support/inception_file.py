"""Files like the published ones of Inception-v3 and EfficientNet-Lite0, with parameters by the
recipe of the reference cases."""

import hashlib
import re
import zlib
from pathlib import Path

import numpy as np

from tests.support.torch_standins import dump_legacy, state_dict


def draw(name: str, shape: list[int], seed: int) -> np.ndarray:
    """One parameter by the recipe, under the port's name and in its shape."""
    z = (
        np.random.default_rng([seed, zlib.crc32(name.encode())])
        .standard_normal(shape)
        .astype(np.float32)
    )
    if name.endswith("running_var"):
        return 1 + 0.1 * np.abs(z)
    if re.search(r"bn\d?\.weight$", name):
        return 1 + 0.1 * z
    return (
        0.1 * z
        if name.endswith(("running_mean", "bias"))
        else z * np.float32(1.4 / np.sqrt(np.prod(shape[1:])))
    )


def write(path: Path, parameters: dict[str, np.ndarray]) -> str:
    """Writes the file as the published one is, with numbers of batches that nobody reads; returns
    its SHA-256."""
    batches = {
        name.replace("running_var", "num_batches_tracked"): np.int64(0)
        for name in parameters
        if "running_var" in name
    }
    dump_legacy(
        path, state_dict(parameters | {name: np.asarray(count) for name, count in batches.items()})
    )
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
