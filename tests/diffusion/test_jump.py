"""The exact jump: white where it joins, and chains of two and three stages on Gaussian targets."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rdm_jax.diffusion import blurring, schedules
from rdm_jax.diffusion.jump import TOLERANCE, JumpHeun, within_cells
from rdm_jax.diffusion.preconditioning import EDMPreconditioning
from rdm_jax.diffusion.processes import GaussianProcess, RelayProcess
from rdm_jax.diffusion.protocols import Joins, Levels
from rdm_jax.diffusion.samplers import Heun, RelayHeun
from rdm_jax.diffusion.walks import walk
from rdm_jax.runtime.errors import InputError


def basis(height, width):
    """The images of one pixel each."""
    return jnp.asarray(np.eye(height * width).reshape(-1, height, width, 1))


@pytest.mark.parametrize("factor", [2, 3, 4, 8])
def test_jump_joins_in_white_noise_exactly(x64, factor):
    """The covariance of the linear map of both noises is a multiple of the identity."""
    s, sizes = 0.7, (2, 3)
    large = tuple(side * factor for side in sizes)
    level = Levels(jnp.asarray(factor * s), jnp.zeros((factor, factor)))
    small, fresh = s * basis(*sizes), basis(*large)
    joined = jnp.concatenate(
        [
            JumpHeun().join(small, level, lambda k: jnp.zeros((len(small), *large, 1))),
            JumpHeun().join(jnp.zeros((len(fresh), *sizes, 1)), level, lambda k: fresh),
        ]
    ).reshape(len(small) + len(fresh), -1)
    np.testing.assert_allclose(
        joined.T @ joined, (factor * s) ** 2 * np.eye(np.prod(large)), atol=1e-12
    )


def test_jump_joins_in_white_noise_by_samples():
    draws, factor, s = 20_000, 4, 0.5
    small, fresh = (
        jax.random.normal(jax.random.key(seed), (draws, *shape, 2))
        for seed, shape in enumerate([(1, 1), (4, 4)])
    )
    level = Levels(jnp.float32(factor * s), jnp.zeros((factor, factor)))
    x = np.asarray(JumpHeun().join(s * small, level, lambda k: fresh)).reshape(draws, -1)
    covariance = x.T @ x / draws / (factor * s) ** 2
    # Five standard deviations of an estimate, of a variance at most sqrt(2) that of a covariance.
    assert np.abs(covariance - np.eye(32)).max() < 5 * (2 / draws) ** 0.5


def test_within_cells_has_no_means():
    noise = jax.random.normal(jax.random.key(0), (2, 6, 9, 2))
    inside = within_cells(noise, factor=3)
    cells = np.asarray(noise - inside).reshape(2, 2, 3, 3, 3, 2)
    np.testing.assert_allclose(cells, cells[:, :, :1, :, :1] + 0 * cells, atol=1e-6)
    np.testing.assert_allclose(blurring.mean_pool(inside, factor=3), 0, atol=1e-6)


def pooling(size, factor):
    """M as a matrix."""
    means = blurring.mean_pool(basis(size, size), factor=factor)
    return np.asarray(means).reshape(size * size, -1).T


class Images:
    """Images ~ N(mean, covariance) of size x size pixels, and their exact denoiser."""

    def __init__(self, mean, covariance, process):
        self.mean, self.covariance, self.process = mean, covariance, process
        self.size = round(len(mean) ** 0.5)

    def blur(self, sigma):
        if isinstance(self.process, GaussianProcess):
            return jnp.eye(len(self.mean))
        time = jnp.minimum(self.process.clock.time(jnp.reshape(sigma, 1)), 1.0)
        images = basis(self.size, self.size)
        blurred = self.process.blurred(images, jnp.repeat(time, len(images)))
        return blurred.reshape(len(images), -1).T

    def denoise(self, x, sigma):
        """E[x0 | x]."""
        blur = self.blur(sigma)
        seen = blur @ self.covariance @ blur.T + sigma**2 * jnp.eye(len(self.mean))
        gain = jnp.linalg.solve(seen, blur @ self.covariance).T
        centred = x.reshape(len(x), -1) - blur @ self.mean
        return (self.mean + centred @ gain.T).reshape(x.shape)


def targets(processes, seed=0):
    """One distribution at the sizes 2, 4, ... of the processes, the last ones first drawn."""
    rng, size = np.random.default_rng(seed), 2 ** len(processes)
    scale = rng.standard_normal((size**2, size**2)) / size
    mean, covariance = 0.3 * rng.standard_normal(size**2), 0.1 * scale @ scale.T
    covariance += 0.05 * np.eye(size**2) + 0.1
    found = []
    for process in reversed(processes):
        found.append(Images(mean, covariance, process))
        m = pooling(found[-1].size, 2)
        mean, covariance = m @ mean, m @ covariance @ m.T
    return found[::-1]


def through(samplers, images, noises):
    """Takes the unit noises of each stage through the chain; the deterministic samplers draw one."""
    low = None
    for sampler, target, unit in zip(samplers, images, noises, strict=True):
        levels = sampler.levels(target.process)
        first = jax.tree.map(lambda a: a[0], levels)
        start = sampler.start if low is None else sampler.join
        step = jax.jit(
            lambda x, i, level, to, s=sampler, d=target.denoise, u=unit: s.step(
                d, x, i, level, to, lambda k: u
            )
        )

        def finish(x, i, level, sampler=sampler, denoise=target.denoise):
            return x if sampler.stop else denoise(x, level.sigma)

        low = walk(step, finish, start(low, first, lambda k, u=unit: u), levels)
    return low


def chain(stages, steps=64):
    """Processes and deterministic samplers of a chain of so many stages."""
    first = Heun(steps, sigma_max=80.0, stop=1.2)
    ladder = {"steps": steps, "eta": 0.0, "corrector": "images", "sigma_min": 0.02}
    if stages == 2:
        process = RelayProcess(2, schedules.Clock(0.98, 2.6), block_scale=0.0)
        return [GaussianProcess(), process], [first, JumpHeun(sigma_max=2.4, **ladder)]
    middle = RelayProcess(2, schedules.Clock(0.98, 2.6, blur_from=0.52), block_scale=0.0)
    last = RelayProcess(2, schedules.Clock(0.98, 2.6), block_scale=0.0)
    samplers = [JumpHeun(sigma_max=2.4, stop=0.3, **ladder), JumpHeun(sigma_max=0.6, **ladder)]
    return [GaussianProcess(), middle, last], [first, *samplers]


def error(processes, samplers):
    """How far the chain's images are off: their covariance, whitened by the exact one, and mean.

    The chain is affine in its noises, so its distribution follows from one batch of basis vectors.
    """
    images = targets(processes)
    shapes = [(target.size, target.size, 1) for target in images]
    count = sum(np.prod(shape) for shape in shapes)
    split = np.cumsum([np.prod(shape) for shape in shapes])[:-1]
    units = np.split(np.eye(count + 1)[:, 1:], split, axis=1)
    noises = [
        jnp.asarray(unit.reshape(count + 1, *shape))
        for unit, shape in zip(units, shapes, strict=True)
    ]
    mean, *columns = np.asarray(through(samplers, images, noises)).reshape(count + 1, -1)
    columns = np.asarray(columns) - mean
    exact = images[-1]
    whiten = np.linalg.inv(np.linalg.cholesky(exact.covariance))
    covariance = whiten @ columns.T @ columns @ whiten.T
    return (
        np.abs(covariance - np.eye(len(mean))).max(),
        np.abs(whiten @ (mean - exact.mean)).max(),
    )


@pytest.mark.parametrize("stages", [2, 3])
def test_jump_chain_keeps_the_marginals(x64, stages):
    """Less than the sampling error of a thousand images, 1 / sqrt(1000)."""
    processes, samplers = chain(stages)
    for sampler, process in zip(samplers, processes, strict=True):
        sampler.check("stage.sampler", process, EDMPreconditioning())
    of_covariance, of_mean = error(processes, samplers)
    assert of_covariance < 0.03 and of_mean < 0.03


@dataclasses.dataclass(frozen=True)
class Plain(JumpHeun):
    """Adds all of the fresh noise: too much in the means of the cells."""

    def join(self, low, level, noise):
        return blurring.enlarge(low, factor=2) + level.sigma * noise(0)


def test_jump_chain_without_the_correction_is_off(x64):
    processes, (first, second) = chain(2)
    plain = Plain(**dataclasses.asdict(second))
    assert error(processes, [first, plain])[0] > 0.1


def test_stopped_heun_ends_at_its_level():
    sampler = Heun(steps=5, stop=0.4)
    levels = sampler.levels(GaussianProcess()).sigma
    np.testing.assert_allclose(levels[jnp.asarray([0, -1])], [80.0, 0.4], rtol=1e-6)
    assert sampler.nfe(GaussianProcess()) == 9  # the last is the picture's


def usual(**process):
    settings = {"clock": schedules.Clock(blur_sigma_max=4.5), "block_scale": 0.0} | process
    return RelayProcess(4, **settings)


@pytest.mark.parametrize(
    ("sampler", "process", "says"),
    [
        ({}, {"block_scale": 0.15}, "stage2.process.block_scale=0.15 .*Use 0, or sampler.kind"),
        ({}, {"clock": schedules.Clock()}, "blur_sigma_max=3.0 .*not complete where it joins: "),
        ({"sigma_max": 1.9}, {}, "stage2.sampler.sigma_max=1.9 .*Use 1.7699 or"),
        ({"stop": 0.2}, {}, "stage2.sampler.stop=0.2 .*still blurred.*blur_from"),
        ({"stop": 1.7}, {}, "stage2.sampler.stop=1.7 is not below sigma_max=1.6"),
    ],
)
def test_jump_refuses(sampler, process, says):
    JumpHeun().check("stage2.sampler", usual(), EDMPreconditioning())
    with pytest.raises(InputError, match=says):
        JumpHeun(**sampler).check("stage2.sampler", usual(**process), EDMPreconditioning())


def test_jump_says_where_it_joins():
    sampler, process = JumpHeun(sigma_max=1.6), usual()
    assert "joins at sigma 1.6, from a small image with noise of sigma 0.4" in sampler.handover(
        process
    )
    assert sampler.joins_at(process) == 0.4 and isinstance(sampler, Joins)
    assert not isinstance(RelayHeun(), Joins)
    assert float(sampler.levels(process).blur[0, 0, 1]) < TOLERANCE


def test_clock_without_blur_below_a_time(x64):
    plain, late = schedules.Clock(), schedules.Clock(blur_from=0.4)
    time = jnp.asarray([0.0, 0.2, 0.4, 0.7, 1.0])
    np.testing.assert_allclose(late.blur_sigma(time)[:3], 0)
    np.testing.assert_allclose(late.blur_sigma(time)[3:], plain.blur_sigma(jnp.asarray([0.5, 1])))
    np.testing.assert_array_equal(late.sigma(time), plain.sigma(time))
