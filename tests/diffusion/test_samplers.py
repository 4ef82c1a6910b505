"""Samplers on Gaussian targets, whose denoisers, marginals and flows are known in closed form.

A sampler then is an affine map of its state and its noises, so its marginals are propagated exactly, without drawing samples:
what is measured is its discretisation alone. Images are 4 x 4 pixels, flattened to vectors of 16 here.
"""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft

from rdm_jax.diffusion import blurring, processes, schedules
from rdm_jax.diffusion.samplers import Heun, Levels, RelayHeun, relay_update, walk

SIZE, PIXELS = 4, 16
SHAPE = (1, SIZE, SIZE, 1)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def patch_dct_matrix(patch):
    """u = matrix x, x the pixels of an image row by row, u its coefficients in their patch's place; by SciPy."""
    columns = []
    for pixel in np.eye(PIXELS).reshape(PIXELS, SIZE // patch, patch, SIZE // patch, patch):
        columns.append(scipy.fft.dctn(pixel, axes=(1, 3), norm="ortho").ravel())
    return np.stack(columns, axis=1)


def tile(weights):
    """(p, p) weights in the place of every patch, flattened."""
    repeats = (SIZE // len(weights),) * 2
    return np.tile(weights, repeats).ravel() if isinstance(weights, np.ndarray) else jnp.tile(weights, repeats).ravel()


def is_mean(patch):
    """Which coefficients are patch means."""
    return np.asarray(tile(np.outer(*np.eye(patch)[[0, 0]]))).astype(bool)


@dataclasses.dataclass(frozen=True, eq=False)  # equal to itself alone, so that jit may know it
class Target:
    """Images ~ N(mean, covariance), seen through a process as blur(sigma) x0 + sigma N(0, noise)."""

    mean: np.ndarray
    covariance: np.ndarray
    noise: np.ndarray
    process: processes.Gaussian | processes.Relay

    def blur(self, sigma):
        if isinstance(self.process, processes.Gaussian):
            return jnp.eye(PIXELS)
        basis = patch_dct_matrix(self.process.patch)
        weights = self.process.blur_weights(self.process.clock.time(jnp.reshape(sigma, 1)))[0]
        return basis.T @ (tile(weights)[:, None] * basis)

    @functools.partial(jax.jit, static_argnums=0)
    def marginal(self, sigma):
        blur = self.blur(sigma)
        return blur @ self.mean, blur @ self.covariance @ blur.T + sigma**2 * self.noise

    def denoise(self, x, sigma):
        """E[x0 | x]."""
        centre, covariance = self.marginal(sigma)
        gain = jnp.linalg.solve(covariance, self.blur(sigma) @ self.covariance).T
        return (self.mean + (x.reshape(-1, PIXELS) - centre) @ gain.T).reshape(x.shape).astype(x.dtype)


@functools.cache
def relay_target(process, variance=None, seed=0):
    """A target that is diagonal in the patch DCT, as the process is, unless its noise is coloured."""
    rng, basis = np.random.default_rng(seed), patch_dct_matrix(process.patch)
    variance = rng.uniform(0.05, 0.5, PIXELS) if variance is None else np.broadcast_to(variance, PIXELS)
    block = np.zeros((PIXELS, PIXELS))
    if process.block_scale:
        images = np.eye(PIXELS, dtype=np.float32).reshape(PIXELS, SIZE, SIZE, 1)
        columns = blurring.block_noise(jnp.asarray(images), block=process.block_size or process.patch)
        block = process.block_scale * np.asarray(columns, np.float64).reshape(PIXELS, PIXELS)
    noise = np.eye(PIXELS) + block.T @ block
    return Target(0.3 * rng.standard_normal(PIXELS), (basis.T * variance) @ basis, noise, process)


@functools.cache
def gaussian_target(seed=0):
    rng = np.random.default_rng(seed)
    return Target(rng.standard_normal(PIXELS), np.diag(rng.uniform(0.05, 1.0, PIXELS)), np.eye(PIXELS), processes.Gaussian())


def concrete_levels(sampler, process):
    """The levels as NumPy arrays, whose parts need no compilation."""
    return jax.tree.map(np.asarray, sampler.levels(process))


def linearized(sampler, target):
    """A compiled (level, to) -> (offset, and the matrices that the state and the step's two noises are multiplied with)."""
    # A batch for one run of the step: zero, then every pixel of the state and of either noise by itself.
    pixels = np.eye(3 * PIXELS + 1, k=-1)[:, :-1].reshape(-1, 3, SIZE, SIZE, 1)
    x, *noise = pixels.swapaxes(0, 1)
    noise = jnp.asarray(noise)
    step = jax.jit(lambda x, level, to: sampler.step(target.denoise, x, jnp.int32(0), level, to, lambda k: noise[k - 1]))

    def matrices(level, to):
        offset, *columns = np.asarray(step(jnp.asarray(x), level, to)).reshape(-1, PIXELS)
        return offset, *np.reshape(columns - offset, (3, PIXELS, PIXELS)).transpose(0, 2, 1)

    return matrices


def rungs(levels):
    return [jax.tree.map(lambda a, k=k: jnp.asarray(a[k]), levels) for k in range(len(levels.sigma))]


def propagate(sampler, target, *, same_noise=False):
    """Mean and covariance of the state at the last level, where the first level has the exact ones, and that level."""
    matrices, ladder = linearized(sampler, target), rungs(concrete_levels(sampler, target.process))
    mean, covariance = map(np.asarray, target.marginal(ladder[0].sigma))
    for level, to in zip(ladder, ladder[1:], strict=False):
        offset, of_state, *of_noise = matrices(level, to)
        mean, covariance = of_state @ mean + offset, of_state @ covariance @ of_state.T
        for m in [sum(of_noise)] if same_noise else of_noise:
            covariance = covariance + m @ target.noise @ m.T
    return mean, covariance, float(ladder[-1].sigma)


def marginal_error(sampler, target):
    """How far the last level's covariance is off, in coefficients that have unit variance there, and its mean."""
    mean, covariance, sigma = propagate(sampler, target)
    exact_mean, exact = map(np.asarray, target.marginal(sigma))
    whiten = np.linalg.inv(np.linalg.cholesky(exact))
    return max(np.abs(whiten @ covariance @ whiten.T - np.eye(PIXELS)).max(), np.abs(whiten @ (mean - exact_mean)).max())


def integrate(ladder, target, x):
    """The deterministic state at the last level, with that level's ends, for samplers that differ in their steps alone."""
    step = jax.jit(lambda x, i, level, to: ladder[0].step(target.denoise, x, i, level, to, lambda k: jnp.zeros(SHAPE)))
    for sampler in ladder:
        levels = concrete_levels(sampler, target.process)
        yield np.asarray(walk(step, lambda x, i, level: x, x, levels, scan=False)).ravel(), levels.sigma


def flow(target, basis, x, sigma):
    """Where the exact probability flow brings x from the first level to the last: each coefficient keeps its quantile."""
    (m0, c0), (m1, c1) = (target.marginal(s) for s in (sigma[0], sigma[-1]))
    variance = lambda c: np.diag(basis @ np.asarray(c) @ basis.T)  # noqa: E731
    u = np.sqrt(variance(c1) / variance(c0)) * (basis @ (np.asarray(x).ravel() - np.asarray(m0)))
    return basis.T @ u + np.asarray(m1)


def relay(steps, *, eta=0.0, order=2):
    """A relay sampler that walks every level from 0.8 to 0.05: twice the steps walk the same levels and those between."""
    return RelayHeun(steps=steps + 1, sigma_min=0.05, sigma_max=0.8, rho=7.0, truncation_sigma=0.81, eta=eta, order=order)


def relay_process(blur_sigma_max=3.0, patch=2, block_scale=0.0):
    return processes.Relay(patch=patch, clock=schedules.Clock(blur_sigma_max=blur_sigma_max), block_scale=block_scale)


def falls(errors):
    """The factor by which each error is below the one before."""
    return np.asarray(errors)[:-1] / np.asarray(errors)[1:]


def test_heun_is_of_second_order(x64):
    target, x = gaussian_target(), jnp.asarray(np.random.default_rng(1).normal(0, 10, SHAPE))
    ladder = [Heun(steps=steps + 1, sigma_min=0.1, sigma_max=10.0) for steps in (64, 128)]
    errors = [np.abs(out - flow(target, np.eye(PIXELS), x, sigma)).max() for out, sigma in integrate(ladder, target, x)]
    # Halving the step quarters the error, but for the next term of its series.
    chex.assert_trees_all_close(falls(errors), np.full(1, 4.0), rtol=0.05)
    assert errors[-1] < 1e-3


# The published corrector averages (u - u0) / sigma. That is the flow's noise only where nothing is blurred (D = 1): in patch
# means, or without blur. In blurred coefficients it converges to the same flow, but at first order.
@pytest.mark.parametrize(
    ("order", "blur_sigma_max", "patch", "of_means", "of_the_rest"),
    [(1, 3.0, 4, 2.0, 2.0), (2, 3.0, 2, 4.0, 2.0), (2, 3.0, 4, 4.0, 2.0), (1, 0.0, 2, 2.0, 2.0), (2, 0.0, 4, 4.0, 4.0)],
)
def test_order_of_the_relay_sampler(x64, order, blur_sigma_max, patch, of_means, of_the_rest):
    target, basis = relay_target(relay_process(blur_sigma_max, patch)), patch_dct_matrix(patch)
    x = jnp.asarray(np.random.default_rng(1).standard_normal(SHAPE))
    ladder = [relay(steps, order=order) for steps in (64, 128)]
    errors = [np.abs(basis @ (out - flow(target, basis, x, sigma))) for out, sigma in integrate(ladder, target, x)]
    # Halving the step divides the error by 2 or 4, but for the next term of its series.
    mean = is_mean(patch)
    largest = lambda which: np.asarray([e[which].max() for e in errors])  # noqa: E731
    chex.assert_trees_all_close(falls(largest(mean)), np.full(1, of_means), rtol=0.05)
    chex.assert_trees_all_close(falls(largest(~mean)), np.full(1, of_the_rest), rtol=0.05)


def test_the_corrector_pays_in_blurred_coefficients_too(x64):
    target, basis = relay_target(relay_process(patch=4)), patch_dct_matrix(4)
    x = jnp.asarray(np.random.default_rng(1).standard_normal(SHAPE))
    error = lambda out, sigma: np.abs(basis @ (out - flow(target, basis, x, sigma)))  # noqa: E731
    plain, corrected = (error(*next(integrate([relay(64, order=order)], target, x))) for order in (1, 2))
    assert corrected.max() < plain.max() / 2


@pytest.mark.parametrize("churn", [0.0, 20.0])
def test_marginals_of_heun_become_exact(x64, churn):
    """Churn adds exactly the noise between two levels, so it costs no order."""
    sampler = lambda steps: Heun(steps=steps + 1, sigma_min=0.1, sigma_max=10.0, churn=churn)  # noqa: E731
    errors = [marginal_error(sampler(steps), gaussian_target()) for steps in (64, 128)]
    chex.assert_trees_all_close(falls(errors), np.full(1, 4.0), rtol=0.05)  # second order, but for the series' next term
    assert errors[-1] < 1e-2


def test_too_much_churn_noise_widens_the_marginals(x64):
    sampler = Heun(steps=65, sigma_min=0.1, sigma_max=10.0, churn=20.0)
    exact, wide = (marginal_error(dataclasses.replace(sampler, churn_noise=n), gaussian_target()) for n in (1.0, 1.05))
    assert wide > 5 * exact


def test_churn_stays_between_its_bounds(x64):
    sampler = Heun(steps=6, sigma_min=0.1, sigma_max=10.0, churn=2.0, churn_min=0.5, churn_max=5.0)
    matrices, ladder = linearized(sampler, gaussian_target()), rungs(concrete_levels(sampler, processes.Gaussian()))
    for level, to in zip(ladder, ladder[1:], strict=False):
        noisy = bool(np.any(matrices(level, to)[2]))
        assert noisy == (0.5 <= level.sigma <= 5.0), level.sigma


@pytest.mark.parametrize(("eta", "order"), [(0.0, 2), (0.2, 1), (0.2, 2), (0.5, 2)])
def test_marginals_of_the_relay_become_exact(x64, eta, order):
    """Under coloured noise too, and with eta^2, the fresh variance of a step, in proportion to the step.

    `eta` is the sampler's at 64 steps; the limit is an SDE that keeps the marginals.
    """
    target = relay_target(relay_process(block_scale=0.5))
    errors = [marginal_error(relay(steps, eta=eta * (64 / steps) ** 0.5, order=order), target) for steps in (64, 128)]
    chex.assert_trees_all_close(falls(errors), np.full(1, 2.0), rtol=0.05)  # first order, but for the series' next term
    assert errors[-1] < 0.1


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_marginals_of_a_single_image_are_exact_at_any_eta(x64, eta):
    """Where u0 is certain the plain update draws from the process itself, whatever the steps."""
    target = relay_target(relay_process(block_scale=0.5), variance=0.0)
    assert marginal_error(relay(5, eta=eta, order=1), target) < 1e-10  # float64


@pytest.mark.parametrize("eta", [0.2, 0.5])
def test_a_fixed_eta_leaves_a_small_bias(x64, eta):
    """More steps alone do not end it: a step adds eta^2 sigma^2 and its mean u0_hat, not a draw of u0, takes too much away.

    A coefficient without blur that takes many steps at one sigma settles at (S + sigma^2) (1 - c / 2 + c b) but for O(c^2),
    where c = 1 - sqrt(1 - eta^2) and b = sigma^2 / (S + sigma^2) lies in (0, 1): never further off than c / 2.
    """
    target = relay_target(relay_process(blur_sigma_max=0.0))
    errors = [marginal_error(relay(steps, eta=eta), target) for steps in (64, 128)]
    assert errors[0] / 2 < errors[1] < (1 - (1 - eta**2) ** 0.5) / 2


def test_the_corrector_must_draw_fresh_noise(x64):
    """With ImageNet's published sampler, on images of EDM's sigma_data: the standard deviation of the patch means."""
    target = relay_target(relay_process(patch=4), variance=0.25)
    sampler = RelayHeun(steps=200, rho=100.0, truncation_sigma=0.9, eta=0.2)
    mean = patch_dct_matrix(4)[is_mean(4)]
    ratios = []
    for same_noise in (False, True):
        _, covariance, sigma = propagate(sampler, target, same_noise=same_noise)
        ratios.append(float((mean @ covariance @ mean.T / (0.25 + sigma**2)).squeeze()) ** 0.5)
    fresh, same = ratios
    assert abs(fresh - 1) < 0.002
    assert same < 0.995


@pytest.mark.parametrize(
    "sampler",
    [Heun(steps=6, sigma_min=0.2, sigma_max=3.0, churn=4.0), relay(5, eta=0.5, order=1), relay(5, eta=0.5, order=2)],
    ids=["heun", "relay-1", "relay-2"],
)
def test_samples_are_distributed_as_propagated(x64, sampler):
    """Drawn from its own noises, a batch has the moments that independent noises of the process would give it."""
    target = gaussian_target() if isinstance(sampler, Heun) else relay_target(relay_process(block_scale=0.5))
    draws, levels = 10_000, concrete_levels(sampler, target.process)
    mean, covariance, _ = propagate(sampler, target)
    first = map(np.asarray, target.marginal(levels.sigma[0]))
    x = jnp.asarray(np.random.default_rng(0).multivariate_normal(*first, size=draws).reshape(-1, SIZE, SIZE, 1))

    @jax.jit
    def noise(k):
        keys = jax.random.split(jax.random.fold_in(jax.random.key(0), k), draws)
        return jax.vmap(lambda key: target.process.draw_noise(key, SHAPE[1:]))(keys)

    step = jax.jit(lambda x, i, level, to: sampler.step(target.denoise, x, i, level, to, noise))
    out = np.asarray(walk(step, lambda x, i, level: x, x, levels, scan=False)).reshape(draws, PIXELS)
    variance = np.diag(covariance)
    # 5 standard errors of a mean and of a covariance: once in 10,000 seeds for all 152 of them.
    assert np.all(np.abs(out.mean(0) - mean) < 5 * np.sqrt(variance / draws))
    standard_error = np.sqrt((np.outer(variance, variance) + covariance**2) / draws)
    assert np.all(np.abs(np.cov(out.T) - covariance) < 5 * standard_error)


SAMPLERS = {
    "heun": Heun(steps=6, sigma_min=0.1, sigma_max=10.0),
    "heun-churn": Heun(steps=6, sigma_min=0.1, sigma_max=10.0, churn=2.0),
    "relay-1": relay(5, eta=0.2, order=1),
    "relay-2": relay(5, eta=0.2, order=2),
}
every_sampler = pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS.keys())


def process_of(sampler):
    return processes.Gaussian() if isinstance(sampler, Heun) else relay_process()


def shrink(x, sigma):
    return jnp.tanh(x) / (1 + sigma)


def draw(k):
    return jax.random.normal(jax.random.fold_in(jax.random.key(0), k), SHAPE)


def images(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def run(sampler, *, scan, denoise=shrink, noise=draw):
    """A whole walk from `start`, nothing of it compiled but a scan."""
    levels = sampler.levels(process_of(sampler))
    low = None if isinstance(sampler, Heun) else jnp.ones((1, 2, 2, 1))
    step = lambda x, i, level, to: sampler.step(denoise, x, jnp.asarray(i), level, to, noise)  # noqa: E731
    finish = lambda x, i, level: sampler.finish(denoise, x, jnp.asarray(i), level, noise)  # noqa: E731
    return walk(step, finish, sampler.start(low, rungs(levels)[0], noise), levels, scan=scan)


@every_sampler
def test_scan_is_the_loop(sampler):
    chex.assert_trees_all_close(run(sampler, scan=True), run(sampler, scan=False), atol=1e-5)  # float32 in another order


@pytest.mark.parametrize(("name", "evaluations"), [("heun", 11), ("heun-churn", 11), ("relay-1", 6), ("relay-2", 11)])
def test_evaluations_and_levels(name, evaluations):
    """N levels take 2 N - 1 evaluations, or N at first order: at both ends of every step, and at the last level."""
    calls, sampler = [], dataclasses.replace(SAMPLERS[name], **({"churn_max": 0.0} if name == "heun-churn" else {}))

    def denoise(x, sigma):
        calls.append(float(sigma))
        return shrink(x, sigma)

    run(sampler, scan=False, denoise=denoise)
    sigma = np.asarray(sampler.levels(process_of(sampler)).sigma).tolist()
    assert len(sigma) == 6 and len(calls) == evaluations
    both_ends = [s for pair in zip(sigma, sigma[1:], strict=False) for s in pair]
    assert calls == (sigma if name == "relay-1" else [*both_ends, sigma[-1]])


@every_sampler
def test_no_noise_is_used_twice(sampler):
    asked = []

    def noise(k):
        asked.append(int(k))
        return draw(k)

    run(sampler, scan=False, noise=noise)
    assert asked[0] == 0 and len(set(asked)) == len(asked), asked


@every_sampler
def test_the_last_step_returns_the_denoised_image(sampler):
    x, level = draw(7), rungs(concrete_levels(sampler, process_of(sampler)))[-1]
    still = dataclasses.replace(sampler, **({"churn": 0.0} if isinstance(sampler, Heun) else {}))
    chex.assert_trees_all_equal(still.finish(shrink, x, jnp.int32(5), level, draw), shrink(x, level.sigma))


@every_sampler
def test_one_trace_of_the_step(sampler):
    chex.clear_trace_counter()  # the counter knows a function by its source, which all cases share
    levels = sampler.levels(process_of(sampler))
    once = chex.assert_max_traces(n=1)(lambda x, i, level, to: sampler.step(shrink, x, i, level, to, draw))
    out = walk(jax.jit(once), lambda x, i, level: x, draw(0), levels, scan=False)
    chex.assert_shape(out, SHAPE)
    chex.assert_tree_all_finite(out)


def test_heun_starts_from_noise():
    level = Levels(jnp.asarray(80.0))
    chex.assert_trees_all_equal(Heun().start(None, level, draw), 80 * draw(0))


def test_the_relay_starts_from_the_enlarged_image_and_noise_of_its_first_level():
    patch = 3
    process = dataclasses.replace(relay_process(), patch=patch)
    level = rungs(concrete_levels(RelayHeun(steps=200, rho=100.0), process))[0]
    low, noise = images((2, 3, 5, 3)), images((2, 3 * patch, 5 * patch, 3), seed=1)
    flat = np.asarray(RelayHeun().start(low, level, lambda k: jnp.zeros_like(noise)))
    for i, j in np.ndindex(patch, patch):
        chex.assert_trees_all_equal(flat[:, i::patch, j::patch], np.asarray(low))
    noised = np.asarray(RelayHeun().start(low, level, lambda k: {0: noise}[k]))
    assert float(level.sigma) == pytest.approx(0.8691, abs=5e-5)  # published to four places
    # float32 numbers up to 5, divided by 0.87
    np.testing.assert_allclose((noised - flat) / np.asarray(level.sigma), noise, atol=1e-5)


def test_the_relay_starts_where_the_process_ends():
    process = dataclasses.replace(relay_process(blur_sigma_max=100.0), min_scale=0.0)
    sampler = relay(5)
    level = rungs(concrete_levels(sampler, process))[0]
    x, noise = images((2, 4, 6, 3)), images((2, 4, 6, 3), seed=1)
    noised = jax.jit(lambda sigma: process.noised(x, process.clock.time(sigma), noise))(jnp.asarray(np.repeat(level.sigma, 2)))
    start = sampler.start(blurring.mean_pool(x, factor=2), level, lambda k: noise)
    chex.assert_trees_all_close(start, noised.images, atol=1e-5)  # the clock's round trip in float32


@pytest.mark.parametrize("truncation_time", [0.0, 1.05])
def test_levels_of_the_relay_are_blurred_by_its_clock_in_sampling(truncation_time):
    process, sampler = relay_process(), dataclasses.replace(relay(5), truncation_time=truncation_time)
    levels = sampler.levels(process)
    chex.assert_shape(levels, [(6,), (6, 2, 2)])
    clock = schedules.Clock(length=truncation_time or process.clock.length)
    chex.assert_trees_all_equal(levels.blur, process.blur_weights(clock.time(levels.sigma)))
    assert np.all(np.diff(np.asarray(levels.blur)[:, 1, 1]) > 0)


@pytest.mark.parametrize("eta", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("patch", [2, 3, 5])
def test_the_update_of_a_patch_is_the_same_in_pixels(x64, patch, eta):
    rng = np.random.default_rng(0)
    x, x0, d1, d2 = (rng.uniform(0, 1, (patch, patch)) for _ in range(4))
    level, to = Levels(jnp.asarray(0.8), jnp.asarray(d1)), Levels(jnp.asarray(0.6), jnp.asarray(d2))
    dct = scipy.fft.dct(np.eye(patch), axis=0, norm="ortho")
    v = np.kron(dct, dct).T
    in_pixels = lambda weights: v @ np.diag(weights.ravel()) @ v.T  # noqa: E731
    g = np.sqrt(1 - eta**2) * 0.6 / 0.8
    # u' = g u + (D' - g D) u0, before u0 is eliminated
    expected = g * x.ravel() + in_pixels(d2 - g * d1) @ x0.ravel()
    update = jax.jit(lambda x, slope: relay_update(x, slope, level, to, eta))
    out = update(jnp.asarray(x), jnp.asarray((x - x0) / 0.8))
    chex.assert_trees_all_close(np.asarray(out).ravel(), expected, atol=1e-12)
    # and after
    slope = rng.standard_normal((patch, patch))
    expected = in_pixels(d2 + g * (1 - d1)) @ x.ravel() + 0.8 * in_pixels(g * d1 - d2) @ slope.ravel()
    out = update(jnp.asarray(x), jnp.asarray(slope))
    chex.assert_trees_all_close(np.asarray(out).ravel(), expected, atol=1e-12)


@pytest.mark.parametrize("sampler", [SAMPLERS["heun-churn"], SAMPLERS["relay-2"]], ids=["heun", "relay"])
def test_an_image_does_not_depend_on_its_batch(sampler):
    levels, shape = concrete_levels(sampler, process_of(sampler)), (5, 8, 4, 2)
    x, noises = images(shape), images((12, *shape), seed=1)

    @jax.jit
    def sample(x, noises):
        step = lambda x, i, level, to: sampler.step(shrink, x, i, level, to, lambda k: noises[k])  # noqa: E731
        return walk(step, lambda x, i, level: x, x, levels, scan=True)

    some = np.asarray([4, 1])
    alone = sample(jnp.asarray(np.asarray(x)[some]), jnp.asarray(np.asarray(noises)[:, some]))
    chex.assert_trees_all_close(np.asarray(alone), np.asarray(sample(x, noises))[some], atol=1e-5)  # float32
