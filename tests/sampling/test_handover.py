"""Stages that hand over a state, join from one, or are coupled with the small image."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rdm_jax.checkpoints import store
from rdm_jax.config import Config, to_dict, validate
from rdm_jax.data.image_sets import open_prepared
from rdm_jax.data.images import ImageSpec
from rdm_jax.data.prepare import prepare
from rdm_jax.diffusion import blurring
from rdm_jax.diffusion.blend import BlendHeun, BlendProcess
from rdm_jax.diffusion.coupling import CouplingHeun, CouplingProcess
from rdm_jax.diffusion.jump import JumpHeun
from rdm_jax.diffusion.pixels import Pixels
from rdm_jax.diffusion.processes import RelayProcess
from rdm_jax.diffusion.samplers import Heun
from rdm_jax.diffusion.schedules import Clock
from rdm_jax.sampling.pipeline import RelayPipeline
from rdm_jax.sampling.stage_functions import StageParams
from rdm_jax.sampling.stage_preview import StagePreview
from rdm_jax.sampling.stage_sampler import StageSampler
from tests.support.configs import tiny_config, write_images

BATCH = 8
SEEDS = np.arange(BATCH, dtype=np.uint32)
GIVEN = {"label": np.arange(BATCH, dtype=np.int32) % 2}
LOW = np.random.default_rng(1).uniform(-1, 1, (BATCH, 4, 4, 3)).astype(np.float32)


def jumping() -> Config:
    """Stage 1 stops where stage 2 joins."""
    process = RelayProcess(patch=2, clock=Clock(blur_sigma_max=2.6), block_scale=0.0)
    config = tiny_config("images").with_stage(1, sampler=Heun(steps=3, stop=0.7))
    config = config.with_stage(2, process=process, sampler=JumpHeun(steps=3, sigma_max=1.4))
    validate.check_config(config)
    return config


def coupled() -> Config:
    """Stage 2 is coupled with the small image."""
    parts = {"process": CouplingProcess(patch=2), "sampler": CouplingHeun(steps=3)}
    config = tiny_config("images").with_stage(2, **parts)
    validate.check_config(config)
    return config


def blended() -> Config:
    """Stage 2 continues from the small image by CogView3's relay."""
    parts = {"process": BlendProcess(patch=2), "sampler": BlendHeun(steps=3, eta=0.3)}
    config = tiny_config("images").with_stage(2, **parts)
    validate.check_config(config)
    return config


CASES = {"stopped": (jumping, 1), "jump": (jumping, 2), "coupling": (coupled, 2)}
CASES["blend"] = (blended, 2)


def parameters(stage):
    """Those of initialisation, nudged, as the last layer's are 0."""
    params = jax.jit(stage.build(3, 2).init)(jax.random.key(0))
    return jax.tree.map(
        lambda x: np.asarray(x) + 0.1 * np.sin(np.arange(x.size, dtype=x.dtype)).reshape(x.shape),
        params,
    )


@functools.cache
def make(case):
    """A sampler, and the arguments of a call."""
    config, number = CASES[case]
    stage = config().stage(number)
    sampler = StageSampler(
        stage, stage.build(3, 2), number=number, channels=3, classes=2, run_seed=0
    )
    return sampler, parameters(stage), LOW if number > 1 else None, GIVEN, SEEDS


@pytest.mark.second
@pytest.mark.parametrize("case", CASES)
def test_stage_sampler_scan_equals_loop(case, monkeypatch):
    loop, *args = make(case)
    looped = loop.sample(*args)
    monkeypatch.setattr(jax, "default_backend", lambda: "an accelerator")
    scanned = make.__wrapped__(case)[0].sample(*args)
    for one, other in zip(looped, scanned, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)
    assert np.all(looped.finite)


@pytest.mark.second
def test_stopped_stage_hands_over_its_state():
    """Not clipped, at its noise level; its image is the denoised state."""
    sampler, params, *args = make("stopped")
    made, (images, finite) = sampler.sample(params, *args), sampler(params, *args)
    np.testing.assert_array_equal(made.images, images)
    assert np.all(finite) and sampler.stops and np.abs(made.handed_over).max() > 1
    level = jax.tree.map(lambda a: a[-1], sampler.functions.levels)
    again = sampler._finish(StageParams(params), *args, made.handed_over, jnp.int32(2), level)
    np.testing.assert_allclose(jnp.clip(again, -1, 1), images, atol=1e-5)
    finished = make("coupling")[0].sample(*make("coupling")[1:])
    np.testing.assert_array_equal(finished.handed_over, finished.images)


def test_jump_continues_from_state_or_image():
    """An unfinished state has its noise; to a finished image the sampler adds it."""
    sampler, params, low, given, seeds = make("jump")
    first = jax.tree.map(lambda a: a[0], sampler.functions.levels)
    state, added = sampler._start(low, seeds, True), sampler._start(low, seeds, False)
    np.testing.assert_allclose(blurring.mean_pool(state, factor=2), low, atol=1e-6)
    noise = np.asarray(added - blurring.enlarge(low, factor=2))
    assert abs(noise.std() / first.sigma - 1) < 5 / (2 * noise.size) ** 0.5
    finished = sampler.sample(params, low, given, seeds).images
    unfinished = sampler.sample(params, low, given, seeds, unfinished=True).images
    assert np.abs(finished - unfinished).max() > 0.1


def test_coupling_is_conditioned_on_its_own_image():
    sampler, params, low, given, seeds = make("coupling")
    again = np.concatenate([low[:4], low[4:] + 0.1])
    one, other = (np.asarray(sampler(params, x, given, seeds)[0]) for x in (low, again))
    np.testing.assert_array_equal(one[:4], other[:4])
    assert (np.abs(one[4:] - other[4:]).max((1, 2, 3)) > 1e-3).all()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The config of a jump, and the workdir with its checkpoints."""
    config, folder = jumping(), tmp_path_factory.mktemp("run")
    for number in (1, 2):
        stage = config.stage(number)
        about = {"stage": to_dict(config)[f"stage{number}"], "classes": ["a", "b"], "seed": 0}
        checkpoints = store.Checkpoints(folder / f"stage{number}/checkpoints")
        checkpoints.save_ema(1, parameters(stage), about)
        checkpoints.close()
    return config, folder


@pytest.mark.second
def test_pipeline_hands_over_an_unfinished_state(run):
    small, images = RelayPipeline(*run).sample(SEEDS.astype(int))
    first, *args = make("stopped")
    stopped = first.sample(*args)
    # Another program, for several devices, may round to the next grey level.
    np.testing.assert_allclose(small.astype(int), Pixels().decode(stopped.images), atol=1)
    second, params, *_ = make("jump")
    made = second.sample(params, stopped.handed_over, GIVEN, SEEDS, unfinished=True)
    np.testing.assert_allclose(images.astype(int), Pixels().decode(made.images), atol=1)


@pytest.mark.second
def test_pipeline_jumps_from_small_images(run, tmp_path):
    """Finished ones, in a folder."""
    config, workdir = run
    write_images(tmp_path / "small", count=BATCH, size=4)
    sampling = dataclasses.replace(config.sampling, low=f"folder:{tmp_path / 'small'}")
    made = RelayPipeline(dataclasses.replace(config, sampling=sampling), workdir)
    small, images = made.sample(SEEDS.astype(int))
    second, params, *_ = make("jump")
    low, given = Pixels().encode(jnp.asarray(small)), {"label": made.labels(SEEDS.astype(int))}
    expected = second(params, low, given, SEEDS)[0]
    np.testing.assert_allclose(images.astype(int), Pixels().decode(expected), atol=1)


@pytest.mark.second
@pytest.mark.parametrize("number", [1, 2])
def test_preview_of_a_jump(number, tmp_path):
    """Stage 1 shows its denoised state; stage 2 begins with the means of real images."""
    write_images(tmp_path / "images")
    source = open_prepared(
        prepare(f"folder:{tmp_path / 'images'}", f"{tmp_path}/prepared", ImageSpec(8, 8))
    )
    preview = StagePreview(jumping(), number, source)
    preview._sampler = make(("stopped", "jump")[number - 1])[0]
    images, _ = preview.sample(make(("stopped", "jump")[number - 1])[1], SEEDS.astype(int))
    assert images.shape == (BATCH, 4 * number, 4 * number, 3) and images.std() > 1
