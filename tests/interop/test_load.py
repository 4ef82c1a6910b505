"""`rdm_jax.load` of published files: the stages that they are, without a workdir of one's own."""

import dataclasses

import jax
import numpy as np
import pytest

import rdm_jax
from rdm_jax import loading
from rdm_jax.interop import import_stage, pytorch_names
from rdm_jax.runtime import mounts
from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.locks import InUse
from rdm_jax.sampling.pipeline import RelayPipeline
from tests.support.jit_stages import config_with
from tests.support.published_files import write_pth


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def assert_parameters(pipe: RelayPipeline, number: int, tensors) -> None:
    """They are those of the file, to the bit."""
    stage, params = pipe.stage(number)
    size = stage.config.resolution[0]
    for keys, leaf in jax.tree_util.tree_flatten_with_path(params.network)[0]:
        path = tuple(key.key for key in keys)
        name = pytorch_names.original_name(path, stage.config.network, size)
        expected = pytorch_names.to_ours(tensors[name]).astype(np.float32)
        np.testing.assert_array_equal(leaf, expected, err_msg=name)


def test_load_of_a_file_is_its_stage_alone(imported, monkeypatch):
    folder, config, tensors = imported
    pipe = rdm_jax.load(folder / "one.pkl", config=config, stage1={"sampler": {"steps": 3}})
    assert len(pipe.config.stages) == 1 and pipe.config.stage(1).sampler.steps == 3
    assert pipe.checkpoints[0]["imported"]["file"] == "one.pkl"
    assert_parameters(pipe, 1, tensors[0])
    monkeypatch.setattr(loading, "import_stage", None)  # it is not imported again
    assert rdm_jax.load(folder / "one.pkl", config=config).config.stage(1) == config.stage(1)


def test_load_of_two_files_is_their_relay(imported):
    folder, config, tensors = imported
    pipe = rdm_jax.load({2: folder / "two.pt", 1: folder / "one.pkl"}, config=config)
    assert pipe.config == config and pipe.earlier == ("stage1",)
    for number in (1, 2):
        assert_parameters(pipe, number, tensors[number - 1])


def test_later_stage_alone_needs_small_images(imported):
    folder, config, tensors = imported
    pipe = rdm_jax.load({2: folder / "two.pt"}, config=config)
    assert_parameters(pipe, 2, tensors[1])
    with pytest.raises(InputError, match=r"stage 1 is not loaded.* Give small, images of 4 x 4"):
        pipe.sample(range(2))
    with pytest.raises(InputError, match="stage 1 is not loaded. Use 2 to 2"):
        pipe.stage(1)


@pytest.mark.second
def test_later_stage_alone_samples_from_small_images(imported):
    folder, config, _ = imported
    changes = {"stage2": {"sampler": {"order": 1}, "guidance": 1.0}}
    pipe = rdm_jax.load({2: folder / "two.pt"}, config=config, **changes)
    given = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), np.uint8)
    small, images = pipe.sample(range(3), small=given, labels=[0, 2])
    np.testing.assert_array_equal(small, given[[0, 1, 0]])
    assert images.shape == (3, 8, 8, 3) and images.std() > 5


def test_load_selects_a_network_by_its_key(small, tmp_path):
    write_pth(tmp_path / "jit.pth", *small)
    loaded = rdm_jax.load(tmp_path / "jit.pth", config=config_with(), weights_key="model_ema1")
    assert loaded.config.stage(1).network.hidden == 16 and len(loaded.classes) == 3
    with pytest.raises(InputError, match="model_ema3"):
        rdm_jax.load(tmp_path / "jit.pth", config=config_with(), weights_key="model_ema3")


def test_load_refuses_what_does_not_fit(imported, tmp_path):
    folder, config, _ = imported
    one = folder / "one.pkl"
    for source, given, message in (
        (one, {}, r"one.pkl.* are weights, without a config. Pass config='imagenet'"),
        ({1: one, 3: one}, {"config": config}, r"the stages \[1, 3\]. Give stages from 1"),
        ({0: one}, {"config": config}, r"the stages \[0\]"),
        ({}, {"config": config}, r"the stages \[\]"),
        ({3: one}, {"config": config}, "weights of stage 3, and the config 2"),
        ({1: tmp_path / "none.pkl"}, {"config": config}, "none.pkl is not a file"),
        (tmp_path, {"config": config}, "config and weights_key do not go with"),
        (tmp_path, {"weights_key": "ema"}, "config and weights_key do not go with"),
        (tmp_path, {}, "source='.*' has no config.json"),
        (tmp_path / "none.pkl", {}, "none.pkl' does not exist"),
        (tmp_path / "none.pkl", {"config": config}, "none.pkl' does not exist"),
        ("gs://bucket/one.pkl", {"config": config}, "gs:// is not supported here"),
    ):
        with pytest.raises(InputError, match=message):
            rdm_jax.load(source, **given)


@pytest.mark.second
def test_load_repeats_an_interrupted_import(imported, monkeypatch):
    folder, config, tensors = imported
    config = dataclasses.replace(config, seed=1)

    def interrupted(weights, fitting, number, *rest):
        (rest[-1] / f"stage{number}/checkpoints/1.orbax-checkpoint-tmp").mkdir(parents=True)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(import_stage, "save_imported", interrupted)
        rdm_jax.load(folder / "one.pkl", config=config)
    assert_parameters(rdm_jax.load(folder / "one.pkl", config=config), 1, tensors[0])


def test_load_waits_for_another_process_that_imports_the_same(imported, monkeypatch):
    folder, config, tensors = imported
    config, real, calls = dataclasses.replace(config, seed=2), loading.import_stage, []

    def busy_at_first(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            raise InputError("in use", "Wait.") from InUse()
        real(*arguments)
        raise InputError("already has checkpoints", "Use another.")  # as the other one was faster

    monkeypatch.setattr(loading, "SECONDS_TO_LOOK", 0)
    monkeypatch.setattr(loading, "import_stage", busy_at_first)
    assert_parameters(rdm_jax.load(folder / "one.pkl", config=config), 1, tensors[0])
    assert len(calls) == 2


@pytest.mark.second
def test_load_of_a_run_in_a_bucket(imported, store):
    """Also if it has been looked at before."""
    folder, config, tensors = imported
    with pytest.raises(InputError, match=f"source='{store.url('run')}' has no config.json"):
        rdm_jax.load(store.url("run"))
    mounts.files().put(f"{folder / 'run'}/", store.url("run"), recursive=True)
    pipe = rdm_jax.load(store.url("run"))
    assert pipe.config.data == config.data
    for number in (1, 2):
        assert_parameters(pipe, number, tensors[number - 1])
