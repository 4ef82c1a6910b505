"""The cases of the published implementation's numbers: where they are, and what they hold."""

import json
import os
import pathlib
import zlib

import numpy as np
import pytest

from tests.support.paths import ROOT

FOLDER = pathlib.Path(os.environ.get("RDM_REFERENCE_DIR", ROOT / "tests/reference_cases"))
# All other numbers in a case's meta are real.
WHOLE = {"seed", "patch", "block", "up_scale", "num_steps", "num_noise_draws"}


def cases(kind: str):
    """Parameters for `pytest.mark.parametrize`: every file of a kind; none is an error."""
    found = [pytest.param(path, id=path.stem) for path in sorted(FOLDER.glob(f"{kind}-*.npz"))]
    return pytest.mark.parametrize(
        "path", found or [pytest.param(None, id=f"no-{kind}-case-found")]
    )


def load(path):
    assert path is not None, f"no case of this kind in {FOLDER}"
    arrays = dict(np.load(path))
    meta = json.loads(str(arrays.pop("meta")))
    return {
        k: float(v) if type(v) is int and k not in WHOLE else v for k, v in meta.items()
    }, arrays


def draw_parameter(name, shape, seed):
    """The recipe by which the parameters of JiT's cases were drawn."""
    random = np.random.default_rng([seed, zlib.crc32(name.encode())])
    z = random.standard_normal(shape).astype(np.float32)
    if "norm" in name and name.endswith("weight"):
        return 1 + 0.1 * z
    if name.endswith("bias"):
        return 0.1 * z
    if name == "in_context_posemb" or name.endswith("embedding_table.weight"):
        return 0.5 * z
    return z * np.float32(0.7 / np.sqrt(np.prod(shape[1:])))
