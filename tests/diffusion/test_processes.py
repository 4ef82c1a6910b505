import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft
import scipy.stats

from rdm_jax.diffusion import blurring, preconditioning, processes, schedules
from rdm_jax.diffusion.blend import BlendProcess
from rdm_jax.diffusion.coupling import CouplingProcess
from tests.support.arrays import images

# Bounds are 5 standard errors: a right process fails a single comparison in 2 million seeds,
# hundreds of them in thousands.
ERRORS = 5


def keys(n, seed=0):
    return jax.random.split(jax.random.key(seed), n)


diffuse_and_condition = jax.jit(processes.diffuse, static_argnums=0)


def diffuse(process, x, keys):
    return diffuse_and_condition(process, x, keys)[0]


noised_by = jax.jit(
    lambda process, x, level, noise: process.noised(x, level, noise), static_argnums=0
)


@functools.partial(jax.jit, static_argnames=("process", "shape", "n"))
def draw_noise(process, shape, n):
    return jax.vmap(lambda key: process.draw_noise(key, shape))(keys(n))


def mixture_covariance(height, width, block, block_scale):
    """Covariance of the noise, (h w, h w): the identity plus a^2 / s^2 max(0, s - dx) max(0, s -
    dy) on a torus (arXiv 2309.03350)."""

    def overlap(n):
        distance = np.abs(np.arange(n)[:, None] - np.arange(n))
        return np.maximum(0, block - np.minimum(distance, n - distance)) / block

    return np.eye(height * width) + block_scale**2 * np.kron(overlap(height), overlap(width))


def blurred_by_hand(x, weights):
    """The blur of an (h, w) image with SciPy's DCT, patch by patch."""
    p, out = len(weights), np.zeros(x.shape)
    for i, j in np.ndindex(x.shape[0] // p, x.shape[1] // p):
        place = slice(i * p, (i + 1) * p), slice(j * p, (j + 1) * p)
        out[place] = scipy.fft.idctn(weights * scipy.fft.dctn(x[place], norm="ortho"), norm="ortho")
    return out


# A large `block_scale`, so that its covariance stands far above the standard error.
@pytest.mark.parametrize("normalize", [False, True], ids=["code", "paper"])
@pytest.mark.parametrize(("patch", "height", "width"), [(2, 4, 6), (3, 6, 6)])
def test_relay_marginals(patch, height, width, normalize):
    n, level = 10_000, 0.7
    process = processes.RelayProcess(patch=patch, block_scale=0.8, normalize_noise=normalize)
    x = images((1, height, width, 1))
    noise = draw_noise(process, (height, width, 1), n)
    noised = noised_by(process, jnp.broadcast_to(x, noise.shape), jnp.full(n, level), noise)

    sigma = float(np.asarray(noised.sigma)[0])
    # As exact as the clock is in float32.
    assert sigma == pytest.approx(np.exp(-1.2 + 1.2 * scipy.stats.norm.ppf(0.93 * level)), rel=1e-5)
    blur_sigma = process.clock.blur_sigma_max * np.sin(np.pi * level / 2) ** 2
    squares = (np.pi * np.arange(patch) / patch) ** 2
    weights = (1 - 1e-3) * np.exp(-(squares[:, None] + squares) * blur_sigma**2 / 2) + 1e-3
    mean = blurred_by_hand(np.asarray(x[0, :, :, 0], np.float64), weights).ravel()
    covariance = (
        sigma**2 * mixture_covariance(height, width, patch, 0.8) / (1.64 if normalize else 1)
    )

    samples = np.asarray(noised.images, np.float64).reshape(n, -1)
    variance = np.diag(covariance)
    assert np.all(np.abs(samples.mean(0) - mean) < ERRORS * np.sqrt(variance / n))
    centred = samples - mean
    standard_error = np.sqrt((np.outer(variance, variance) + covariance**2) / n)
    z = np.abs(centred.T @ centred / n - covariance) / standard_error
    assert np.max(z) < ERRORS, np.max(z)
    neighbours = covariance[0, 1]
    assert neighbours > 8 * standard_error[0, 1], "too few draws to see the block noise"


@pytest.mark.parametrize(
    ("settings", "variance"),
    [
        ({"block_scale": 0.15}, 1.0225),
        ({"block_scale": 0.15, "normalize_noise": True}, 1.0),
        ({"block_scale": 0.6, "block_size": 2, "normalize_noise": True}, 1.0),
    ],
)
def test_relay_noise_variance(settings, variance):
    n = 5000
    noise = np.asarray(draw_noise(processes.RelayProcess(**settings), (8, 8, 1), n), np.float64)
    of_each_draw = (noise**2).mean((1, 2, 3))
    standard_error = of_each_draw.std() / np.sqrt(n)
    assert abs(of_each_draw.mean() - variance) < ERRORS * standard_error
    assert standard_error < 0.0225 / 6, "too few draws to tell 1 + 0.15^2 from 1"


def test_relay_block_size_zero_is_patch():
    white, block_white = images((2, 8, 8, 1)), images((2, 8, 8, 1), seed=1)

    def mixture(**settings):
        return processes.RelayProcess(block_scale=0.5, **settings).mixture(white, block_white)

    by_hand = white + 0.5 * blurring.block_noise(block_white, block=2)
    chex.assert_trees_all_close(mixture(patch=2), by_hand, atol=1e-6)
    chex.assert_trees_all_close(mixture(patch=4, block_size=2), by_hand, atol=1e-6)
    assert np.max(np.abs(mixture(patch=4) - by_hand)) > 0.1


def test_relay_white_and_block_noise_are_independent():
    process = processes.RelayProcess(block_scale=100.0)
    n = 2000
    with_block, white = (
        np.asarray(draw_noise(p, (4, 4, 1), n))
        for p in (process, dataclasses.replace(process, block_scale=1e-9))
    )
    block = (with_block - white) / 100
    # Were e' = e, block noise would have a covariance of 1/4 with each of the white pixels that it
    # sums.
    products = (block * white).mean((1, 2, 3))
    assert abs(products.mean()) < ERRORS * products.std() / np.sqrt(n)


def test_gaussian_levels_are_lognormal():
    n = 10_000
    process = processes.GaussianProcess(p_mean=-0.4, p_std=1.7)
    sigma = diffuse(process, jnp.zeros((n, 2, 2, 1)), keys(n)).sigma
    z = (np.log(np.asarray(sigma, np.float64)) + 0.4) / 1.7
    assert abs(z.mean()) < ERRORS / np.sqrt(n)
    assert abs(z.std() - 1) < ERRORS / np.sqrt(2 * n)
    # Kolmogorov's distance of n right draws exceeds 2.6 / sqrt(n) once in 370,000 seeds (2 exp(-2
    # 2.6^2)).
    assert scipy.stats.kstest(z, "norm").statistic < 2.6 / np.sqrt(n)


def test_gaussian_marginals():
    n = 10_000
    x = images((1, 2, 3, 2))
    noised = diffuse(processes.GaussianProcess(), jnp.broadcast_to(x, (n, 2, 3, 2)), keys(n))
    noise = np.asarray((noised.images - x) / noised.sigma[:, None, None, None], np.float64).reshape(
        n, -1
    )
    assert np.all(np.abs(noise.mean(0)) < ERRORS / np.sqrt(n))
    assert np.all(np.abs(np.cov(noise.T) - np.eye(12)) < ERRORS * np.sqrt((1 + np.eye(12)) / n))
    # The noise is independent of the level, although both come from one key.
    level = np.log(np.asarray(noised.sigma, np.float64))
    assert np.all(
        np.abs([np.corrcoef(level, noise[:, i])[0, 1] for i in range(12)]) < ERRORS / np.sqrt(n)
    )


@pytest.mark.parametrize("epsilon", [1e-5, 0.3])
def test_vp_times_are_uniform(epsilon):
    n = 10_000
    sigma = np.asarray(
        diffuse(processes.VPProcess(epsilon=epsilon), jnp.zeros((n, 2, 2, 1)), keys(n)).sigma,
        np.float64,
    )
    log = np.log1p(sigma**2)  # beta_d t^2 / 2 + beta_min t
    t = (np.sqrt(0.1**2 + 2 * 19.9 * log) - 0.1) / 19.9
    assert scipy.stats.kstest(
        t, scipy.stats.uniform(epsilon, 1 - epsilon).cdf
    ).statistic < 2.6 / np.sqrt(n)  # as above
    assert epsilon * (1 - 1e-5) < t.min() and t.max() < 1 + 1e-5


@pytest.mark.parametrize(("sigma_min", "sigma_max"), [(0.02, 100.0), (0.5, 3.0)])
def test_ve_levels_are_loguniform(sigma_min, sigma_max):
    n = 10_000
    process = processes.VEProcess(sigma_min=sigma_min, sigma_max=sigma_max)
    sigma = np.asarray(diffuse(process, jnp.zeros((n, 2, 2, 1)), keys(n)).sigma, np.float64)
    assert scipy.stats.kstest(
        sigma, scipy.stats.loguniform(sigma_min, sigma_max).cdf
    ).statistic < 2.6 / np.sqrt(n)  # as above
    assert sigma_min * (1 - 1e-5) < sigma.min() and sigma.max() < sigma_max * (1 + 1e-5)


@pytest.mark.parametrize(
    ("process", "precondition"),
    [
        (processes.VPProcess(), preconditioning.VPPreconditioning()),
        (processes.VEProcess(), preconditioning.VEPreconditioning()),
    ],
    ids=["vp", "ve"],
)
def test_vp_and_ve_levels_span_network_range(process, precondition):
    level, x, noise = (
        jnp.asarray([0.0, 0.3, 1.0]),
        images((3, 2, 3, 2)),
        images((3, 2, 3, 2), seed=1),
    )
    noised = noised_by(process, x, level, noise)
    sigma = np.asarray(noised.sigma, np.float64)
    # VP rounds 1 + sigma^2 to float32, as the original does: by up to 6e-8, which is 6 % of the
    # least sigma^2, 1e-6; and 1 - (1 - epsilon) keeps epsilon = 1e-5 to 0.6 % of itself.
    assert sorted(sigma[[0, 2]]) == pytest.approx(precondition.range, rel=3.5e-2)
    expected = np.asarray(x, np.float64) + sigma[:, None, None, None] * np.asarray(
        noise, np.float64
    )
    chex.assert_trees_all_close(
        np.asarray(noised.images, np.float64), expected, rtol=1e-6, atol=1e-6
    )
    # 1 / sigma^2: an error of the unit noise counts the same at every level.
    chex.assert_trees_all_close(np.asarray(noised.weight, np.float64), 1 / sigma**2, rtol=1e-6)
    chex.assert_trees_all_close(
        noised.weight * precondition(noised.sigma).c_out ** 2, jnp.ones(3), rtol=1e-6
    )


def test_relay_times_are_uniform():
    n = 10_000
    process = processes.RelayProcess(patch=2, sigma_floor=0.1, exact_floor=True)
    sigma = np.asarray(diffuse(process, jnp.zeros((n, 2, 2, 1)), keys(n)).sigma)
    bound = scipy.stats.norm.cdf((np.log(0.1) + 1.2) / 1.2) / 0.93
    t = np.asarray(jax.jit(process.clock.time)(jnp.asarray(sigma)), np.float64)
    at_floor = t < bound + 1e-5
    assert abs(at_floor.mean() - bound) < ERRORS * np.sqrt(bound * (1 - bound) / n)
    uniform = scipy.stats.uniform(bound, 1 - bound)
    above = t[~at_floor]
    assert scipy.stats.kstest(above, uniform.cdf).statistic < 2.6 / np.sqrt(
        len(above)
    )  # as for the Gaussian's levels
    assert sigma.max() < np.exp(-1.2 + 1.2 * scipy.stats.norm.ppf(0.93))


@pytest.mark.parametrize("sigma_floor", [0.0075, 0.05])
def test_relay_exact_floor_is_lowest_level(sigma_floor):
    process = processes.RelayProcess(patch=2, sigma_floor=sigma_floor, exact_floor=True)
    noised = noised_by(
        process, jnp.zeros((3, 2, 2, 1)), jnp.asarray([0.0, 1e-5, 0.5]), jnp.zeros((3, 2, 2, 1))
    )
    chex.assert_trees_all_close(
        noised.sigma[:2], jnp.full(2, sigma_floor), rtol=1e-5
    )  # as the clock's round trip
    assert noised.sigma[2] > 0.2


@pytest.mark.parametrize("length", [0.93, 0.89])
def test_relay_published_floor(length):
    process = processes.RelayProcess(patch=2, clock=schedules.Clock(length=length))
    sigma = noised_by(process, jnp.zeros((1, 2, 2, 1)), jnp.zeros(1), jnp.zeros((1, 2, 2, 1))).sigma
    share = scipy.stats.norm.cdf((np.log(0.0075) + 1.2) / 1.2)
    expected = np.exp(-1.2 + 1.2 * scipy.stats.norm.ppf(share * length**2))
    assert expected < 0.0075
    chex.assert_trees_all_close(np.asarray(sigma), np.asarray([expected], np.float32), rtol=1e-5)


def test_relay_weight_is_capped():
    process = processes.RelayProcess(patch=2, sigma_floor=1e-4, max_weight=1e5, exact_floor=True)
    noised = noised_by(
        process, jnp.zeros((3, 2, 2, 1)), jnp.asarray([0.0, 1e-4, 0.5]), jnp.zeros((3, 2, 2, 1))
    )
    sigma = np.asarray(noised.sigma, np.float64)
    expected = (sigma**2 + 0.25) / (0.5 * sigma) ** 2
    assert expected[0] > 1e6 and expected[2] < 1e3
    chex.assert_trees_all_close(
        np.asarray(noised.weight, np.float64), np.minimum(expected, 1e5), rtol=1e-6
    )


def test_gaussian_weight_cancels_c_out():
    process = processes.GaussianProcess(sigma_data=0.3)
    noised = noised_by(
        process,
        jnp.zeros((7, 2, 2, 1)),
        jnp.asarray(np.linspace(-3, 3, 7, dtype=np.float32)),
        jnp.zeros((7, 2, 2, 1)),
    )
    c_out = preconditioning.EDMPreconditioning(sigma_data=0.3)(noised.sigma).c_out
    chex.assert_trees_all_close(noised.weight * c_out**2, jnp.ones(7), rtol=1e-6)


PROCESSES = (
    processes.GaussianProcess(),
    processes.VPProcess(),
    processes.VEProcess(),
    processes.RelayProcess(patch=3),
    processes.CascadeProcess(patch=3),
    CouplingProcess(patch=3),
    BlendProcess(patch=3),
)
every_process = pytest.mark.parametrize(
    "process", PROCESSES, ids=lambda process: type(process).__name__
)


@every_process
def test_process_noise_is_independent_of_batch(process):
    x, key = images((6, 6, 9, 2)), keys(6)
    together = diffuse_and_condition(process, x, key)
    order = np.asarray([3, 0, 5])
    some = diffuse_and_condition(process, x[order], key[order])
    # Whole batches may round differently from parts of them, by an ulp.
    chex.assert_trees_all_close(
        some, jax.tree.map(lambda a: a[order], together), rtol=1e-6, atol=1e-6
    )
    sigma = together[0].sigma
    assert len(np.unique(sigma)) == 6
    again = diffuse(process, x, keys(6, seed=1))
    assert not np.any(np.isclose(again.sigma, sigma))


def test_relay_ends_at_enlarged_image():
    process = processes.RelayProcess(
        patch=3, clock=schedules.Clock(blur_sigma_max=60.0), min_scale=0.0
    )
    x, noise = images((2, 6, 9, 3)), images((2, 6, 9, 3), seed=1)
    noised = noised_by(process, x, jnp.ones(2), noise)
    means = blurring.enlarge(blurring.mean_pool(x, factor=3), factor=3)
    chex.assert_trees_all_close(
        noised.images, means + noised.sigma[:, None, None, None] * noise, atol=2e-6
    )  # a DCT's rounding


@every_process
def test_process_is_traced_once(process):
    chex.clear_trace_counter()  # the counter knows a function by its source, which all cases share
    compiled = jax.jit(
        chex.assert_max_traces(n=1)(lambda x, keys: processes.diffuse(process, x, keys))
    )
    for seed in range(3):
        noised, conditioning = compiled(images((4, 6, 3, 2), seed), keys(4, seed))
        chex.assert_shape(noised, [(4, 6, 3, 2), (4,), (4,)])
        chex.assert_tree_all_finite((noised, conditioning))
        channels = 0 if conditioning is None else conditioning.shape[-1]
        assert channels == process.conditioning_channels(2)


def test_cascade_conditioning():
    process, x = processes.CascadeProcess(patch=2, augment_max=0.4), images((3000, 4, 4, 2))
    noised, given = diffuse_and_condition(process, x, keys(3000))
    chex.assert_shape(given, (3000, 4, 4, 3))
    level = given[:, 0, 0, -1]
    chex.assert_trees_all_equal(
        given[..., -1], jnp.broadcast_to(level[:, None, None], (3000, 4, 4))
    )
    for cell in (given[:, ::2, ::2], given[:, 1::2, 1::2]):  # every cell is constant
        chex.assert_trees_all_equal(cell, given[:, ::2, 1::2])
    assert scipy.stats.kstest(level / 0.4, "uniform").pvalue > 1e-3
    noise = (given[:, ::2, ::2, :2] - blurring.mean_pool(x, factor=2)) / level[:, None, None, None]
    assert scipy.stats.kstest(noise.ravel(), "norm").pvalue > 1e-3
    assert (
        abs(
            np.corrcoef(
                noise.ravel(),
                ((noised.images - x) / noised.sigma[:, None, None, None])[:, ::2, ::2].ravel(),
            )[0, 1]
        )
        < 0.03
    )
    alike = diffuse(processes.GaussianProcess(), x, keys(3000))
    chex.assert_trees_all_equal(noised, alike)  # all else is the Gaussian process
