"""Distances between sets of features, and scores of one: what is small in float64 on the host, what
is large on the devices."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

NEIGHBOURS = 3  # k of precision and recall, as ADM and all after it have it
TILE = 1024  # rows and columns of the distances that are in memory at a time


def frechet_distance(
    mean: Float[np.ndarray, " d"],
    covariance: Float[np.ndarray, "d d"],
    other_mean: Float[np.ndarray, " d"],
    other_covariance: Float[np.ndarray, "d d"],
) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), the squared Frechet distance of two Gaussians
    (Heusel et al. 2017, eq. 6).

    The trace of the root is the sum of the singular values of C1^(1/2) C2^(1/2), which loses
    nothing when a covariance is singular. float64.
    """
    roots = _root(covariance) @ _root(other_covariance)
    cross = np.linalg.svd(roots, compute_uv=False).sum()
    difference = np.sum((mean - other_mean) ** 2)
    return float(difference + np.trace(covariance) + np.trace(other_covariance) - 2 * cross)


def _root(covariance: np.ndarray) -> np.ndarray:
    """The symmetric root; eigenvalues that are rounding errors are taken for the zeros that they
    stand for."""
    values, vectors = np.linalg.eigh(covariance)
    values = np.where(values > np.finfo(np.float64).eps * len(values) * values[-1], values, 0)
    return (vectors * np.sqrt(values)) @ vectors.T


def kernel_distance(
    features: Float[np.ndarray, "n d"], other: Float[np.ndarray, "m d"], tile: int = TILE
) -> tuple[float, float]:
    """KID: the squared maximum mean discrepancy under the kernel (x y / d + 1)^3, unbiased
    (Binkowski et al. 2018, eq. 4).

    All pairs count, so that it has the smallest variance of what is unbiased, and does not depend
    on the order; the customary mean over random subsets has the same expectation.

    Returns:
      The distance, and its standard error to first order: from how much each feature's own part
        varies. Of two sets of one
      distribution, where the next order decides, it is up to a half too large.

    Raises:
      ValueError: fewer than 4 features.
    """
    if (least := min(len(features), len(other))) < 4:
        raise ValueError(f"{least} features are too few for a kernel distance")
    x, y = _tiles(features, tile), _tiles(other, tile)
    counts = len(features), len(other)
    within = [
        _kernel_sums(tiles, tiles)[:n] / (n - 1) for tiles, n in zip((x, y), counts, strict=True)
    ]
    between = (
        _kernel_sums(x, y)[: counts[0]] / counts[1],
        _kernel_sums(y, x)[: counts[1]] / counts[0],
    )
    parts = [own - others for own, others in zip(within, between, strict=True)]
    variance = sum(4 * part.var(ddof=1) / len(part) for part in parts)
    return float(parts[0].mean() + parts[1].mean()), float(np.sqrt(variance))


def _kernel_sums(
    rows: list[tuple[Array, Array]], columns: list[tuple[Array, Array]]
) -> Float[np.ndarray, " n"]:
    """float64 sums over the columns, for each row; a feature's kernel with itself is left out."""
    sums = []
    for i, (row, _) in enumerate(rows):
        same = [rows is columns and i == j for j in range(len(columns))]
        sums.append(
            [
                _tile_sums(row, column, real, s)
                for (column, real), s in zip(columns, same, strict=True)
            ]
        )
    return np.concatenate(
        [np.sum(np.asarray(jax.device_get(each), np.float64), axis=0) for each in sums]
    )


@jax.jit
def _tile_sums(
    rows: Float[Array, "a d"],
    columns: Float[Array, "b d"],
    real: Bool[Array, " b"],
    same: Bool[Array, ""],
) -> Float[Array, " a"]:
    products = _products(rows, columns) / rows.shape[1]
    itself = same & jnp.eye(*products.shape, dtype=bool)
    return jnp.where(real & ~itself, (products + 1) ** 3, 0).sum(1)


def precision_and_recall(
    reference: Float[np.ndarray, "n d"],
    sample: Float[np.ndarray, "m d"],
    k: int = NEIGHBOURS,
    tile: int = TILE,
) -> tuple[float, float]:
    """The share of samples in the reference's manifold, and of the reference in the samples'
    (Kynkaanniemi et al. 2019, eq. 1-2).

    A set's manifold is the union of balls around its features, each reaching to its k-th nearest
    neighbour in the set. Distances are made in float32, tile by tile: memory grows with the number
    of features, not with its square.

    Raises:
      ValueError: a set has no k neighbours for a feature.
    """
    if min(len(reference), len(sample)) <= k:
        raise ValueError(
            f"{min(len(reference), len(sample))} features are too few for {k} neighbours of each"
        )
    counts = len(reference), len(sample)
    centre = reference.mean(0, dtype=np.float64).astype(
        reference.dtype
    )  # small numbers have small rounding errors
    reference, sample = _tiles(reference - centre, tile), _tiles(sample - centre, tile)
    reach, sample_reach = _radii(reference, k), _radii(sample, k)
    in_reference, in_sample = (
        [jnp.zeros(len(rows), bool) for rows, _ in tiles] for tiles in (sample, reference)
    )
    for i, (rows, real) in enumerate(reference):
        for j, (columns, columns_real) in enumerate(sample):
            of_row, of_column = _covered(
                rows, columns, real, columns_real, reach[i], sample_reach[j]
            )
            in_sample[i] |= of_row
            in_reference[j] |= of_column
    share = lambda found, count: float(np.sum(np.asarray(jax.device_get(found))) / count)  # noqa: E731
    return share(in_reference, counts[1]), share(in_sample, counts[0])


def _tiles(features: np.ndarray, tile: int) -> list[tuple[Array, Array]]:
    """Rows by the tile, the last one filled up, and which of them are real."""
    tiles = []
    for first in range(0, len(features), tile):
        rows = features[first : first + tile]
        real = np.arange(tile) < len(rows)
        tiles.append(
            (jnp.asarray(np.pad(rows, ((0, tile - len(rows)), (0, 0)))), jnp.asarray(real))
        )
    return tiles


def _radii(tiles: list[tuple[Array, Array]], k: int) -> list[Array]:
    """The squared distance of each feature to its k-th nearest neighbour in the set."""
    radii = []
    for i, (rows, _) in enumerate(tiles):
        nearest = jnp.full((len(rows), k), jnp.inf)
        for j, (columns, real) in enumerate(tiles):
            nearest = _nearer(nearest, rows, columns, real, i == j)
        radii.append(nearest[:, -1])
    return radii


def _squared_distances(
    rows: Float[Array, "a d"], columns: Float[Array, "b d"]
) -> Float[Array, "a b"]:
    return jnp.maximum(
        (rows**2).sum(1)[:, None] - 2 * _products(rows, columns) + (columns**2).sum(1), 0
    )


def _products(rows: Float[Array, "a d"], columns: Float[Array, "b d"]) -> Float[Array, "a b"]:
    return jnp.einsum("ad,bd->ab", rows, columns, precision=jax.lax.Precision.HIGHEST)


@jax.jit
def _nearer(
    nearest: Float[Array, "a k"],
    rows: Float[Array, "a d"],
    columns: Float[Array, "b d"],
    real: Bool[Array, " b"],
    same: Bool[Array, ""],
) -> Float[Array, "a k"]:
    """The k smallest of those known and those to `columns`; a feature is no neighbour of itself."""
    distances = jnp.where(real, _squared_distances(rows, columns), jnp.inf)
    itself = same & jnp.eye(len(rows), dtype=bool)
    found = jnp.concatenate([nearest, jnp.where(itself, jnp.inf, distances)], axis=1)
    return -jax.lax.top_k(-found, nearest.shape[1])[0]


@jax.jit
def _covered(
    rows: Float[Array, "a d"],
    columns: Float[Array, "b d"],
    rows_real: Bool[Array, " a"],
    columns_real: Bool[Array, " b"],
    rows_reach: Float[Array, " a"],
    columns_reach: Float[Array, " b"],
) -> tuple[Bool[Array, " a"], Bool[Array, " b"]]:
    """Which rows lie in a ball around a column, and which columns in one around a row."""
    distances = _squared_distances(rows, columns)
    of_row = ((distances <= columns_reach) & columns_real).any(1) & rows_real
    of_column = ((distances <= rows_reach[:, None]) & rows_real[:, None]).any(0) & columns_real
    return of_row, of_column


class InceptionScore:
    """exp of the mean divergence of predictions from their mean, in splits of images in order
    (Salimans et al. 2016; ADM).

    Args:
      classes: of the classifier.
      split: images a split; ADM's is 5,000. The score is the mean over the splits, the last of
        which may be short.
    """

    def __init__(self, classes: int, split: int = 5000):
        self._classes, self._split = classes, split
        # A row a split: how many images, the sum of their predictions, the sum of p log p.
        self._counts, self._sums, self._logs = (
            np.zeros(0, np.int64),
            np.zeros((0, classes)),
            np.zeros(0),
        )

    def add(self, logits: Float[np.ndarray, "b classes"]) -> None:
        """The predictions of the next images, as unnormalised logarithms."""
        logs = logits.astype(np.float64)
        logs = logs - logs.max(1, keepdims=True)
        logs -= np.log(np.exp(logs).sum(1, keepdims=True))
        while len(logs):
            if not len(self._counts) or self._counts[-1] == self._split:
                self._counts, self._logs = np.append(self._counts, 0), np.append(self._logs, 0.0)
                self._sums = np.vstack([self._sums, np.zeros(self._classes)])
            here = logs[: self._split - self._counts[-1]]
            self._counts[-1] += len(here)
            self._sums[-1] += np.exp(here).sum(0)
            self._logs[-1] += (np.exp(here) * here).sum()
            logs = logs[len(here) :]

    def value(self) -> float:
        """The score of all images so far, from 1 to `classes`."""
        means = self._sums / self._counts[:, None]
        of_mean = np.sum(means * np.log(np.where(means > 0, means, 1)), axis=1)  # 0 log 0 = 0
        return float(np.exp(self._logs / self._counts - of_mean).mean())

    def state(self) -> dict[str, np.ndarray]:
        """What has been gathered, as arrays by name."""
        return {"score.counts": self._counts, "score.sums": self._sums, "score.logs": self._logs}

    def set_state(self, arrays: dict[str, np.ndarray]) -> None:
        """Goes on from what `state` gave."""
        self._counts, self._sums, self._logs = (
            arrays[f"score.{name}"].copy() for name in ("counts", "sums", "logs")
        )
