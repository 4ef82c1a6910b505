"""What is kept of a set of images to compare it with others: gathered batch by batch, and
compared."""

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


@dataclass(frozen=True)
class Statistics:
    """A set of images, as a feature space sees it.

    Attributes:
      about: JSON: what the images are.
      count: of images; None where a published file does not say.
      gaussians: mean and covariance of 'features' and, in some spaces, 'spatial'; float64.
      features: float32 (n, d) of some images, randomly chosen; None where a published file has
        none.
      scores: what is measured of the set alone, by name.
    """

    about: dict[str, Any]
    count: int | None
    gaussians: dict[str, tuple[np.ndarray, np.ndarray]] = field(repr=False)
    features: np.ndarray | None = field(repr=False)
    scores: dict[str, float] = field(default_factory=dict)


class StatisticsAccumulator:
    """Statistics of a set of `count` images that are given batch by batch; what it holds can be
    saved, and set again.

    Args:
      name: of the set, for errors.
      space: where the features are from.
      kept: features to keep, of images that are randomly chosen (always the same: a set may be
        sorted).
      shown: numbers of the images to keep for a picture.

    Attributes:
      done: images so far.
      pictures: those of them that are shown, by number.
    """

    def __init__(
        self, name: str, space: FeatureSpace, count: int, *, kept: int, shown: Int[np.ndarray, " s"]
    ):
        self.count, self.done, self._name, self._space = count, 0, name, space
        self._kept = np.sort(np.random.default_rng(0).permutation(count)[:kept])
        self._shown, self.pictures = set(shown.tolist()), {}
        self._features: list[np.ndarray] = []
        self._sums: dict[str, moments.Moments] = {}
        self._score = (
            metrics.InceptionScore(space.sizes["logits"]) if "logits" in space.sizes else None
        )
        self._right = self._labelled = 0

    def add(
        self,
        outputs: dict[str, jax.Array],
        images: UInt8[np.ndarray, "b h w c"],
        labels: Int[np.ndarray, " b"],
    ) -> None:
        """Takes the next images, and what the feature space says of them; rows of `outputs` beyond
        them fill a batch up.

        Raises:
          InputError: a feature is not a finite number.
        """
        here, size = len(images), len(outputs["features"])
        for name, output in outputs.items():
            if not np.isfinite(np.asarray(output)[:here]).all():
                which = f"{name} of images {self.done} to {self.done + here - 1} of {self._name}"
                raise InputError(
                    f"config.evaluation: {which} are not finite; another network or set would do."
                )
        features = np.asarray(outputs["features"])[:here]
        numbers = np.arange(self.done, self.done + here)
        real = sharding.put_batch(
            (np.arange(size) < here).astype(np.float32), sharding.local_mesh()
        )
        for name in ("features", "spatial"):
            if name in outputs:
                if name not in self._sums:
                    shift = np.asarray(outputs[name])[:here].mean(0)
                    self._sums[name] = jax.device_put(
                        moments.start(jnp.asarray(shift)),
                        sharding.replicated(sharding.local_mesh()),
                    )
                self._sums[name] = moments.update(self._sums[name], outputs[name], real)
        self._features.append(features[np.isin(numbers, self._kept)])
        if self._score:
            logits = np.asarray(outputs["logits"])[:here]
            self._score.add(logits)
            if self._space.class_names:
                self._right += int((logits.argmax(1) == labels)[labels >= 0].sum())
                self._labelled += int((labels >= 0).sum())
        self.pictures |= {
            int(n): image for n, image in zip(numbers, images, strict=True) if int(n) in self._shown
        }
        self.done += here

    def statistics(self, about: dict[str, Any]) -> Statistics:
        """Of all images. Raises RuntimeError while some are missing."""
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
            scores["accuracy"] = self._right / self._labelled
        return Statistics(about, self.done, gaussians, np.concatenate(self._features), scores)

    def state(self) -> dict[str, np.ndarray]:
        """All that has been gathered, as arrays by name."""
        numbers = sorted(self.pictures)
        arrays = {
            name: np.array(n)
            for name, n in (
                ("done", self.done),
                ("right", self._right),
                ("labelled", self._labelled),
            )
        }
        arrays |= {
            "features": np.concatenate(self._features),
            "numbers": np.asarray(numbers, np.int64),
        }
        arrays |= {"pictures": np.stack([self.pictures[n] for n in numbers])} if numbers else {}
        arrays |= self._score.state() if self._score else {}
        for name, sums in self._sums.items():
            arrays |= {
                f"{name}.{part}": np.asarray(value) for part, value in sums._asdict().items()
            }
        return arrays

    def set_state(self, arrays: dict[str, np.ndarray]) -> None:
        """Goes on from what `state` gave."""
        self.done, self._right, self._labelled = (
            int(arrays[name]) for name in ("done", "right", "labelled")
        )
        self._features = [arrays["features"]]
        self.pictures = dict(
            zip(arrays["numbers"].tolist(), arrays.get("pictures", []), strict=True)
        )
        if self._score:
            self._score.set_state(arrays)
        whole = sharding.replicated(sharding.local_mesh())
        for name in ("features", "spatial"):
            if f"{name}.shift" in arrays:
                parts = {
                    part: jax.device_put(arrays[f"{name}.{part}"], whole)
                    for part in moments.Moments._fields
                }
                self._sums[name] = moments.Moments(**parts)


def compare(
    reference: Statistics, sample: Statistics, space: FeatureSpace
) -> tuple[dict[str, float], list[str]]:
    """Every metric that can be had of a set of images beside a reference, and what to know of them.

    Raises:
      InputError: a set has too few images.
    """
    counts = [len(s.features) for s in (reference, sample) if s.features is not None] + [
        sample.count
    ]
    if min(counts) <= metrics.NEIGHBOURS:
        would_do = f"more than {metrics.NEIGHBOURS} would do."
        raise InputError(
            f"config.evaluation compares sets of {min(counts)} images, which are too few; {would_do}"
        )
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
            notes.append(
                f"{distance[name]}: {min(small)} images are no more than its {len(gaussian[0])} features; far too large"
            )
    found |= sample.scores
    if reference.features is None:
        return found, [
            *notes,
            "precision, recall, kid: the reference has statistics alone, and no images",
        ]
    found["precision"], found["recall"] = metrics.precision_and_recall(
        reference.features, sample.features
    )
    found["kid"], found["kid_standard_error"] = metrics.kernel_distance(
        reference.features, sample.features
    )
    return found, notes
