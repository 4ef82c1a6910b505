"""Distances between sets of features, and scores of one set.

Small arrays are computed in float64 on the host, large ones on the devices.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

NEIGHBOURS = 3  # k of precision and recall, as in ADM
TILE = 1024  # rows and columns of the distance matrix that are in memory at a time


def frechet_distance(
    mean: Float[np.ndarray, " d"],
    covariance: Float[np.ndarray, "d d"],
    other_mean: Float[np.ndarray, " d"],
    other_covariance: Float[np.ndarray, "d d"],
) -> float:
    """The squared Frechet distance of two Gaussians (Heusel et al. 2017, eq. 6), in float64.

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)). The trace of the root is the sum of the singular
    values of C1^(1/2) C2^(1/2), which stays exact for singular covariances.
    """
    roots = _root(covariance) @ _root(other_covariance)
    cross = np.linalg.svd(roots, compute_uv=False).sum()
    difference = np.sum((mean - other_mean) ** 2)
    return float(difference + np.trace(covariance) + np.trace(other_covariance) - 2 * cross)


def _root(covariance: np.ndarray) -> np.ndarray:
    """The symmetric square root; eigenvalues at the level of rounding errors count as zeros."""
    values, vectors = np.linalg.eigh(covariance)
    values = np.where(values > np.finfo(np.float64).eps * len(values) * values[-1], values, 0)
    return (vectors * np.sqrt(values)) @ vectors.T


def kernel_distance(
    features: Float[np.ndarray, "n d"], other: Float[np.ndarray, "m d"], tile: int = TILE
) -> tuple[float, float]:
    """KID: the squared maximum mean discrepancy, unbiased (Binkowski et al. 2018, eq. 4).

    The kernel is (x y / d + 1)^3. All pairs count, which has the smallest variance of all unbiased
    estimates and does not depend on the order; the usual mean over random subsets has the same
    expectation.

    Args:
      features, other: the sets, each 4 features or more.
      tile: rows and columns of the kernel matrix in memory at a time.

    Returns:
      The distance and its standard error to first order, from the spread of each feature's own
      contribution. For two sets of one distribution, where the next order decides, the error is up
      to a half too large.

    Raises:
      ValueError: fewer than 4 features.
    """
    if (least := min(len(features), len(other))) < 4:
        raise ValueError(f"{least} features are too few for a kernel distance")
    x, y = _tiles(features, tile), _tiles(other, tile)
    n, m = len(features), len(other)
    parts = [
        _kernel_sums(x, x)[:n] / (n - 1) - _kernel_sums(x, y)[:n] / m,
        _kernel_sums(y, y)[:m] / (m - 1) - _kernel_sums(y, x)[:m] / n,
    ]
    variance = sum(4 * part.var(ddof=1) / len(part) for part in parts)
    return float(parts[0].mean() + parts[1].mean()), float(np.sqrt(variance))


def _kernel_sums(
    rows: list[tuple[Array, Array]], columns: list[tuple[Array, Array]]
) -> Float[np.ndarray, " n"]:
    """float64 sums over the columns for each row, without a feature's kernel with itself."""
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
    """Improved precision and recall (Kynkaanniemi et al. 2019, eq. 1-2).

    Precision is the share of samples in the reference's manifold, recall the share of the reference
    in the samples' manifold. A set's manifold is the union of balls around its features, each with
    the distance to its k-th nearest neighbour in the set as radius. Distances are computed in
    float32, tile by tile: memory grows with the number of features, not with its square.

    Args:
      reference, sample: float32 features.
      k: the neighbour that defines a radius.
      tile: rows and columns of the distance matrix in memory at a time.

    Raises:
      ValueError: a set has no more than k features.
    """
    if min(len(reference), len(sample)) <= k:
        raise ValueError(
            f"{min(len(reference), len(sample))} features are too few for {k} neighbours of each"
        )
    counts = len(reference), len(sample)
    # Centred, as small numbers have small rounding errors.
    centre = reference.mean(0, dtype=np.float64).astype(reference.dtype)
    reference, sample = _tiles(reference - centre, tile), _tiles(sample - centre, tile)
    reach, sample_reach = _radii(reference, k), _radii(sample, k)
    in_reference = [jnp.zeros(len(rows), bool) for rows, _ in sample]
    in_sample = [jnp.zeros(len(rows), bool) for rows, _ in reference]
    for i, (rows, real) in enumerate(reference):
        for j, (columns, columns_real) in enumerate(sample):
            of_row, of_column = _covered(
                rows, columns, real, columns_real, reach[i], sample_reach[j]
            )
            in_sample[i] |= of_row
            in_reference[j] |= of_column
    return _share(in_reference, counts[1]), _share(in_sample, counts[0])


def _share(found: list[Bool[Array, " tile"]], count: int) -> float:
    return float(np.sum(np.asarray(jax.device_get(found))) / count)


def _tiles(features: np.ndarray, tile: int) -> list[tuple[Array, Array]]:
    """Tiles of rows, the last one padded, and which rows are real."""
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
    """The k smallest distances so far; a feature is not its own neighbour."""
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
    """Which rows are in a ball around a column, and which columns in a ball around a row."""
    distances = _squared_distances(rows, columns)
    of_row = ((distances <= columns_reach) & columns_real).any(1) & rows_real
    of_column = ((distances <= rows_reach[:, None]) & rows_real[:, None]).any(0) & columns_real
    return of_row, of_column


class InceptionScore:
    """The inception score (Salimans et al. 2016): exp of the mean divergence of predictions.

    The divergence is that from the mean prediction of a split of images in order, as in ADM.

    Args:
      classes: of the classifier.
      count: number of images.
      split: images per split, 5,000 in ADM. The score is the mean over the splits, the last of
        which may be short.
    """

    def __init__(self, classes: int, count: int, split: int = 5000):
        self._split, splits = split, -(-count // split)
        self._counts = np.zeros(splits)  # images
        self._sums = np.zeros((splits, classes))  # of predictions p
        self._logs = np.zeros(splits)  # of p log p

    def add(self, first: int, logits: Float[np.ndarray, "b classes"]) -> None:
        """Adds the logits of images `first`, `first` + 1, ..."""
        logs = logits.astype(np.float64)
        logs = logs - logs.max(1, keepdims=True)
        logs -= np.log(np.exp(logs).sum(1, keepdims=True))
        while len(logs):
            number, before = divmod(first, self._split)
            here = logs[: self._split - before]
            self._counts[number] += len(here)
            self._sums[number] += np.exp(here).sum(0)
            self._logs[number] += (np.exp(here) * here).sum()
            logs, first = logs[len(here) :], first + len(here)

    def value(self) -> float:
        """The score of all images, from 1 to `classes`."""
        means = self._sums / self._counts[:, None]
        of_mean = np.sum(means * np.log(np.where(means > 0, means, 1)), axis=1)  # 0 log 0 = 0
        return float(np.exp(self._logs / self._counts - of_mean).mean())

    def state(self) -> dict[str, np.ndarray]:
        """The sums over images, as arrays by name; those of several sets add up."""
        return {"score.counts": self._counts, "score.sums": self._sums, "score.logs": self._logs}

    def set_state(self, arrays: dict[str, np.ndarray]) -> None:
        """Continues from sums that `state` returned."""
        self._counts, self._sums, self._logs = (
            arrays[f"score.{name}"].copy() for name in ("counts", "sums", "logs")
        )
