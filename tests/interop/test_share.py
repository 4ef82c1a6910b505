"""A whole relay in a folder: exported, checked, loaded and imported with the same values."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rdm_jax
from rdm_jax.checkpoints import shared
from rdm_jax.checkpoints.folders import read_about
from rdm_jax.config.saved import read_saved
from rdm_jax.modes import run
from rdm_jax.runtime.errors import InputError
from rdm_jax.workdir import Workdir
from tests.support.captioned_runs import config_of, open_fake, write_run
from tests.support.checkpoints import read_arrays

SEEDS = np.arange(3)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Of a run that was trained with captions."""
    folder = tmp_path_factory.mktemp("shared") / "run"
    return write_run(folder, config_of(), training=("a red disc",), held_out=("a blue bar",))


@pytest.fixture(scope="module")
def relay(workdir):
    """The folder of that run's relay, exported."""
    folder = workdir.with_name("relay")
    run(config_of(), workdir, mode="export", weights=str(folder))
    return folder


@pytest.fixture(autouse=True)
def caches(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    open_fake(monkeypatch)


def copied(relay, tmp_path):
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in relay.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_export_without_a_stage_writes_the_whole_relay(relay):
    names = {path.name for path in relay.iterdir()}
    assert names == {
        *("stage1.safetensors", "stage2.safetensors", "config.json", "captions.json"),
        *("README.md", "relay.json"),
    }
    card = (relay / "README.md").read_text()
    assert (
        "Captions, embedded by fake.\n" in card
        and "| 1 | {} x {} | ".format(*config_of().stage(1).resolution) in card
    )
    with pytest.raises(InputError, match=r"relay exists\. Use a new folder"):
        run(config_of(), relay.with_name("run"), mode="export", weights=str(relay))


@pytest.mark.second
def test_card_asks_for_classes_beside_prompts(tmp_path):
    """Its example is refused without, where the networks know both."""
    workdir = write_run(tmp_path / "run", config_of(classes=True))
    run(config_of(classes=True), workdir, mode="export", weights=str(tmp_path / "both"))
    card = (tmp_path / "both/README.md").read_text()
    assert "embedded by fake. 2 classes.\n" in card
    assert 'rdm_jax.load("both", sampling={"labels": "random"})\n' in card
    assert """pipe.sample(range(4), prompts=["a""" in card
    loaded = rdm_jax.load(tmp_path / "both", sampling={"labels": "random"})
    assert loaded.sample(SEEDS, prompts="a red disc")[-1].shape == (3, 8, 8, 3)


def test_imported_relay_has_the_parameters_to_bfloat16(workdir, relay, tmp_path):
    run(config_of(), tmp_path / "mine", mode="import", weights=str(relay))
    for number in (1, 2):
        old, new = (
            read_arrays(Workdir(folder).checkpoints(number) / "1/ema")
            for folder in (workdir, tmp_path / "mine")
        )
        rounded = jax.tree.map(lambda x: np.asarray(jnp.bfloat16(x), np.float32), old)
        jax.tree.map(np.testing.assert_array_equal, new, rounded)
    assert read_saved(tmp_path / "mine/config.json") == read_saved(workdir / "config.json")
    with pytest.raises(InputError, match="already has checkpoints of stage 1"):
        run(config_of(), tmp_path / "mine", mode="import", weights=str(relay))


@pytest.mark.second
def test_shared_relay_samples_as_the_imported_one(relay, tmp_path):
    loaded = rdm_jax.load(relay)
    assert loaded.captions.training == ("a red disc",)
    assert loaded.checkpoints[0]["shared"]["file"] == "stage1.safetensors"
    images = loaded.sample(SEEDS, prompts="a blue bar")
    run(config_of(), tmp_path / "mine", mode="import", weights=str(relay))
    again = rdm_jax.load(tmp_path / "mine").sample(SEEDS, prompts="a blue bar")
    jax.tree.map(np.testing.assert_array_equal, images, again)
    twice = rdm_jax.load(relay, sampling={"batch_size": 16}).sample(SEEDS, prompts="a blue bar")
    jax.tree.map(np.testing.assert_array_equal, images, twice)  # of what was unpacked before


@pytest.mark.parametrize("name", ["stage2.safetensors", "config.json", "relay.json"])
def test_damaged_relay_is_refused(relay, tmp_path, name):
    folder = copied(relay, tmp_path)
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(bytes(content))
    with pytest.raises(InputError, match=r"Get it again|differs from its hash"):
        rdm_jax.load(folder)


def test_relay_of_another_network_is_refused(relay, tmp_path):
    folder = copied(relay, tmp_path)
    config = config_of().with_stage(1, network={"channels": 16})
    Workdir(folder).write_config(config)
    listed = json.loads((folder / "relay.json").read_text())
    listed["files"]["config.json"] = shared.sha256(folder / "config.json")
    (folder / "relay.json").write_text(json.dumps(listed))
    with pytest.raises(InputError, match=r"stage1.safetensors is of another network \("):
        rdm_jax.load(folder)


def test_newer_relay_is_refused(relay, tmp_path):
    folder = copied(relay, tmp_path)
    listed = json.loads((folder / "relay.json").read_text()) | {"version": 2}
    (folder / "relay.json").write_text(json.dumps(listed))
    with pytest.raises(InputError, match="has version 2, and this rdm_jax reads 1"):
        rdm_jax.load(folder)


def test_relay_by_name_is_that_of_the_folder(relay, hub, tmp_path):
    """For --config, --weights and `load`; of what was uploaded only the relay's files are sent."""
    hub.upload(relay, "a/relay", **{"stage3.safetensors": b"another's", "train.py": b"raise"})
    run("hf://a/relay", tmp_path / "mine", mode="import", weights="hf://a/relay@main")
    assert read_saved(tmp_path / "mine/config.json") == read_saved(relay / "config.json")
    loaded = rdm_jax.load("hf://a/relay", sampling={"batch_size": 4})
    assert loaded.captions.training == ("a red disc",)
    for number, found in enumerate(loaded.checkpoints, 1):
        digest = shared.sha256(relay / f"stage{number}.safetensors")
        assert found["shared"] == {"file": f"stage{number}.safetensors", "sha256": digest}
        about = read_about(Workdir(tmp_path / "mine").checkpoints(number) / "1")
        assert about["shared"] == found["shared"]
    names = {path.name for path in relay.iterdir()} - {"README.md"}
    assert sorted(hub.fetched) == sorted(names)  # each once


def test_damaged_relay_by_name_is_refused(relay, hub, tmp_path):
    hub.upload(relay, "a/relay", **{"stage2.safetensors": b"torn"})
    with pytest.raises(InputError, match=r"stage2.safetensors differs from") as refusal:
        rdm_jax.load("hf://a/relay")
    assert refusal.value.fix == f"Remove {tmp_path}/hub/models--a--relay, and run the same again."


def test_weights_of_one_stage_are_no_name(hub, tmp_path):
    with pytest.raises(InputError, match="hf:// is not supported here. Use a local path; by name"):
        run(config_of(), tmp_path / "mine", mode="import", stage=1, weights="hf://a/relay")


def test_card_may_be_edited(relay, tmp_path):
    folder = copied(relay, tmp_path)
    (folder / "README.md").write_text("another")
    assert shared.read_config(folder).stages


def test_import_refuses_a_folder_that_is_no_relay(tmp_path):
    with pytest.raises(InputError, match=r"is not a shared relay: it has no relay\.json"):
        run(config_of(), tmp_path / "mine", mode="import", weights=str(tmp_path))
