"""Statistics of sets of images: accumulated batch by batch, and compared."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, UInt8

from rdm_jax.evaluation import metrics, moments
from rdm_jax.evaluation.features import FeatureSpace
from rdm_jax.runtime import sharding
from rdm_jax.runtime.errors import InputError

ENERGY = "high_frequency_energy"  # beside the outputs of a feature space
LEAST_ENERGY = 1e-12  # below are the rounding errors of images without any


@dataclass(frozen=True)
class Statistics:
    """The statistics of a set of images in a feature space.

    Attributes:
      about: what the images are, as JSON.
      count: number of images; None if a published file does not say.
      gaussians: mean (d,) and covariance (d, d) of 'features' and, in some spaces, 'spatial';
        float64.
      features: float32 (n, d) of randomly chosen images; None if a published file has none.
      scores: metrics of the set alone, by name.
      energy: the mean `high_frequency_energy` of the images; None if a file does not say.
    """

    about: dict[str, Any]
    count: int | None
    gaussians: dict[str, tuple[np.ndarray, np.ndarray]] = field(repr=False)
    features: np.ndarray | None = field(repr=False)
    scores: dict[str, float] = field(default_factory=dict)
    energy: float | None = None


class StatisticsAccumulator:
    """Accumulates the statistics of a set of `count` images, batch by batch.

    Its state can be saved and restored.

    Args:
      name: of the set, for errors.
      space: of the features.
      count: number of images.
      kept: number of features to keep, of randomly chosen images (a set may be sorted); the choice
        is always the same.
      shown: indices of the images to keep for a picture.

    Attributes:
      kept: indices of the images whose features are kept.
      done: number of images so far.
      pictures: the images to show so far, by index.
    """

    def __init__(
        self, name: str, space: FeatureSpace, count: int, *, kept: int, shown: Int[np.ndarray, " s"]
    ):
        self.count, self.done = count, 0
        self._name, self._space = name, space
        self.kept = kept_indices(count, kept)
        self._shown, self.pictures = set(shown.tolist()), {}
        self._features: list[np.ndarray] = []
        self._sums: dict[str, moments.Moments] = {}
        has_logits = "logits" in space.sizes
        self._score = metrics.InceptionScore(space.sizes["logits"]) if has_logits else None
        self._correct, self._labelled = 0, 0
        self._energy = 0.0  # summed over images

    def add(
        self,
        outputs: dict[str, jax.Array],
        images: UInt8[np.ndarray, "b h w c"],
        labels: Int[np.ndarray, " b"],
    ) -> None:
        """Adds the next images.

        Args:
          outputs: of the feature space, (b2, size) by name, and `ENERGY`, (b2,); rows beyond the
            images are padding.
          images: (b, h, w, c).
          labels: (b,), -1 for none.

        Raises:
          InputError: a feature is not finite.
        """
        count = len(images)
        self._check_finite(outputs, count)
        self._add_moments(outputs, count)
        numbers = np.arange(self.done, self.done + count)
        features = np.asarray(outputs["features"])[:count]
        self._features.append(features[np.isin(numbers, self.kept)])
        self._energy += float(np.asarray(outputs[ENERGY], np.float64)[:count].sum())
        if self._score:
            logits = np.asarray(outputs["logits"])[:count]
            self._score.add(logits)
            if self._space.class_names:
                self._correct += int((logits.argmax(1) == labels)[labels >= 0].sum())
                self._labelled += int((labels >= 0).sum())
        for number, image in zip(numbers.tolist(), images, strict=True):
            if number in self._shown:
                self.pictures[number] = image
        self.done += count

    def _check_finite(self, outputs: dict[str, jax.Array], count: int) -> None:
        for name, output in outputs.items():
            if not np.isfinite(np.asarray(output)[:count]).all():
                last = self.done + count - 1
                raise InputError(
                    f"config.evaluation: {name} of images {self.done} to {last} of {self._name} "
                    "are not finite",
                    "Use other weights or another set.",
                )

    def _add_moments(self, outputs: dict[str, jax.Array], count: int) -> None:
        mesh = sharding.local_mesh()
        real = (np.arange(len(outputs["features"])) < count).astype(np.float32)
        real = sharding.put_batch(real, mesh)
        for name in ("features", "spatial"):
            if name not in outputs:
                continue
            if name not in self._sums:
                shift = jnp.asarray(np.asarray(outputs[name])[:count].mean(0))
                replicated = sharding.replicated(mesh)
                self._sums[name] = jax.device_put(moments.start(shift), replicated)
            self._sums[name] = moments.update(self._sums[name], outputs[name], real)

    def statistics(self, about: dict[str, Any]) -> Statistics:
        """The statistics of all images.

        Args:
          about: what the images are, as JSON.

        Raises:
          RuntimeError: images are missing.
        """
        if self.done != self.count:
            raise RuntimeError(f"{self.done} of {self.count} images have been seen")
        gaussians = {
            name: moments.mean_and_covariance(sums, self.done) for name, sums in self._sums.items()
        }
        scores = {}
        if self._score:
            name = "inception_score" if self._space.name == "inception" else "classifier_score"
            scores[name] = self._score.value()
        if self._labelled:
            scores["accuracy"] = self._correct / self._labelled
        features, energy = np.concatenate(self._features), self._energy / self.done
        return Statistics(about, self.done, gaussians, features, scores, energy)

    def state(self) -> dict[str, np.ndarray]:
        """The state, as arrays by name."""
        numbers = sorted(self.pictures)
        arrays = {
            "done": np.array(self.done),
            "right": np.array(self._correct),
            "labelled": np.array(self._labelled),
            "energy": np.array(self._energy),
            "features": np.concatenate(self._features),
            "numbers": np.asarray(numbers, np.int64),
        }
        if numbers:
            arrays["pictures"] = np.stack([self.pictures[n] for n in numbers])
        if self._score:
            arrays |= self._score.state()
        for name, sums in self._sums.items():
            for part, value in sums._asdict().items():
                arrays[f"{name}.{part}"] = np.asarray(value)
        return arrays

    def set_state(self, arrays: dict[str, np.ndarray]) -> None:
        """Continues from a state that `state` returned."""
        self.done, self._correct = int(arrays["done"]), int(arrays["right"])
        self._labelled, self._energy = int(arrays["labelled"]), float(arrays["energy"])
        self._features = [arrays["features"]]
        self.pictures = dict(
            zip(arrays["numbers"].tolist(), arrays.get("pictures", []), strict=True)
        )
        if self._score:
            self._score.set_state(arrays)
        replicated = sharding.replicated(sharding.local_mesh())
        for name in ("features", "spatial"):
            if f"{name}.shift" in arrays:
                parts = {
                    part: jax.device_put(arrays[f"{name}.{part}"], replicated)
                    for part in moments.Moments._fields
                }
                self._sums[name] = moments.Moments(**parts)


def kept_indices(count: int, kept: int) -> Int[np.ndarray, " k"]:
    """Which of `count` images keep their features, if at most `kept` do: the same at all times."""
    return np.sort(np.random.default_rng(0).permutation(count)[:kept])


def compare(
    reference: Statistics, sample: Statistics, space: FeatureSpace
) -> tuple[dict[str, float], list[str]]:
    """All metrics that a set of images and a reference allow.

    Args:
      reference, sample: the statistics.
      space: of the features.

    Returns:
      The metrics by name, and notes on them.

    Raises:
      InputError: a set has too few images.
    """
    counts = [len(s.features) for s in (reference, sample) if s.features is not None]
    least = min([*counts, sample.count])
    if least <= metrics.NEIGHBOURS:
        raise InputError(
            f"config.evaluation compares sets of {least} images, which are too few",
            f"Use more than {metrics.NEIGHBOURS}.",
        )
    distance = {"features": "fid", "spatial": "sfid"}
    if space.name != "inception":
        distance = {"features": "frechet_distance", "spatial": "spatial_frechet_distance"}
    found, notes = {}, []
    for name, gaussian in sample.gaussians.items():
        if name in reference.gaussians:
            found[distance[name]] = metrics.frechet_distance(*reference.gaussians[name], *gaussian)
        else:
            notes.append(f"{distance[name]}: the reference has no statistics for it")
        small = [s.count for s in (reference, sample) if s.count and s.count <= len(gaussian[0])]
        if small:
            notes.append(
                f"{distance[name]}: {min(small)} images are no more than its {len(gaussian[0])} "
                "features; the estimate is strongly biased upwards"
            )
    found |= sample.scores
    if reference.energy is None or reference.energy < LEAST_ENERGY:
        why = "do not have" if reference.energy is None else "have none of"
        notes.append(f"high_frequency_ratio: the reference's statistics {why} this energy")
    else:
        found["high_frequency_ratio"] = sample.energy / reference.energy
    if reference.features is None:
        notes.append("precision, recall, kid: the reference has statistics only, no images")
        return found, notes
    found["precision"], found["recall"] = metrics.precision_and_recall(
        reference.features, sample.features
    )
    found["kid"], found["kid_standard_error"] = metrics.kernel_distance(
        reference.features, sample.features
    )
    return found, notes
