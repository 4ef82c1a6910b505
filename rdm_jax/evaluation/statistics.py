"""What is kept of a set of images to compare it with others: gathered batch by batch, saved, and read from published files."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int, UInt8

from rdm_jax import sharding
from rdm_jax.errors import InputError
from rdm_jax.evaluation import metrics, moments
from rdm_jax.evaluation.features import FeatureSpace
from rdm_jax.evaluation.npz import Npz
from rdm_jax.files import whole_file

# How ADM (guided-diffusion's evaluator) calls the mean and the covariance of each output, and all after it.
NAMES = {"features": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}


@dataclass(frozen=True)
class Statistics:
    """A set of images, as a feature space sees it.

    Attributes:
      about: JSON: what the images are.
      count: of images; None where a published file does not say.
      gaussians: mean and covariance of 'features' and, in some spaces, 'spatial'; float64.
      features: float32 (n, d) of some images, randomly chosen; None where a published file has none.
      scores: what is measured of the set alone, by name.
    """

    about: dict[str, Any]
    count: int | None
    gaussians: dict[str, tuple[np.ndarray, np.ndarray]] = field(repr=False)
    features: np.ndarray | None = field(repr=False)
    scores: dict[str, float] = field(default_factory=dict)


class Tally:
    """Statistics of a set of `count` images that are given batch by batch; what it holds can be saved, and set again.

    Args:
      space: where the features are from.
      kept: features to keep, of images that are randomly chosen (always the same: a set may be sorted).
      shown: numbers of the images to keep for a picture.

    Attributes:
      done: images so far.
      pictures: those of them that are shown, by number.
    """

    def __init__(self, space: FeatureSpace, count: int, *, kept: int, shown: Int[np.ndarray, " s"]):
        self.count, self.done, self._space = count, 0, space
        self._kept = np.sort(np.random.default_rng(0).permutation(count)[:kept])
        self._shown, self.pictures = set(shown.tolist()), {}
        self._features: list[np.ndarray] = []
        self._sums: dict[str, moments.Moments] = {}
        self._score = metrics.InceptionScore(space.sizes["logits"]) if "logits" in space.sizes else None
        self._right = self._labelled = 0

    def add(self, outputs: dict[str, jax.Array], images: UInt8[np.ndarray, "b h w c"], labels: Int[np.ndarray, " b"]) -> None:
        """Takes the next images, and what the feature space says of them; rows of `outputs` beyond them fill a batch up.

        Raises:
          InputError: a feature is not a finite number.
        """
        here, size = len(images), len(outputs["features"])
        features = np.asarray(outputs["features"])[:here]
        if not np.isfinite(features).all():
            raise InputError(f"the features of images {self.done} to {self.done + here - 1} are not finite; others would do.")
        numbers = np.arange(self.done, self.done + here)
        real = sharding.put_batch((np.arange(size) < here).astype(np.float32), sharding.data_mesh())
        for name in ("features", "spatial"):
            if name in outputs:
                if name not in self._sums:
                    self._sums[name] = moments.start(outputs[name][:here].mean(0))
                self._sums[name] = moments.update(self._sums[name], outputs[name], real)
        self._features.append(features[np.isin(numbers, self._kept)])
        if self._score:
            logits = np.asarray(outputs["logits"])[:here]
            self._score.add(logits)
            if self._space.class_names:
                self._right += int((logits.argmax(1) == labels)[labels >= 0].sum())
                self._labelled += int((labels >= 0).sum())
        self.pictures |= {int(n): image for n, image in zip(numbers, images, strict=True) if int(n) in self._shown}
        self.done += here

    def statistics(self, about: dict[str, Any]) -> Statistics:
        """Of all images. Raises RuntimeError while some are missing."""
        if self.done != self.count:
            raise RuntimeError(f"{self.done} of {self.count} images have been seen")
        gaussians = {name: moments.mean_and_covariance(sums, self.done) for name, sums in self._sums.items()}
        scores = {}
        if self._score:
            name = "inception_score" if self._space.name == "inception" else "classifier_score"
            scores[name] = self._score.value()
        if self._labelled:
            scores["accuracy"] = self._right / self._labelled
        return Statistics(about, self.done, gaussians, np.concatenate(self._features), scores)

    def state(self) -> dict[str, np.ndarray]:
        """All that has been gathered, as arrays by name."""
        numbers = sorted(self.pictures)
        arrays = {name: np.array(n) for name, n in (("done", self.done), ("right", self._right), ("labelled", self._labelled))}
        arrays |= {"features": np.concatenate(self._features), "numbers": np.asarray(numbers, np.int64)}
        arrays |= {"pictures": np.stack([self.pictures[n] for n in numbers])} if numbers else {}
        arrays |= self._score.state() if self._score else {}
        for name, sums in self._sums.items():
            arrays |= {f"{name}.{part}": np.asarray(value) for part, value in sums._asdict().items()}
        return arrays

    def set_state(self, arrays: dict[str, np.ndarray]) -> None:
        """Goes on from what `state` gave."""
        self.done, self._right, self._labelled = (int(arrays[name]) for name in ("done", "right", "labelled"))
        self._features = [arrays["features"]]
        self.pictures = dict(zip(arrays["numbers"].tolist(), arrays.get("pictures", []), strict=True))
        if self._score:
            self._score.set_state(arrays)
        whole = sharding.replicated(sharding.data_mesh())
        for name in ("features", "spatial"):
            if f"{name}.shift" in arrays:
                parts = {part: jax.device_put(arrays[f"{name}.{part}"], whole) for part in moments.Moments._fields}
                self._sums[name] = moments.Moments(**parts)


def save_statistics(path: Path, statistics: Statistics, space: FeatureSpace) -> None:
    """Writes statistics under ADM's names, and beside them 'features' and 'about' (JSON: the space, the images, how many)."""
    about = {"images": statistics.about, "count": statistics.count, "space": {"name": space.name, "digest": space.digest}}
    arrays = {"about": np.array(json.dumps(about)), "features": statistics.features}
    for name, gaussian in statistics.gaussians.items():
        arrays |= dict(zip(NAMES[name], gaussian, strict=True))
    with whole_file(path) as partial, partial.open("wb") as file:
        np.savez(file, **arrays)


def read_statistics(path: Path, space: FeatureSpace) -> Statistics:
    """Reads what `save_statistics` wrote, ADM's (mu, sigma, mu_s, sigma_s) or EDM's (mu, sigma) statistics.

    Raises:
      InputError: the file is damaged, has objects in it, or its numbers are not finite or of another feature space.
    """
    with Npz(path) as file:
        about = _about(file, space)
        gaussians = {
            name: _gaussian(file, space, name) for name in NAMES if NAMES[name][0] in file.arrays and name in space.sizes
        }
        if "features" not in gaussians:
            found = ", ".join(file.arrays) or "nothing"
            raise InputError(f"{path} has no mu and sigma, only {found}; statistics as ADM's, EDM's or ours would do.")
        features = file.read("features").astype(np.float32) if "features" in file.arrays else None
    if features is not None and (
        features.ndim != 2 or features.shape[1] != space.sizes["features"] or not np.isfinite(features).all()
    ):
        raise InputError(f"{path} has features of shape {features.shape} or not finite; statistics of these features would do.")
    with path.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    about_images = {"file": path.name, "sha256": digest, "images": about.get("images")}
    return Statistics(about_images, about.get("count"), gaussians, features)


def _about(file: Npz, space: FeatureSpace) -> dict[str, Any]:
    """What our own files say of themselves; published ones say nothing, and are of Inception's features."""
    ours = {"name": space.name, "digest": space.digest}
    about = {"space": {"name": "inception", "digest": space.digest}}
    if "about" in file.arrays:
        try:
            about = json.loads(str(file.read("about")))
            about["space"]["digest"], about["count"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{file.path} cannot be used (its 'about' is damaged); statistics as ADM's would do.") from error
    if about["space"] != ours:
        found = " ".join(str(about["space"].get(key))[:12] for key in ours)
        raise InputError(
            f"{file.path} has statistics of other features ({found}); those of {space.name} {space.digest[:12]} would do."
        )
    return about


def _gaussian(file: Npz, space: FeatureSpace, name: str) -> tuple[np.ndarray, np.ndarray]:
    size, shapes = space.sizes[name], []
    for part, wanted in zip(NAMES[name], ((size,), (size, size)), strict=True):
        shape, dtype = file.arrays.get(part, ((), None))
        if shape != wanted or dtype.kind != "f":
            would_do = f"{wanted}, for {space.name}'s {name}, would do."
            raise InputError(f"{file.path} has {part} of shape {shape}; {would_do}")
        shapes.append(file.read(part).astype(np.float64))
    mean, covariance = shapes
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise InputError(f"{file.path} has numbers that are not finite in {name}'s statistics; whole statistics would do.")
    if np.abs(covariance - covariance.T).max() > 1e-6 * np.abs(covariance).max():
        raise InputError(f"{file.path} has a {NAMES[name][1]} that is no covariance (not symmetric); whole statistics would do.")
    return mean, covariance


def compare(reference: Statistics, sample: Statistics, space: FeatureSpace) -> tuple[dict[str, float], list[str]]:
    """Every metric that can be had of a set of images beside a reference, and what to know of them.

    Raises:
      InputError: a set has too few images.
    """
    counts = [len(s.features) for s in (reference, sample) if s.features is not None] + [sample.count]
    if min(counts) <= metrics.NEIGHBOURS:
        would_do = f"more than {metrics.NEIGHBOURS} would do."
        raise InputError(f"config.evaluation compares sets of {min(counts)} images, which are too few; {would_do}")
    distance = {"features": "fid", "spatial": "sfid"}
    if space.name != "inception":
        distance = {"features": "frechet_distance", "spatial": "spatial_frechet_distance"}
    found, notes = {}, []
    for name, gaussian in sample.gaussians.items():
        if name in reference.gaussians:
            found[distance[name]] = metrics.frechet_distance(*reference.gaussians[name], *gaussian)
        else:
            notes.append(f"{distance[name]}: the reference has no statistics of it")
        small = [s.count for s in (reference, sample) if s.count and s.count <= len(gaussian[0])]
        if small:
            notes.append(f"{distance[name]}: {min(small)} images are no more than its {len(gaussian[0])} features; far too large")
    found |= sample.scores
    if reference.features is None:
        return found, [*notes, "precision, recall, kid: the reference has statistics alone, and no images"]
    found["precision"], found["recall"] = metrics.precision_and_recall(reference.features, sample.features)
    found["kid"], found["kid_standard_error"] = metrics.kernel_distance(reference.features, sample.features)
    return found, notes
