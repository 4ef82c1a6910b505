"""A stage as pure functions: what they return, compiled, mapped and differentiated."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rdm_jax.config import Stage
from rdm_jax.diffusion import blurring
from rdm_jax.diffusion.linear_path import LinearHeun, LinearProcess
from rdm_jax.diffusion.pixels import Pixels
from rdm_jax.diffusion.preconditioning import XPreconditioning
from rdm_jax.diffusion.samplers import Heun, RelayHeun
from rdm_jax.runtime.errors import InputError
from rdm_jax.sampling.pipeline import RelayPipeline
from rdm_jax.sampling.stage_functions import StageFunctions, StageParams
from tests.support.captioned_runs import write_run
from tests.support.configs import NETWORK, tiny_config

SEEDS = np.arange(8)


def config_of():
    """A guided stage and a relay stage, of few evaluations."""
    config = tiny_config("images").with_stage(1, sampler=Heun(steps=2, order=1), guidance=2.0)
    return config.with_stage(2, sampler=RelayHeun(steps=5, order=1))


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("functions") / "run"
    return RelayPipeline(config_of(), write_run(folder, config_of(), text=None))


@functools.cache
def unguided() -> tuple[StageFunctions, StageParams]:
    """Stage 1 without guidance, and parameters that matter."""
    stage = config_of().with_stage(1, guidance=1.0).stage(1)
    network = stage.build(3, 2)
    made = StageFunctions(stage, network, number=1, channels=3, classes=2, run_seed=0)
    leaves, tree = jax.tree.flatten(network.abstract)
    random = np.random.default_rng(0)
    params = [jnp.float32(0.2 * random.standard_normal(x.shape)) for x in leaves]
    return made, StageParams(tree.unflatten(params))


def states(count: int = 2) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((count, 4, 4, 3)).astype("f4")


@pytest.mark.second
def test_sample_equals_the_pipeline(pipe):
    """Its keys are those of the seeds; labels and the images of stage 1 are arguments."""
    expected = pipe.sample(SEEDS, labels="b")
    low = None
    for number, images in enumerate(expected, 1):
        stage, params = pipe.stage(number)
        condition = stage.condition(pipe.given(SEEDS, labels="b"))
        made = jax.jit(stage.sample)(params, stage.keys(SEEDS), condition, low)
        found = Pixels().decode(made.images)
        assert np.abs(np.asarray(found, int) - images).max() <= 1  # of 255: another program
        assert images.std() > 5 and np.all(made.finite)
        low = made.handed_over


def test_stage_that_is_not_loaded_is_refused(pipe):
    for number in (0, 3):
        with pytest.raises(InputError, match=f"stage {number} is not loaded. Use 1 to 2"):
            pipe.stage(number)


def test_denoise_follows_guidance():
    stage, params = unguided()
    guided = StageFunctions(
        config_of().stage(1), stage.config.build(3, 2), number=1, channels=3, classes=2, run_seed=0
    )
    condition = stage.condition({"label": jnp.asarray([0, 1])})
    x, sigma = jnp.asarray(states()), jnp.asarray([0.3, 2.0])
    one, none, both = (
        jax.jit(functions.denoise)(params, x, sigma, given)
        for functions, given in (
            (stage, condition),
            (stage, stage.null(condition)),
            (guided, condition),
        )
    )
    np.testing.assert_allclose(both, 2 * one - none, atol=1e-4)
    assert np.abs(one - none).max() > 1e-2


def test_denoise_is_differentiable():
    """Against central differences; a row depends on no other."""
    stage, params = unguided()
    condition = stage.condition({"label": jnp.asarray([0, 1])})
    denoise = jax.jit(lambda x: stage.denoise(params, x, 0.5, condition))
    x, direction = jnp.asarray(states()), jnp.asarray(states()[::-1])
    _, slope = jax.jvp(denoise, (x,), (direction,))
    step = 1e-2
    difference = (denoise(x + step * direction) - denoise(x - step * direction)) / (2 * step)
    np.testing.assert_allclose(slope, difference, atol=2e-3 * float(jnp.abs(slope).max()))
    gradient = jax.grad(lambda x: denoise(x)[0].sum())(x)
    assert np.abs(gradient[0]).max() > 0.1 and np.all(gradient[1] == 0)


def test_denoise_is_mapped_over_parameters():
    stage, params = unguided()
    condition = stage.condition({"label": jnp.asarray([0, 1])})
    half = jax.tree.map(lambda leaf: leaf / 2, params)
    several = jax.tree.map(lambda *leaves: jnp.stack(leaves), params, half)
    denoise = functools.partial(
        stage.denoise, x=jnp.asarray(states()), sigma=0.5, condition=condition
    )
    mapped = jax.jit(jax.vmap(denoise))(several)
    for found, each in zip(mapped, (params, half), strict=True):
        np.testing.assert_allclose(found, jax.jit(denoise)(each), atol=1e-4)


@pytest.mark.second
def test_sample_is_differentiable(pipe):
    """With respect to the small images and the parameters."""
    stage, params = pipe.stage(2)
    keys, condition = stage.keys(SEEDS), stage.condition(pipe.given(SEEDS))
    low = jnp.asarray(0.1 * states(8))

    def mean(params, low):
        return stage.sample(params, keys, condition, low).images.mean()

    gradients = jax.jit(jax.grad(mean, argnums=(0, 1)))(params, low)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradients[1]))


def test_noised_state_is_where_sampling_begins(pipe):
    """Patches without detail are not changed by the blur."""
    stage, _ = pipe.stage(2)
    low, noise = jnp.asarray(0.3 * states(8)), stage.noise(stage.keys(SEEDS))
    flat = blurring.enlarge(low, factor=2)
    state = stage.noised(flat, stage.level(0), noise(0))
    np.testing.assert_allclose(state, stage.start(low, noise), atol=1e-5)
    detailed = flat.at[:, ::2].add(0.5)
    less = stage.noised(detailed, stage.level(0), noise(0)) - state
    assert less.std() < 0.9 * (detailed - flat).std() and less.mean() > 0.2
    stage, _ = unguided()
    found = stage.noised(low[:2], stage.level(-1), noise(1)[:2, :4, :4])
    sigma = stage.levels.sigma[-1]
    np.testing.assert_allclose(found, low[:2] + sigma * noise(1)[:2, :4, :4], atol=1e-6)


def test_noised_state_of_a_sampler_in_time():
    config = Stage(
        (4, 4),
        NETWORK,
        precondition=XPreconditioning(),
        process=LinearProcess(),
        sampler=LinearHeun(steps=4),
    )
    network = config.build(3, 0)
    stage = StageFunctions(config, network, number=1, channels=3, classes=0, run_seed=0)
    x, noise = jnp.asarray(states()), jnp.asarray(states()[::-1])
    time = stage.level(2).time
    expected = time * x + (1 - time) * config.process.path.noise_scale * noise
    np.testing.assert_allclose(stage.noised(x, stage.level(2), noise), expected, atol=1e-6)
