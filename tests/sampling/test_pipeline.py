"""Sampling: an image depends on its seed only, however and wherever it is computed."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rdm_jax.checkpoints import store
from rdm_jax.config import to_dict
from rdm_jax.data.classes import Classes
from rdm_jax.data.image_sets import open_prepared
from rdm_jax.data.images import ImageSpec
from rdm_jax.data.prepare import prepare
from rdm_jax.diffusion.pixels import Pixels
from rdm_jax.diffusion.processes import CascadeProcess
from rdm_jax.diffusion.samplers import CascadeHeun
from rdm_jax.interop import latent_space
from rdm_jax.loading import load
from rdm_jax.models.conditions import Nothing
from rdm_jax.runtime import sharding
from rdm_jax.runtime.errors import InputError
from rdm_jax.sampling import checkpoint_checks, pipeline, stage_functions, stage_sampler
from rdm_jax.sampling.stage_preview import StagePreview
from rdm_jax.workdir import Workdir
from tests.support.configs import tiny_config, write_images

BATCH = 8
SECOND = pytest.mark.second
AB, TWO = Classes(("a", "b")), Classes(("0", "1"), by_number=True)
NUMBER = {"gaussian": 1, "relay": 2, "cascade": 2}  # of a stage of that process
every_kind = pytest.mark.parametrize(
    "kind", [kind if kind == "relay" else pytest.param(kind, marks=SECOND) for kind in NUMBER]
)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "images"
    write_images(folder)
    return open_prepared(prepare(f"folder:{folder}", f"{folder}_prepared", ImageSpec(8, 8)))


@functools.cache
def stage_and_params(kind: str):
    """A guided stage and parameters that are no longer the zero output of initialisation."""
    stage = dataclasses.replace(tiny_config("images").stages[NUMBER[kind] - 1], guidance=2.0)
    if kind == "cascade":
        stage = dataclasses.replace(
            stage, process=CascadeProcess(patch=2), sampler=CascadeHeun(steps=3)
        )
    network = stage.build(3, 2)
    params = jax.jit(network.init)(jax.random.key(0))

    def nudge(x):
        return np.asarray(x) + 0.1 * np.sin(np.arange(x.size, dtype=x.dtype)).reshape(x.shape)

    return stage, network, jax.tree.map(nudge, params)


@functools.cache  # what is compiled for one test is there for the next
def make(kind: str):
    stage, network, params = stage_and_params(kind)
    sample = stage_sampler.StageSampler(
        stage, network, number=NUMBER[kind], channels=3, classes=2, run_seed=0
    )
    low = (
        np.random.default_rng(1).uniform(-1, 1, (BATCH, 4, 4, 3)).astype(np.float32)
        if NUMBER[kind] > 1
        else None
    )
    return (
        sample,
        params,
        low,
        {"label": jnp.arange(BATCH, dtype=jnp.int32) % 2},
        jnp.arange(BATCH, dtype=jnp.uint32),
    )


def rows(given, chosen):
    return {name: values[chosen] for name, values in given.items()}


def images_of(kind, *args):
    """What a compiled stage makes, all of it finite."""
    images, finite = make(kind)[0](*args)
    assert np.all(finite)
    return images


@every_kind
def test_image_depends_on_its_seed_only(kind):
    _, params, low, given, seeds = make(kind)
    sample = functools.partial(images_of, kind)
    whole = sample(params, low, given, seeds)
    order = np.array([3, 7, 0, 3, 1, 1, 5, 2])
    mixed = sample(params, None if low is None else low[order], rows(given, order), seeds[order])
    np.testing.assert_array_equal(mixed, whole[order])  # the same program: equal to the last bit
    alone = sample(params, None if low is None else low[3:4], rows(given, slice(3, 4)), seeds[3:4])
    np.testing.assert_allclose(
        alone[0], whole[3], atol=1e-4
    )  # another program: equal up to the order of float32 sums
    assert np.abs(whole[0] - whole[2]).max() > 0.1 and np.abs(whole).max() <= 1


def test_stage_sampler_ignores_the_default_prng():
    sample, *args = make("relay")
    with jax.default_prng_impl("rbg"):
        again, *_ = make.__wrapped__("relay")
        np.testing.assert_array_equal(again(*args)[0], sample(*args)[0])


@every_kind
def test_stage_sampler_scan_equals_loop(kind, monkeypatch):
    loop, *args = make(kind)
    monkeypatch.setattr(jax, "default_backend", lambda: "an accelerator")
    scan = make.__wrapped__(kind)[0]
    (looped, finite), (scanned, still_finite) = loop(*args), scan(*args)
    np.testing.assert_allclose(scanned, looped, atol=1e-4)
    assert np.all(finite) and np.all(still_finite)


@pytest.mark.second
@every_kind
def test_stage_sampler_on_several_devices(kind):
    """Each makes its images by itself: nothing is sent from one to another."""
    sample, params, low, given, seeds = make(kind)
    mesh = sharding.local_mesh()
    shared = sharding.put_batch(jax.device_get((low, given, seeds)), mesh)
    spread = jax.device_put(params, sharding.replicated(mesh))
    there, finite = sample(spread, *shared)
    assert len(there.sharding.device_set) == len(finite.sharding.device_set) == 8
    np.testing.assert_allclose(there, sample(params, low, given, seeds)[0], atol=1e-4)
    assert sharding.collectives(jax.jit(sample).lower(spread, *shared).compile()) == {}


@pytest.mark.second
def test_cascade_is_conditioned_on_its_own_image():
    _, params, low, given, seeds = make("cascade")
    low_again = np.concatenate([low[:4], low[4:] + 0.1])
    one, other = (
        np.asarray(images_of("cascade", params, images, given, seeds))
        for images in (low, low_again)
    )
    np.testing.assert_array_equal(one[:4], other[:4])
    assert (np.abs(one[4:] - other[4:]).max((1, 2, 3)) > 1e-3).all()


@pytest.mark.second
def test_noise_depends_on_run_seed_and_stage():
    stage, network, params = stage_and_params("gaussian")
    stage, two = dataclasses.replace(stage, guidance=1.0), {"label": jnp.zeros(2, jnp.int32)}
    outputs = []
    for run_seed, number in ((0, 1), (1, 1), (0, 2)):
        sample = stage_sampler.StageSampler(
            stage, network, number=number, channels=3, classes=2, run_seed=run_seed
        )
        outputs.append(np.asarray(sample(params, None, two, jnp.arange(2, dtype=jnp.uint32))[0]))
    assert (
        np.abs(outputs[0] - outputs[1]).max() > 0.1 and np.abs(outputs[0] - outputs[2]).max() > 0.1
    )


class LoadedRelay(pipeline.RelayPipeline):
    """A pipeline of two stages that reads no checkpoint."""

    def __init__(self, **sampling):
        config = tiny_config("images")
        self.config = dataclasses.replace(
            config, sampling=dataclasses.replace(config.sampling, **sampling)
        )
        self.low, self.first, self.earlier = None, 1, ("stage1",)
        self.classes, self.mesh = Classes(("a", "b")), sharding.local_mesh()
        replicated = sharding.replicated(self.mesh)
        stages = [make(kind) for kind in ("gaussian", "relay")]
        self._stages = [(stage[0], jax.device_put(stage[1], replicated)) for stage in stages]
        self._decoded = latent_space.decoder(None, None)


@functools.cache
def batch_by_batch():
    """The images of 19 seeds, a batch at a time."""
    made, seeds = LoadedRelay(), np.arange(19)[::-1]
    batches = [made.sample(seeds[first : first + BATCH]) for first in range(0, 19, BATCH)]
    return seeds, [np.concatenate(stage) for stage in zip(*batches, strict=True)]


def test_pipeline_samples_seeds_in_order():
    made, (seeds, wanted) = LoadedRelay(), batch_by_batch()
    for images in (made.sample(seeds), made.finish(made.begin(seeds))):
        assert [stage.shape for stage in images] == [(19, 4, 4, 3), (19, 8, 8, 3)]
        for stage, same in zip(images, wanted, strict=True):
            np.testing.assert_array_equal(stage, same)
    assert len({image.tobytes() for image in wanted[1]}) == 19


@pytest.mark.parametrize("postprocess", ["none", "rdm_imagenet"])
def test_pipeline_without_seeds(postprocess):
    made = LoadedRelay(postprocess=postprocess)
    for images in (made.sample(np.arange(0)), made.finish(made.begin(np.arange(0)))):
        assert [(stage.shape, stage.dtype) for stage in images] == [
            ((0, 4, 4, 3), np.uint8),
            ((0, 8, 8, 3), np.uint8),
        ]


@every_kind
def test_stage_sampler_reports_infinite_images(kind):
    """A network that answers with an infinity at the last level, so that the last denoised image is
    one, and no NaN."""
    stage, network, params = stage_and_params(kind)
    stage = dataclasses.replace(
        stage, guidance=1.0, sampler=dataclasses.replace(stage.sampler, order=1)
    )
    last = stage.precondition(stage_functions.stage_levels(stage).sigma[-1:]).c_noise

    def answer(value, x, c_noise, labels):
        there = (c_noise < last + 1e-3) & (jnp.arange(len(x)) > 0)  # the first image stays finite
        return jnp.broadcast_to(
            jnp.where(there, value, 0.0)[:, None, None, None], (*x.shape[:3], 3)
        )

    network = network._replace(apply=answer)
    sample = stage_sampler.StageSampler(
        stage, network, number=NUMBER[kind], channels=3, classes=2, run_seed=0
    )
    _, _, low, given, seeds = make(kind)
    images, finite = sample(jnp.float32(jnp.inf), low, given, seeds)
    np.testing.assert_array_equal(finite, np.arange(BATCH) == 0)
    np.testing.assert_array_equal(
        images[1:], np.ones_like(images[1:])
    )  # as an image they would be white
    _, finite = sample(jnp.float32(0.5), low, given, seeds)
    assert np.all(finite)


class Infinite:
    """The same sampler, whose images of these numbers were not finite."""

    stops = False

    def __init__(self, sampler, *which):
        self._sampler, self._finite = sampler, ~jnp.isin(jnp.arange(BATCH), jnp.asarray(which))

    def sample(self, *args, **options):
        return self._sampler.sample(*args, **options)._replace(finite=self._finite)

    def __call__(self, *args):
        return self._sampler(*args)[0], self._finite


@pytest.mark.parametrize("stage", [0, 1])
def test_pipeline_refuses_infinite_images(stage):
    made = LoadedRelay()
    made._stages[stage] = (Infinite(made._stages[stage][0], 2), made._stages[stage][1])
    with pytest.raises(InputError, match="not finite numbers"):
        made.sample(np.arange(11))


@pytest.mark.parametrize("number", [1, pytest.param(2, marks=pytest.mark.second)])
def test_stage_preview_samples_any_number_of_seeds(source, number):
    kind, alone = (
        ("gaussian", "relay")[number - 1],
        StagePreview(tiny_config("images"), number, source),
    )
    sample, params, *_ = make(kind)
    alone._sampler, seeds = sample, np.arange(19)[::-1]
    params = jax.device_put(params, sharding.replicated(sharding.local_mesh()))
    images, labels = alone.sample(params, seeds)
    assert images.shape == (19, 4 * number, 4 * number, 3) and labels.shape == (19,)
    batches = [alone.sample(params, seeds[first : first + BATCH]) for first in range(0, 19, BATCH)]
    for whole, batched in zip((images, labels), zip(*batches, strict=True), strict=True):
        np.testing.assert_array_equal(whole, np.concatenate(batched))
    assert len({image.tobytes() for image in images}) == 19
    assert [array.shape for array in alone.sample(params, seeds[:0])] == [
        (0, *images.shape[1:]),
        (0,),
    ]
    alone._sampler = Infinite(sample, 1)
    black = alone.sample(params, seeds)[0]
    np.testing.assert_array_equal(np.flatnonzero((black == 0).all((1, 2, 3))), [1, 9, 17])
    np.testing.assert_array_equal(np.delete(black, [1, 9, 17], 0), np.delete(images, [1, 9, 17], 0))


@pytest.mark.parametrize(
    ("known", "common"),
    [
        ([AB, AB], AB),
        ([TWO, AB], AB),
        ([AB, TWO], AB),
        ([TWO], TWO),
        ([TWO, TWO], TWO),
        ([Classes(), Classes()], Classes()),
        ([AB, Classes(("b", "a"))], None),
        ([AB, Classes(("0", "1"))], None),  # these are names
        ([TWO, Classes(("1", "0"))], None),
        ([TWO, Classes(("a", "b", "c"))], None),
        ([Classes(("a",)), Classes()], None),
        ([Classes(), Classes(("0",))], None),
    ],
)
def test_common_classes(known, common):
    config = tiny_config("images")
    if common is None:
        with pytest.raises(
            InputError,
            match="stage2.checkpoint='newest' knows the classes|stage1.checkpoint='newest' knows",
        ):
            checkpoint_checks.common_classes(config, known, 1)
    else:
        assert checkpoint_checks.common_classes(config, known, 1) == common


def test_to_uint8_inverts_the_scaling_of_training():
    every = jnp.arange(256, dtype=jnp.uint8).reshape(1, 16, 16, 1)
    np.testing.assert_array_equal(Pixels().decode(Pixels().encode(every, 1)), every)
    assert Pixels().decode(jnp.full((1, 1, 1, 1), 1.5)).item() == 255


def test_guidance_needs_label_dropout(tmp_path):
    """The checkpoint says how it was trained, not the config; imported weights do not say."""
    config = tiny_config("images")
    guided = dataclasses.replace(
        config, stages=(dataclasses.replace(config.stages[0], guidance=4.0), *config.stages[1:])
    )
    about = json.loads(
        json.dumps({"stage": to_dict(config)["stage1"], "classes": ["a", "b"], "seed": 0})
    )
    about["stage"]["training"]["label_dropout"] = 0.0
    checkpoints = store.Checkpoints(tmp_path / "stage1/checkpoints")
    checkpoints.save_ema(1, stage_and_params("gaussian")[2], about)
    checkpoints.close()
    with pytest.raises(
        InputError,
        match=r"stage1.guidance=4.0.*stage1/checkpoints/1 was trained with .*label_dropout=0.0",
    ):
        pipeline.RelayPipeline(guided, tmp_path)
    with pytest.raises(
        InputError, match="there is no checkpoint in .*stage2"
    ):  # the first stage is fine
        pipeline.RelayPipeline(config, tmp_path)
    checkpoint_checks.check_guidance(guided, 1, tmp_path, {**about, "imported": {}})


def test_pipeline_refuses_another_condition(tmp_path):
    """Its arrays might have the same shapes."""
    config = tiny_config("images")
    about = {"stage": to_dict(config)["stage1"], "classes": ["a", "b"], "seed": 0}
    checkpoints = store.Checkpoints(tmp_path / "stage1/checkpoints")
    checkpoints.save_ema(1, stage_and_params("gaussian")[2], about)
    checkpoints.close()
    changed = config.with_stage(1, condition=Nothing())
    with pytest.raises(InputError, match="stage1.condition.kind='nothing', but .* Use 'classl"):
        pipeline.RelayPipeline(changed, tmp_path)


def test_samples_of_unconditional_stages_have_no_classes(source, tmp_path):
    """Whatever the classes of the data are."""
    config = tiny_config("images")
    for number in (1, 2):
        config = config.with_stage(number, condition=Nothing())
        params = jax.tree.map(
            lambda x: jnp.zeros(x.shape), config.stage(number).build(3, 2).abstract
        )
        about = {"stage": to_dict(config)[f"stage{number}"], "classes": ["a", "b"], "seed": 0}
        checkpoints = store.Checkpoints(tmp_path / f"stage{number}/checkpoints")
        checkpoints.save_ema(1, params, about)
        checkpoints.close()
    seeds = np.arange(4)
    made = pipeline.RelayPipeline(config, tmp_path)
    assert len(made.classes) == 0 and made.labels(seeds).tolist() == [-1] * 4
    alone = StagePreview(config, 1, source)
    shape = (config.sampling.batch_size, 4, 4, 3)
    alone._sampler = lambda *_: (jnp.zeros(shape), jnp.ones(shape[0], bool))
    assert alone.sample(None, seeds)[1].tolist() == [-1] * 4


def test_load_takes_a_run_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run").mkdir()
    Workdir(tmp_path / "run").write_config(tiny_config("images"))
    with pytest.raises(InputError, match=f"no checkpoint in {tmp_path}/run/stage1/checkpoints"):
        load("~/run")


def test_load_refuses_what_is_no_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="source='digits' does not exist"):
        load("digits")  # a packaged config
