"""Files of statistics: this project's, and the published ones of ADM and EDM."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from rdm_jax.config.schema import LEAST
from rdm_jax.evaluation.features import FeatureSpace
from rdm_jax.evaluation.statistics import ENERGY, Statistics
from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.files import atomic_write, parse_json, sha256
from rdm_jax.runtime.npz import Npz

INTACT = "Use an intact file of statistics."
# Names of the mean and covariance of each output, as in guided-diffusion's evaluator (ADM).
NAMES = {"features": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}


def save_statistics(path: Path, statistics: Statistics, space: FeatureSpace) -> None:
    """Writes statistics under ADM's names, with 'features', 'high_frequency_energy' and 'about'.

    'about' is JSON: the images, their number and the feature space.
    """
    about = {
        "images": statistics.about,
        "count": statistics.count,
        "space": {"name": space.name, "digest": space.digest},
    }
    arrays = {"about": np.array(json.dumps(about)), "features": statistics.features}
    if statistics.energy is not None:
        arrays[ENERGY] = np.array(statistics.energy)
    for name, gaussian in statistics.gaussians.items():
        arrays |= dict(zip(NAMES[name], gaussian, strict=True))
    with atomic_write(path) as partial, partial.open("wb") as file:
        np.savez(file, **arrays)


def read_statistics(path: Path, space: FeatureSpace) -> Statistics:
    """Reads the statistics of `save_statistics`, of ADM (mu, sigma, mu_s, sigma_s) or EDM (mu,
    sigma).

    Raises:
      InputError: the file is damaged, has Python objects in it, or its numbers are not finite or of
        another feature space.
    """
    with Npz(path) as file:
        about = _about(file, space)
        gaussians = {
            name: _gaussian(file, space, name)
            for name in NAMES
            if NAMES[name][0] in file.arrays and name in space.sizes
        }
        if "features" not in gaussians:
            found = ", ".join(file.arrays) or "nothing"
            raise InputError(
                f"{path} has no mu and sigma, only {found}",
                "Use statistics of ADM, EDM or this project.",
            )
        features, energy = _features(file, space), _energy(file)
    about_images = {"file": path.name, "sha256": sha256(path), "images": about.get("images")}
    return Statistics(about_images, about.get("count"), gaussians, features, energy=energy)


def _about(file: Npz, space: FeatureSpace) -> dict[str, Any]:
    """What the file is of; published files do not say, and are of Inception's features."""
    ours = {"name": space.name, "digest": space.digest}
    about = {"space": {"name": "inception", "digest": space.digest}}
    if "about" in file.arrays:
        try:
            about = parse_json(str(file.read("about")))
            known = isinstance(about["count"], int | None) and isinstance(about["space"], dict)
            if not known or (about["count"] is not None and about["count"] < 1):
                raise ValueError("no number of images, or no feature space")
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{file.path} cannot be used (its 'about' is damaged)",
                "Use statistics of ADM, EDM or this project.",
            ) from error
    if about["space"] != ours:
        found = " ".join(str(about["space"].get(key))[:12] for key in ours)
        raise InputError(
            f"{file.path} has statistics of other features ({found})",
            f"Use those of {space.name} {space.digest[:12]}.",
        )
    return about


def _gaussian(file: Npz, space: FeatureSpace, name: str) -> tuple[np.ndarray, np.ndarray]:
    size, arrays = space.sizes[name], []
    for part, wanted in zip(NAMES[name], ((size,), (size, size)), strict=True):
        shape, dtype = file.arrays.get(part, ((), None))
        if shape != wanted or dtype.kind != "f":
            raise InputError(
                f"{file.path} has {part} of shape {shape}",
                f"Use shape {wanted}, for {space.name}'s {name}.",
            )
        arrays.append(file.read(part).astype(np.float64))
    mean, covariance = arrays
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise InputError(
            f"{file.path} has numbers that are not finite in {name}'s statistics", INTACT
        )
    asymmetric = np.abs(covariance - covariance.T).max() > 1e-6 * np.abs(covariance).max()
    spreads = np.linalg.eigvalsh(covariance)
    if asymmetric or spreads[0] < -1e-6 * abs(spreads[-1]):
        why = "not symmetric" if asymmetric else "a variance is negative"
        raise InputError(
            f"{file.path} has a {NAMES[name][1]} that is not a covariance ({why})", INTACT
        )
    return mean, covariance


def _features(file: Npz, space: FeatureSpace) -> np.ndarray | None:
    if "features" not in file.arrays:
        return None
    shape, dtype = file.arrays["features"]  # known before anything large is read
    size = space.sizes["features"]
    if len(shape) != 2 or shape[0] < LEAST or shape[1] != size or dtype != np.float32:
        raise InputError(
            f"{file.path} has features of shape {shape}, {dtype}",
            f"Use float32 of shape ({LEAST} or more, {size}).",
        )
    features = file.read("features")
    if not np.isfinite(features).all():
        raise InputError(f"{file.path} has features that are not finite", INTACT)
    return features


def _energy(file: Npz) -> float | None:
    if ENERGY not in file.arrays:  # others' files, and those of earlier versions
        return None
    shape, dtype = file.arrays[ENERGY]
    if shape or dtype != np.float64:
        raise InputError(
            f"{file.path} has {ENERGY} of shape {shape}, {dtype}", "Use float64 of shape ()."
        )
    energy = float(file.read(ENERGY))
    if not 0 <= energy < np.inf:
        raise InputError(f"{file.path} has {ENERGY}={energy}", INTACT)
    return energy
