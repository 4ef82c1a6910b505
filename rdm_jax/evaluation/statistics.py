"""Statistics of sets of images: accumulated batch by batch, and compared."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, UInt8

from rdm_jax.evaluation import metrics, moments
from rdm_jax.evaluation.features import FeatureSpace
from rdm_jax.runtime import distributed, sharding
from rdm_jax.runtime.errors import InputError

GAUSSIAN = ("features", "spatial")  # the outputs whose mean and covariance count
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

    Each process has its own, with its share of the images, until `combine`. The state can be saved
    and restored.

    Args:
      name: of the set, for errors.
      space: of the features.
      count: number of images.
      kept: number of features to keep, of randomly chosen images (a set may be sorted); the choice
        is always the same.
      shown: indices of the images to keep for a picture.

    Attributes:
      kept: indices of the images whose features are kept.
      done: number of images added so far.
      pictures: the images to show so far, by index.
    """

    def __init__(
        self, name: str, space: FeatureSpace, count: int, *, kept: int, shown: Int[np.ndarray, " s"]
    ):
        self.count, self.done = count, 0
        self._name, self._space = name, space
        self.kept = kept_indices(count, kept)
        self._shown, self.pictures = set(shown.tolist()), {}
        self._features: dict[int, np.ndarray] = {}  # by the index of the image
        self._sums: dict[str, moments.Moments] = {}
        self._combined: dict[str, moments.Sums] = {}  # over all processes
        has_logits = "logits" in space.sizes
        self._score = metrics.InceptionScore(space.sizes["logits"], count) if has_logits else None
        self._correct, self._labelled = 0, 0
        self._energy = 0.0  # summed over images

    def add(
        self,
        first: int,
        outputs: dict[str, jax.Array],
        images: UInt8[np.ndarray, "b h w c"],
        labels: Int[np.ndarray, " b"],
    ) -> None:
        """Adds images, none of them twice.

        Args:
          first: index of the first of them; the others follow.
          outputs: of the feature space, (b2, size) by name, and `ENERGY`, (b2,); rows beyond the
            images are padding.
          images: (b, h, w, c).
          labels: (b,), -1 for none.

        Raises:
          InputError: a feature is not finite.
        """
        count = len(images)
        self._check_finite(first, outputs, count)
        self._add_moments(outputs, count)
        numbers = np.arange(first, first + count)
        features = np.asarray(outputs["features"])[:count]
        for place in np.flatnonzero(np.isin(numbers, self.kept)).tolist():
            self._features[first + place] = features[place]
        self._energy += float(np.asarray(outputs[ENERGY], np.float64)[:count].sum())
        if self._score:
            logits = np.asarray(outputs["logits"])[:count]
            self._score.add(first, logits)
            if self._space.class_names:
                self._correct += int((logits.argmax(1) == labels)[labels >= 0].sum())
                self._labelled += int((labels >= 0).sum())
        for number, image in zip(numbers.tolist(), images, strict=True):
            if number in self._shown:
                self.pictures[number] = image
        self.done += count

    def _check_finite(self, first: int, outputs: dict[str, jax.Array], count: int) -> None:
        for name, output in outputs.items():
            if not np.isfinite(np.asarray(output)[:count]).all():
                raise InputError(
                    f"config.evaluation: {name} of images {first} to {first + count - 1} of "
                    f"{self._name} are not finite",
                    "Use other weights or another set.",
                )

    def _add_moments(self, outputs: dict[str, jax.Array], count: int) -> None:
        mesh = sharding.local_mesh()
        real = (np.arange(len(outputs["features"])) < count).astype(np.float32)
        real = sharding.put_batch(real, mesh)
        for name in self._gaussian_outputs():
            if name not in self._sums:
                shift = jnp.asarray(np.asarray(outputs[name])[:count].mean(0))
                self._sums[name] = _on_devices(moments.start(shift))
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
        found = self._combined or {name: moments.exact(sums) for name, sums in self._sums.items()}
        gaussians = {
            name: moments.mean_and_covariance(sums, self.done) for name, sums in found.items()
        }
        scores = {}
        if self._score:
            name = "inception_score" if self._space.name == "inception" else "classifier_score"
            scores[name] = self._score.value()
        if self._labelled:
            scores["accuracy"] = self._correct / self._labelled
        features = np.stack([self._features[number] for number in self.kept.tolist()])
        return Statistics(about, self.done, gaussians, features, scores, self._energy / self.done)

    def combine(self) -> None:
        """Adds up what all processes have, so that each has the statistics of the whole set.

        All processes must call it together, once.
        """
        if jax.process_count() == 1:
            return
        arrays = self._counts() | (self._score.state() if self._score else {})
        arrays["features"] = _rows(self._features, self.kept, self._space.sizes["features"])
        shape = distributed.allgather(self._image_shape()).max(0)
        arrays["pictures"] = _rows(self.pictures, sorted(self._shown), *shape, dtype=np.uint8)
        found = distributed.add_up(arrays | self._sums_about_one_shift())
        self._set_counts(found)
        if self._score:
            self._score.set_state(found)
        self._features = dict(zip(self.kept.tolist(), found["features"], strict=True))
        self.pictures = dict(zip(sorted(self._shown), found["pictures"], strict=True))
        self._combined = {
            name: moments.Sums(*(found[f"{name}.{part}"] for part in moments.Sums._fields))
            for name in self._gaussian_outputs()
        }

    def _sums_about_one_shift(self) -> dict[str, np.ndarray]:
        """The sums of this process about process 0's shift, which process 0 alone has in them."""
        arrays = {}
        for name in self._gaussian_outputs():
            size = self._space.sizes[name]
            sums = moments.Sums(np.zeros(size), np.zeros(size), np.zeros((size, size)))
            if name in self._sums:
                sums = moments.exact(self._sums[name])
            mine = sums.shift if distributed.is_primary() else np.zeros(size)
            (shift,) = distributed.add_up({name: mine}).values()
            shifted = moments.about(sums, self.done, shift)._replace(shift=mine)
            arrays |= {f"{name}.{part}": value for part, value in shifted._asdict().items()}
        return arrays

    def _gaussian_outputs(self) -> list[str]:
        return [name for name in GAUSSIAN if name in self._space.sizes]

    def _image_shape(self) -> np.ndarray:
        """The shape of the pictures; zeros if there are none yet."""
        return np.asarray(next((p.shape for p in self.pictures.values()), (0, 0, 0)), np.int32)

    def _counts(self) -> dict[str, np.ndarray]:
        counts = {"done": self.done, "right": self._correct, "labelled": self._labelled}
        return {n: np.array(v, np.float64) for n, v in (counts | {"energy": self._energy}).items()}

    def _set_counts(self, arrays: dict[str, np.ndarray]) -> None:
        self.done, self._correct = int(arrays["done"]), int(arrays["right"])
        self._labelled, self._energy = int(arrays["labelled"]), float(arrays["energy"])

    def state(self) -> dict[str, np.ndarray]:
        """The state, as arrays by name."""
        arrays = self._counts()
        for name, rows in (("features", self._features), ("pictures", self.pictures)):
            arrays[f"{name}.numbers"] = np.asarray(sorted(rows), np.int64)
            if rows:
                arrays[name] = np.stack([rows[number] for number in sorted(rows)])
        if self._score:
            arrays |= self._score.state()
        for name, sums in self._sums.items():
            for part, value in sums._asdict().items():
                arrays[f"{name}.{part}"] = np.asarray(value)
        return arrays

    def set_state(self, arrays: dict[str, np.ndarray]) -> None:
        """Continues from a state that `state` returned."""
        self._set_counts(arrays)
        self._features, self.pictures = (
            dict(zip(arrays[f"{name}.numbers"].tolist(), arrays.get(name, []), strict=True))
            for name in ("features", "pictures")
        )
        if self._score:
            self._score.set_state(arrays)
        for name in GAUSSIAN:
            if f"{name}.shift" in arrays:
                parts = {part: arrays[f"{name}.{part}"] for part in moments.Moments._fields}
                self._sums[name] = _on_devices(moments.Moments(**parts))

    def add_state(self, arrays: dict[str, np.ndarray]) -> None:
        """Adds what another accumulator has of other images of the set."""
        if not self.done:
            return self.set_state(arrays)
        other = StatisticsAccumulator(
            self._name, self._space, self.count, kept=len(self.kept), shown=np.arange(0)
        )
        other.set_state(arrays)
        for name, sums in other._sums.items():
            theirs, ours = moments.exact(sums), moments.exact(self._sums[name])
            moved = moments.about(theirs, other.done, ours.shift)
            both = moments.Sums(ours.shift, ours.total + moved.total, ours.outer + moved.outer)
            self._sums[name] = _on_devices(moments.rounded(both))
        if self._score:
            before = self._score.state()
            self._score.set_state({name: before[name] + arrays[name] for name in before})
        self._features |= other._features
        self.pictures |= other.pictures
        before = self._counts()
        self._set_counts({name: np.asarray(before[name] + arrays[name]) for name in before})


def _rows(
    rows: dict[int, np.ndarray], numbers: Sequence[int], *shape: int, dtype: Any = np.float32
) -> np.ndarray:
    """The rows of these numbers one after the other; zeros for those that are missing."""
    found = np.zeros((len(numbers), *shape), dtype)
    for place, number in enumerate(numbers):
        if number in rows:
            found[place] = rows[number]
    return found


def _on_devices(sums: moments.Moments) -> moments.Moments:
    return jax.device_put(sums, sharding.replicated(sharding.local_mesh()))


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
