"""The metrics against closed forms, brute force and simulation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rdm_jax.evaluation import metrics, moments
from rdm_jax.runtime import sharding
from tests.support.precision import enable_x64


def features(seed: int, count: int, size: int, mean: float = 0.0) -> np.ndarray:
    """Correlated, of very different sizes, about `mean`; of one distribution for all seeds."""
    random = np.random.default_rng(size)
    mixing = random.standard_normal((size, size)) * np.exp(random.standard_normal(size))
    random = np.random.default_rng(seed)
    return (mean + random.standard_normal((count, size)) @ mixing).astype(np.float32)


def one_pass(values: np.ndarray, batch: int, devices: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance by `moments`, in batches that are cut over devices."""
    mesh = sharding.make_mesh(devices=jax.devices()[:devices])
    gathered = None
    for first in range(0, len(values), batch):
        here = values[first : first + batch]
        real = (np.arange(batch) < len(here)).astype(values.dtype)
        filled = np.resize(here, (batch, values.shape[1]))
        filled, real = sharding.put_batch((filled, real), mesh)
        gathered = gathered or moments.start(jnp.asarray(here.mean(0)))
        # XLA's virtual devices can wait for each other for ever once 32 programs are on their way.
        gathered = jax.block_until_ready(moments.update(gathered, filled, real))
    return moments.mean_and_covariance(moments.exact(gathered), len(values))


def exact(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    values = values.astype(np.float64)
    return values.mean(0), np.cov(values, rowvar=False)


@pytest.mark.parametrize("mean", [0.0, 100.0])
def test_moments_in_float32_match_float64(mean):
    values = features(0, 20_000, 32, mean)
    (ours, ours_covariance), (theirs, covariance) = one_pass(values, 256), exact(values)
    spread = np.sqrt(np.diag(covariance))
    assert np.abs((ours - theirs) / spread).max() < 1e-6
    assert np.abs((ours_covariance - covariance) / np.outer(spread, spread)).max() < 1e-6


def test_moments_do_not_depend_on_order_batch_or_devices():
    values = features(1, 1000, 16, 3.0)
    reference = exact(features(2, 1000, 16, 3.0))
    wanted = metrics.frechet_distance(*reference, *exact(values))
    shuffled = np.random.default_rng(0).permutation(values)
    for some, batch, devices in (
        (values, 64, 8),
        (shuffled, 64, 8),
        (values, 8, 8),
        (values, 104, 8),
        (values, 64, 1),
    ):
        found = metrics.frechet_distance(*reference, *one_pass(some, batch, devices))
        assert abs(found / wanted - 1) < 1e-6, (batch, devices)


def test_moments_of_fewer_features_than_dimensions():
    """What float32 leaves in the directions that have no spread is no spread."""
    values, reference = features(1, 30, 64), exact(features(2, 5000, 64))
    wanted = metrics.frechet_distance(*reference, *exact(values))
    for some, batch in ((values, 8), (values[::-1], 16)):
        found = metrics.frechet_distance(*reference, *one_pass(some, batch))
        assert abs(found / wanted - 1) < 1e-6, batch


def test_moments_of_float64_are_exact():
    with enable_x64(True):
        values = features(0, 500, 8, 10.0).astype(np.float64)
        for ours, theirs in zip(one_pass(values, 64), exact(values), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12 * np.abs(theirs).max())


def test_frechet_distance_of_a_set_with_itself_is_zero():
    for count in (100, 10):  # with fewer features than dimensions the covariance is singular
        gaussian = exact(features(0, count, 20))
        assert abs(metrics.frechet_distance(*gaussian, *gaussian)) < 1e-9 * np.trace(gaussian[1])


def test_frechet_distance_of_gaussians_is_its_closed_form():
    """Diagonal covariances commute: the trace is sum (s1 - s2)^2; a common rotation changes
    nothing."""
    random = np.random.default_rng(0)
    first, second, m1, m2 = random.random((4, 12))
    turn = np.linalg.qr(random.standard_normal((12, 12)))[0]

    def rotated(s):
        return turn @ np.diag(s**2) @ turn.T

    found = metrics.frechet_distance(turn @ m1, rotated(first), turn @ m2, rotated(second))
    np.testing.assert_allclose(
        found, np.sum((m1 - m2) ** 2) + np.sum((first - second) ** 2), rtol=1e-12
    )


def test_frechet_distance_of_covariances_that_do_not_commute():
    """tr (C1 C2)^(1/2) is the sum of the square roots of the eigenvalues of C1 C2."""
    (m1, c1), (m2, c2) = exact(features(3, 300, 6)), exact(features(4, 300, 6)[:, ::-1])
    root = np.sqrt(np.linalg.eigvals(c1 @ c2).real).sum()
    wanted = np.sum((m1 - m2) ** 2) + np.trace(c1) + np.trace(c2) - 2 * root
    np.testing.assert_allclose(metrics.frechet_distance(m1, c1, m2, c2), wanted, rtol=1e-10)


def simulated_kernel_distances(shift: float) -> np.ndarray:
    random = np.random.default_rng(0)

    def draw():
        return random.standard_normal((60, 4)).astype(np.float32) + 0.5

    return np.array(
        [metrics.kernel_distance(draw(), draw() + np.float32(shift), tile=64) for _ in range(400)]
    )


def test_kernel_distance_is_unbiased():
    """Of two sets of one distribution the mean is 0, and the standard error on the safe side."""
    found = simulated_kernel_distances(0.0)
    spread = found[:, 0].std()
    assert abs(found[:, 0].mean()) < 4 * spread / np.sqrt(len(found))
    assert 1 < np.sqrt(np.mean(found[:, 1] ** 2)) / spread < 1.6


def test_kernel_distance_standard_error():
    """Of two different distributions, it is how much the estimates vary; and the mean is what many
    features tell at once."""
    found = simulated_kernel_distances(0.7)
    spread = found[:, 0].std()
    np.testing.assert_allclose(np.sqrt(np.mean(found[:, 1] ** 2)), spread, rtol=0.15)
    random = np.random.default_rng(1)
    x, y = (
        random.standard_normal((3000, 4)).astype(np.float32) + np.float32(shift)
        for shift in (0.5, 1.2)
    )
    exact, error = metrics.kernel_distance(x, y)
    assert abs(found[:, 0].mean() - exact) < 4 * np.hypot(error, spread / np.sqrt(len(found)))
    assert exact > 2 * spread


@pytest.mark.parametrize("tile", [4, 16, 1000])
def test_kernel_distance_matches_its_definition(tile):
    x, y = features(0, 10, 3), features(1, 13, 3)

    def k(a, b):
        return (np.float64(a) @ b / 3 + 1) ** 3

    within = [
        np.mean([k(p, q) for i, p in enumerate(s) for j, q in enumerate(s) if i != j])
        for s in (x, y)
    ]
    wanted = sum(within) - 2 * np.mean([k(p, q) for p in x for q in y])
    found, _ = metrics.kernel_distance(x, y, tile)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    np.testing.assert_allclose(
        metrics.kernel_distance(x[::-1], y[::-1], tile)[0], wanted, rtol=1e-5
    )


def brute_force(reference: np.ndarray, sample: np.ndarray, k: int) -> tuple[float, float]:
    def distances(a, b):
        return np.linalg.norm(a[:, None].astype(np.float64) - b, axis=-1)

    def reach(a):
        return np.sort(distances(a, a), axis=1)[:, k]

    between = distances(reference, sample)
    precision = (between <= reach(reference)[:, None]).any(0).mean()
    recall = (between <= reach(sample)).any(1).mean()
    return float(precision), float(recall)


@pytest.mark.parametrize("counts", [(100, 60), (64, 64), (33, 130)])
@pytest.mark.parametrize("tile", [16, 64, 1000])
def test_precision_and_recall_match_brute_force(counts, tile):
    reference, sample = features(0, counts[0], 5) + 20, features(1, counts[1], 5) * 1.1 + 20.2
    found = metrics.precision_and_recall(reference, sample, tile=tile)
    np.testing.assert_allclose(found, brute_force(reference, sample, 3), atol=1e-12)
    assert 0.1 < found[0] < 1 and 0.1 < found[1] < 1


def test_precision_and_recall_of_known_overlap():
    """Two clusters far apart: samples from one of them, and from one and elsewhere."""
    random = np.random.default_rng(0)

    def cluster(centre, count):
        return (random.random((count, 2)) + centre).astype(np.float32)

    reference = np.concatenate([cluster(0, 50), cluster(100, 50)])
    assert metrics.precision_and_recall(reference, reference) == (1.0, 1.0)
    assert metrics.precision_and_recall(reference, reference + 1000) == (0.0, 0.0)
    one = metrics.precision_and_recall(reference, reference[:50])
    assert one == (1.0, 0.5)
    elsewhere = metrics.precision_and_recall(
        reference, np.concatenate([reference[:50], cluster(500, 25)])
    )
    np.testing.assert_allclose(elsewhere, (50 / 75, 0.5))


def test_metrics_refuse_too_few_features():
    for metric in (metrics.precision_and_recall, metrics.kernel_distance):
        with pytest.raises(ValueError, match="3 features"):
            metric(features(0, 3, 2), features(1, 10, 2))


def score(logits: np.ndarray, split: int = 5000, batch: int = 7) -> float:
    gathered = metrics.InceptionScore(logits.shape[1], len(logits), split)
    for first in range(0, len(logits), batch):
        gathered.add(first, logits[first : first + batch])
    return gathered.value()


def test_inception_score_of_uniform_and_of_one_hot_predictions():
    np.testing.assert_allclose(score(np.zeros((40, 10))), 1, rtol=1e-12)
    every = np.tile(np.eye(10) * 1e4, (4, 1))
    np.testing.assert_allclose(score(every), 10, rtol=1e-12)
    np.testing.assert_allclose(
        score(every[:, ::-1] + 5), 10, rtol=1e-12
    )  # a common offset is no prediction
    half = np.concatenate([np.tile(np.eye(10)[i], (20, 1)) * 1e4 for i in (0, 1)])
    np.testing.assert_allclose(score(half), 2, rtol=1e-12)
    np.testing.assert_allclose(score(half, split=20), 1, rtol=1e-12)  # a split of one class
    np.testing.assert_allclose(
        score(half, split=30), (np.exp(-(2 / 3 * np.log(2 / 3) + 1 / 3 * np.log(1 / 3))) + 1) / 2
    )
