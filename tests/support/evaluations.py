"""Evaluations that reports are made of."""

import json

import numpy as np
from PIL import Image

from rdm_jax.config import Published


def write_evaluation(folder, *names: str, published: Published = Published(), **metrics):  # noqa: B008
    """An evaluation.json with these metrics for every name, and its images. Returns its path."""
    folder.mkdir(parents=True)
    result = {
        "results": {
            name: {"images": 50_000, "metrics": metrics, "notes": ["a note of " + name]}
            for name in names
        },
        "made_with": {
            "features": {"name": "inception", "digest": "0"},
            "reference": {"file": "adm.npz"},
            "images": [],
        },
        "published": vars(published),
        "versions": {"jax": "0.0"},
        "devices": "1 x cpu",
    }
    (folder / "evaluation.json").write_text(json.dumps(result))
    for name in names:
        Image.fromarray(np.full((4, 4, 3), 100, np.uint8)).save(folder / f"{name}.png")
    return folder / "evaluation.json"
