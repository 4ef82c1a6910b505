"""CogView3's blend on Gaussian targets, and against its published step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rdm_jax.config import Config, Stage, validate
from rdm_jax.diffusion import blurring, preconditioning
from rdm_jax.diffusion.blend import BlendHeun, BlendProcess
from rdm_jax.diffusion.processes import RelayProcess
from rdm_jax.diffusion.samplers import Heun, RelayHeun
from rdm_jax.diffusion.walks import walk
from rdm_jax.runtime.errors import InputError
from tests.support import gaussian_targets
from tests.support.arrays import images
from tests.support.gaussian_targets import PIXELS, SHAPE, falls, flow, is_mean, patch_dct_matrix

PROCESS = BlendProcess(patch=2)


@dataclasses.dataclass(frozen=True, eq=False)
class Target(gaussian_targets.Target):
    """A Gaussian target seen through the blend."""

    def blur(self, sigma):
        basis = patch_dct_matrix(self.process.patch)
        weights = self.process.blur_weights(self.process.share(jnp.asarray(sigma)))
        return basis.T @ (gaussian_targets.tile(weights)[:, None] * basis)


def target(variance=None, process=PROCESS):
    random, basis = np.random.default_rng(0), patch_dct_matrix(process.patch)
    variance = random.uniform(0.05, 0.5, PIXELS) if variance is None else np.full(PIXELS, variance)
    mean = 0.3 * random.standard_normal(PIXELS)
    return Target(mean, (basis.T * variance) @ basis, np.eye(PIXELS), process)


def levels_of_all(sampler, finest):
    """The levels from s = 1 to 1 / 4, for any number of steps that 4 divides."""
    process, count = PROCESS, 3 * finest // 4 + 1
    levels = sampler.levels(process)
    return jax.tree.map(lambda a: np.asarray(a[:count]), levels)


@pytest.mark.parametrize(("order", "fall"), [(1, 2.0), (2, 4.0)])
def test_blend_order(x64, order, fall):
    """The flow's error, in patch means and in detail."""
    exact, basis = target(), patch_dct_matrix(2)
    x = jnp.asarray(np.random.default_rng(1).standard_normal(SHAPE))
    sampler = BlendHeun(order=order)
    step = jax.jit(
        lambda x, i, level, to: sampler.step(
            exact.denoise, x, i, level, to, lambda k: jnp.zeros(SHAPE)
        )
    )
    errors = []
    for n in (128, 256):
        levels = levels_of_all(BlendHeun(n), n)
        assert levels.sigma[-1] == pytest.approx(float(PROCESS.sigma_at(jnp.asarray(0.25))))
        out = np.asarray(walk(step, lambda x, i, level: x, x, levels))
        errors.append(np.abs(basis @ (out.ravel() - flow(exact, basis, x, levels.sigma))))
    for which in (is_mean(2), ~is_mean(2)):
        ratio = falls([error[which].max() for error in errors])
        np.testing.assert_allclose(ratio, fall, rtol=0.05)


class Part(BlendHeun):
    """The levels from s = 1 to 1 / 4."""

    def levels(self, process):
        return levels_of_all(BlendHeun(self.steps), self.steps)


@pytest.mark.parametrize(("eta", "order"), [(0.0, 2), (0.3, 1), (0.3, 2)])
def test_blend_marginals_converge(x64, eta, order):
    """With the exact posterior mean; `eta` holds for 64 steps, so that the limit is an SDE."""
    errors = [
        gaussian_targets.marginal_error(Part(n, eta * (64 / n) ** 0.5, order), target())
        for n in (64, 128)
    ]
    assert errors[1] < errors[0] / 1.8 and errors[1] < 0.05, errors


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_blend_marginals_of_single_image_are_exact(x64, eta):
    """If the image is known, the first-order update samples the process itself."""
    assert gaussian_targets.marginal_error(Part(8, eta, 1), target(variance=0.0)) < 1e-10


def published(denoise, low, noises, sigma, delta, steps):
    """The published recursion, with z^0 carried along from the enlarged small image."""
    z0 = blurring.enlarge(low, factor=2)
    z = z0 + sigma[-1] * noises[0]
    for t in range(steps, 0, -1):
        image = denoise(z, sigma[t])
        a = np.sqrt(sigma[t - 1] ** 2 - delta[t - 1] ** 2) / sigma[t]
        z = a * z + image / t + ((t - 1) / t - a) * z0 + delta[t - 1] * noises[steps + 1 - t]
        z0 = z0 + (image - z0) / t
    return z


def ours(sampler, denoise, low, noises):
    """Noises 0, 1, 2, ... are those of the start and of each step."""
    levels = sampler.levels(PROCESS)

    def noise(k):
        return jnp.stack(noises)[(k + 1) // 2]  # a step's first noise is 2 i + 1

    def finish(x, i, level):
        return sampler.finish(denoise, x, i, level, noise)

    def step(x, i, level, to):
        return sampler.step(denoise, x, i, level, to, noise)

    first = jax.tree.map(lambda a: a[0], levels)
    return walk(step, finish, sampler.start(low, first, noise), levels)


@pytest.mark.parametrize("eta", [0.0, 0.4])
def test_blend_is_the_published_step_for_a_known_image(x64, eta):
    """Both take z^0 from the same image then, at every step."""
    steps, x = 6, jnp.asarray(images(SHAPE))
    low, noises = blurring.mean_pool(x, factor=2), [jnp.asarray(images(SHAPE, k)) for k in range(7)]
    sigma = np.asarray(PROCESS.sigma_at(jnp.arange(steps + 1) / steps))
    states = [[], []]

    def known(seen):
        def denoise(z, sigma):
            seen.append(z)
            return x

        return denoise

    published(known(states[0]), low, noises, sigma, eta * sigma, steps)
    ours(BlendHeun(steps, eta, 1), known(states[1]), low, noises)
    for one, other in zip(*states, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-10)


def test_blend_is_the_published_flow_for_sigma_proportional_to_time(x64, monkeypatch):
    """For any denoiser, as z^0 then has no weight."""
    monkeypatch.setattr(BlendProcess, "sigma_at", lambda self, s: 1.5 * s)
    steps, low = 6, jnp.asarray(images((1, 2, 2, 1)))
    noises = [jnp.asarray(images(SHAPE, k)) for k in range(7)]

    def denoise(z, sigma):
        return jnp.tanh(z + 0.3 * jnp.roll(z, 1, 2)) / (1 + sigma)

    sigma = 1.5 * np.arange(steps + 1) / steps
    one = published(denoise, low, noises, sigma, 0 * sigma, steps)
    np.testing.assert_allclose(
        ours(BlendHeun(steps, 0.0, 1), denoise, low, noises), one, atol=1e-10
    )


@pytest.mark.parametrize("variance", [0.05, 0.25])
def test_blend_keeps_the_marginals_where_the_carried_mixture_does_not(x64, variance):
    """Detail of this variance, whose denoiser is linear: the end is a multiple of the noise."""
    steps = 1000
    s = np.arange(steps + 1) / steps
    sigma = np.asarray(PROCESS.sigma_at(jnp.asarray(s)))
    ours, theirs, z0 = sigma[-1], sigma[-1], 0.0
    for t in range(steps, 0, -1):
        gain = (1 - s[t]) * variance / ((1 - s[t]) ** 2 * variance + sigma[t] ** 2)
        a = sigma[t - 1] / sigma[t]
        ours = a * ours + (1 - s[t - 1] - a * (1 - s[t])) * gain * ours
        image = gain * theirs
        theirs, z0 = a * theirs + image / t + ((t - 1) / t - a) * z0, z0 + (image - z0) / t
    assert abs(ours**2 / variance - 1) < 0.01 and theirs**2 / variance > 1.1


def test_blend_mixes_linearly():
    process = BlendProcess(patch=2, end=0.4)
    x, noise = images((3, 4, 6, 2)), images((3, 4, 6, 2), seed=1)
    level = jnp.asarray([0.0, 0.5, 1.0])
    noised = process.noised(jnp.asarray(x), level, jnp.asarray(noise))
    s = np.reshape(process.epsilon + (1 - process.epsilon) * np.asarray(level), (3, 1, 1, 1))
    means = blurring.enlarge(blurring.mean_pool(x, factor=2), factor=2)
    sigma = np.sqrt(np.expm1(19.9 * (0.4 * s) ** 2 / 2 + 0.1 * 0.4 * s))
    np.testing.assert_allclose(noised.sigma, sigma.ravel(), rtol=1e-5)
    np.testing.assert_allclose(
        noised.images, (1 - s) * x + s * means + sigma * noise, rtol=1e-4, atol=1e-5
    )
    np.testing.assert_array_equal(noised.weight, 1)
    np.testing.assert_allclose(process.share(noised.sigma), s.ravel(), rtol=1e-4)


def test_blend_starts_where_its_training_ends():
    x, noise = images((2, 4, 6, 3)), images((2, 4, 6, 3), seed=1)
    level = jax.tree.map(lambda a: a[0], BlendHeun().levels(PROCESS))
    noised = PROCESS.noised(jnp.asarray(x), jnp.ones(2), jnp.asarray(noise))
    start = BlendHeun().start(blurring.mean_pool(x, factor=2), level, lambda k: noise)
    np.testing.assert_allclose(start, noised.images, atol=1e-4)
    text = BlendHeun().handover(PROCESS)
    assert text.startswith("starts at sigma 3.413, where 0.0% of a patch's detail is left")


def test_blend_has_its_own_sampler():
    assert BlendHeun().walks(PROCESS) and not BlendHeun().walks(RelayProcess())
    assert not RelayHeun().walks(PROCESS) and not Heun().walks(PROCESS)
    assert Stage(process=PROCESS, sampler=BlendHeun(8)).nfe == 15
    assert Stage(process=PROCESS, sampler=BlendHeun(8, order=1)).nfe == 8


@pytest.mark.parametrize(
    ("settings", "pattern"),
    [
        ({"sampler": RelayHeun()}, "stage2.sampler.kind='relayheun'.*Use 'blendheun'"),
        ({"process": BlendProcess(end=2.0)}, "stage2.process.end=2.0.*from 0.01 to 1"),
        ({"precondition": "vp", "sampler": BlendHeun(steps=10**6)}, "steps=1000000 ends at sigma"),
        ({"sampler": BlendHeun(5000)}, "ends at s = 0.0002, below .*=0.001.* Use 1000 steps or"),
        ({"precondition": "ve"}, "process.end=1.0 begins at sigma"),
    ],
)
def test_blend_refusals(settings, pattern):
    known = {
        "vp": preconditioning.VPPreconditioning(),
        "ve": preconditioning.VEPreconditioning(sigma_max=1.0),
    }
    if "precondition" in settings:
        settings = settings | {"precondition": known[settings["precondition"]]}
    parts = {"process": BlendProcess(end=1.0), "sampler": BlendHeun()} | settings
    config = Config(stages=(Stage(), Stage(resolution=(256, 256), **parts)))
    with pytest.raises(InputError, match=pattern):
        validate.check_config(config)
