"""The working directory: its paths, its lock, its config."""

import dataclasses

import pytest

from rdm_jax.config import Config
from rdm_jax.runtime.errors import InputError
from rdm_jax.workdir import Workdir


def test_paths(tmp_path):
    workdir, config = Workdir(str(tmp_path / "run")), Config()
    assert workdir.checkpoints(2) == tmp_path / "run/stage2/checkpoints"
    assert workdir.samples(config) == tmp_path / "run" / config.sampling.name
    outputs = [*map(workdir.stage, (1, 2)), workdir.samples(config), workdir.evaluation(config)]
    assert workdir.outputs(config) == outputs
    assert not workdir.path.exists()


def test_stages_with_checkpoints(tmp_path):
    workdir = Workdir(tmp_path)
    workdir.checkpoints(2).mkdir(parents=True)
    assert workdir.stages_with_checkpoints(Config()) == [2]
    assert not workdir.is_trained(2)


def test_config_round_trips(tmp_path):
    workdir, config = Workdir(tmp_path), dataclasses.replace(Config(), seed=3)
    assert workdir.read_config() is None
    workdir.write_config(config)
    assert workdir.read_config() == config
    # Nothing is trained yet, so that any other config may replace it.
    workdir.check_same_config(Config(), trains=True)


def test_check_same_config_refuses_another_seed(tmp_path):
    workdir, config = Workdir(tmp_path), dataclasses.replace(Config(), seed=3)
    workdir.write_config(config)
    (workdir.checkpoints(1) / "10/train").mkdir(parents=True)  # a damaged training state
    workdir.check_same_config(config, trains=True)
    with pytest.raises(InputError, match="seed was 3 and is 0"):
        workdir.check_same_config(Config(), trains=False)


def test_locked_excludes_and_is_released(tmp_path):
    workdir = Workdir(tmp_path / "run")
    refused = pytest.raises(InputError, match="in use by another run")
    with workdir.locked(), refused, workdir.locked():
        pass
    with workdir.locked():
        assert (tmp_path / "run/.lock").is_file()


def test_from_flag_names_a_similar_folder(tmp_path):
    (tmp_path / "digits").mkdir()
    with pytest.raises(InputError, match="--mode=sample works on an existing run") as refusal:
        Workdir.from_flag(tmp_path / "digts", needed_by="--mode=sample")
    assert refusal.value.fix == f"Use --workdir={str(tmp_path / 'digits')!r}."
    assert not (tmp_path / "digts").exists()


def test_a_folder_of_a_bucket_is_a_workdir(store):
    workdir = Workdir(store.url("run"))
    assert str(workdir.checkpoints(2)) == store.url("run/stage2/checkpoints")
    with pytest.raises(InputError, match="does not exist, and --mode=sample works on an existing"):
        Workdir.from_flag(store.url("run"), needed_by="--mode=sample")
    with workdir.locked():
        workdir.write_config(dataclasses.replace(Config(), seed=3))
    assert store.names("run/") == ["run/.lock/token", "run/config.json"]
    assert Workdir.from_flag(store.url("run/"), needed_by="--mode=sample").read_config().seed == 3
