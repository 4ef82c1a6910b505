"""Evaluation beside NumPy, SciPy and scikit-learn, and the speed of Inception-v3, as tables.

    python -m experiments.benchmarks.evaluation --features 50000 --size 2048 --neighbours 10000

Features are synthetic; errors are in their standard deviations, relative to NumPy's float64. Every
row is measured in a process of its own, whose memory is the peak resident size above that of
imports: it includes JAX's start and compilation, and not what a GPU or TPU holds. Times include
neither making the features nor compilation: everything has run once before. scikit-learn is in
requirements-dev.txt.
"""

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
import sklearn.metrics
import sklearn.neighbors
from absl import flags, logging
from jaxtyping import Float

from rdm_jax.cli.command import command
from rdm_jax.data.sources import cores
from rdm_jax.evaluation import inception, metrics, moments

_FEATURES = flags.DEFINE_integer(
    "features", 50000, "Features for mean and covariance; use more than --size.", 2
)
_SIZE = flags.DEFINE_integer("size", 2048, "Dimensions of a feature.", 2)
_NEIGHBOURS = flags.DEFINE_integer(
    "neighbours", 10000, "Features of each set for precision and recall.", metrics.NEIGHBOURS + 1
)
_BATCH = flags.DEFINE_integer("batch", 500, "Features at a time.", 1)
_IMAGES = flags.DEFINE_integer(
    "inception_images", 64, "Images through the network; at least one batch.", 1
)
_ROW = flags.DEFINE_string(
    "row", "", "The row that this process measures; '' for all, each in another process."
)

REFERENCE, SAMPLE = 1, 2  # seeds
FACTORS = 64  # shared by the features
IMAGE = 256  # height and width
IMPORTED = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def gaussian(
    seed: int,
) -> tuple[Float[np.ndarray, " d"], Float[np.ndarray, "f d"], Float[np.ndarray, " d"]]:
    """Mean, factors and spread; the covariance is factors^T factors + diag(spread^2).

    The Gaussians of two seeds are similar.
    """
    shared, own = np.random.default_rng(0), np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        return np.float32(shared.standard_normal(shape) + 0.1 * own.standard_normal(shape))

    spread = np.exp(draw(_SIZE.value) / 2) / 5
    return (
        spread * (1.4 + 0.4 * draw(_SIZE.value)),
        spread * draw(FACTORS, _SIZE.value) / FACTORS**0.5,
        spread,
    )


def batches(seed: int, count: int) -> Iterator[Float[np.ndarray, "b d"]]:
    """Full batches of float32 features, together at least `count`."""
    mean, factors, spread = gaussian(seed)
    random = np.random.default_rng(seed)
    for _ in range(0, count, _BATCH.value):
        common, alone = (
            random.standard_normal((_BATCH.value, size), np.float32) for size in factors.shape
        )
        yield mean + common @ factors + alone * spread


def features(seed: int, count: int, dtype: type) -> Float[np.ndarray, "n d"]:
    """`count` features in one array."""
    return np.fromiter(
        (row for batch in batches(seed, count) for row in batch),
        np.dtype((dtype, _SIZE.value)),
        count,
    )


def timed(function: Callable, *arguments) -> tuple:
    """A call's result, and its seconds."""
    began = time.perf_counter()
    result = jax.block_until_ready(function(*arguments))
    return result, time.perf_counter() - began


def peak() -> dict[str, str]:
    """The peak resident memory since imports."""
    more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - IMPORTED
    return {"peak memory, MiB": f"{more / (2**20 if sys.platform == 'darwin' else 2**10):,.0f}"}


def numpy_moments() -> tuple[tuple[np.ndarray, np.ndarray], float]:
    """Mean and covariance of all features in one float64 array, and seconds."""
    everything = features(SAMPLE, _FEATURES.value, np.float64)
    return timed(lambda: (everything.mean(0), np.cov(everything, rowvar=False)))


def project_moments() -> tuple[tuple[np.ndarray, np.ndarray], float]:
    """Mean and covariance as this project gathers them, and seconds."""

    def add(sums, x, is_real):
        return moments.update(sums or moments.start(x.mean(0)), x, is_real)

    zeros = jnp.zeros((_BATCH.value, _SIZE.value))
    timed(add, None, zeros, zeros[:, 0])
    sums, total = None, 0.0
    for number, batch in enumerate(batches(SAMPLE, _FEATURES.value)):
        real = np.arange(len(batch)) < _FEATURES.value - number * len(batch)
        sums, seconds = timed(
            add, sums, *jax.block_until_ready((jnp.asarray(batch), jnp.float32(real)))
        )
        total += seconds
    found, seconds = timed(moments.mean_and_covariance, moments.exact(sums), _FEATURES.value)
    return found, total + seconds


def scipy_distance(
    mean: np.ndarray, covariance: np.ndarray, other_mean: np.ndarray, other_covariance: np.ndarray
) -> float:
    """`metrics.frechet_distance` by the root of the product, the usual way."""
    cross = np.trace(scipy.linalg.sqrtm(covariance @ other_covariance).real)
    return (
        np.sum((mean - other_mean) ** 2)
        + np.trace(covariance)
        + np.trace(other_covariance)
        - 2 * cross
    )


def statistics(gather: Callable, distance: Callable) -> dict[str, str]:
    """A row of one way to compute the Frechet distance."""
    (mean, covariance), seconds = gather()
    reference, factors, spread = (part.astype(np.float64) for part in gaussian(REFERENCE))
    distance(*(np.zeros(256), np.eye(256)) * 2)  # starts the threads
    value, more = timed(
        distance, reference, factors.T @ factors + np.diag(spread**2), mean, covariance
    )
    cells = {"mean and covariance, s": f"{seconds:.2f}", "distance, s": f"{more:.2f}"}
    cells |= {**peak(), "Frechet distance": f"{value:.9f}"}
    if gather is not numpy_moments:
        (exact_mean, exact), _ = numpy_moments()
        scale = np.sqrt(np.diag(exact))
        cells["error of the mean"] = f"{np.max(np.abs(mean - exact_mean) / scale):.0e}"
        cells["error of the covariance"] = (
            f"{np.max(np.abs(covariance - exact) / np.outer(scale, scale)):.0e}"
        )
    return cells


def scikit_scores(
    reference: Float[np.ndarray, "n d"], sample: Float[np.ndarray, "m d"]
) -> tuple[float, float]:
    """`metrics.precision_and_recall`; scikit-learn limits the memory of distances itself."""
    nearest = sklearn.neighbors.NearestNeighbors(n_neighbors=metrics.NEIGHBOURS, algorithm="brute")
    reach, sample_reach = (nearest.fit(x).kneighbors()[0][:, -1:] for x in (reference, sample))
    in_reference, in_sample = [], np.zeros(len(reference), bool)
    for distances in sklearn.metrics.pairwise_distances_chunked(sample, reference):
        in_sample |= (distances <= sample_reach[len(in_reference) :][: len(distances)]).any(0)
        in_reference.extend((distances <= reach.T).any(1))
    return np.mean(in_reference), np.mean(in_sample)


def neighbours(score: Callable) -> dict[str, str]:
    """A row of one way to compute precision and recall."""
    sets = [features(seed, _NEIGHBOURS.value, np.float32) for seed in (REFERENCE, SAMPLE)]
    score(*(rows[: metrics.NEIGHBOURS + 1] for rows in sets))  # compiles for a full tile
    (precision, recall), seconds = timed(score, *sets)
    return {
        "precision and recall, s": f"{seconds:.2f}",
        **peak(),
        "precision": f"{precision:.4f}",
        "recall": f"{recall:.4f}",
    }


def network(size: int) -> dict[str, str]:
    """A row of Inception-v3 in batches of a size."""
    random, calls = np.random.default_rng(0), max(1, _IMAGES.value // size)

    def kernel(*shape: int) -> jax.Array:
        return jnp.float32(random.normal(0, np.sqrt(2 / np.prod(shape[:-1])), shape))

    def layer(shape: tuple[int, ...]) -> dict[str, jax.Array]:
        scale, shift = jnp.ones(shape[-1]), jnp.zeros(shape[-1])
        return {"kernel": kernel(*shape), "scale": scale, "shift": shift}

    params = {name: layer(shape) for name, shape in inception.LAYERS.items()}
    params["fc"] = {"kernel": kernel(inception.SIZES["pool"], inception.SIZES["logits"])}
    images = jnp.asarray(random.integers(0, 256, (size, IMAGE, IMAGE, 3), np.uint8))
    apply, compiling = timed(lambda: jax.jit(inception.apply).lower(params, images).compile())
    seconds = sum([timed(apply, params, images)[1] for _ in range(1 + calls)][1:])
    return {"compiling, s": f"{compiling:.1f}", "images/s": f"{calls * size / seconds:.1f}"}


VERSIONS = {"python": sys.version.split()[0]} | {
    package.__name__: package.__version__ for package in (jax, np, scipy, sklearn)
}
ROWS = {
    "machine": lambda: {"device": jax.devices()[0].device_kind, "cores": f"{cores()}", **VERSIONS},
    "this project's moments": lambda: statistics(project_moments, metrics.frechet_distance),
    "NumPy's and SciPy's": lambda: statistics(numpy_moments, scipy_distance),
    "this project's neighbours": lambda: neighbours(metrics.precision_and_recall),
    "scikit-learn's": lambda: neighbours(scikit_scores),
    "batches of 16": lambda: network(16),
    "batches of 32": lambda: network(32),
}


def table(title: str, *names: str) -> list[dict[str, str]]:
    """Prints and returns rows by their names.

    A child process's peak memory starts at that of this one, so nothing large is made here.
    """
    rows = []
    for name in names:
        command = [
            sys.executable,
            "-m",
            "experiments.benchmarks.evaluation",
            *sys.argv[1:],
            f"--row={name}",
        ]
        rows.append(
            json.loads(
                subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1]
            )
        )
        if len(rows) == 1:
            print(f"{title}\n\n| | " + " | ".join(rows[0]) + " |\n|" + "---|" * (1 + len(rows[0])))
        print(
            "| " + " | ".join([name, *(rows[-1].get(head, "-") for head in rows[0])]) + " |",
            flush=True,
        )
    return rows


def main() -> None:
    """Prints the tables, or measures a row."""
    logging.set_verbosity(logging.WARNING)
    if _ROW.value:
        print(json.dumps(ROWS[_ROW.value]()))
        return
    size, count = f"{_SIZE.value:,}", f"{_NEIGHBOURS.value:,}"
    table("Peak memory is above that of imports. Times do not include compilation.", "machine")
    rows = table(
        f"\n{_FEATURES.value:,} features of {size}", "this project's moments", "NumPy's and SciPy's"
    )
    own, usual = (float(row["Frechet distance"]) for row in rows)
    difference = f"{abs(own / usual - 1):.0e}"
    print(f"\nRelative difference of the distances: {difference}. Errors: in standard deviations.")
    title = f"\n{count} and {count} features of {size}, {metrics.NEIGHBOURS} neighbours"
    table(title, "this project's neighbours", "scikit-learn's")
    title = f"\nInception-v3, from {IMAGE} x {IMAGE} pixels, with random parameters"
    table(title, "batches of 16", "batches of 32")


if __name__ == "__main__":
    command(main)
