"""Checkpoints: what is saved comes back, the newest and the best stay, and what is damaged is named."""

import functools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rdm_jax import sharding
from rdm_jax.errors import InputError
from rdm_jax.models.functional import functional
from rdm_jax.training import checkpoint
from rdm_jax.training.step import init_state
from tests.tiny import NETWORK

OPTIMIZER = optax.adam(1e-3)


@functools.cache
def abstract_state(classes: int):
    network = functional(lambda rngs: NETWORK.build(3, classes, rngs=rngs))
    return jax.eval_shape(lambda params: init_state(params, OPTIMIZER), network.abstract)


def make_state(step: int, classes: int = 2):
    """A state of the right shapes whose values tell steps and places apart."""
    fill = lambda x: jnp.asarray(step + np.arange(x.size).reshape(x.shape) / 7, x.dtype)  # noqa: E731
    return jax.tree.map(fill, abstract_state(classes)).replace(step=jnp.int32(step))


def abstract(classes: int = 2, devices: int = 8):
    mesh = jax.sharding.Mesh(jax.devices()[:devices], ("data",))
    return checkpoint.with_sharding(abstract_state(classes), sharding.replicated(mesh))


def about(loss: float) -> dict:
    return {"validation_loss": loss, "data": {"next_index": 7}, "classes": ["a", "b"]}


def save(folder, losses: dict[int, float], **kwargs):
    checkpoints = checkpoint.Checkpoints(folder, **kwargs)
    for step, loss in losses.items():
        checkpoints.save(make_state(step), about(loss))
    checkpoints.close()


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_comes_back_on_any_number_of_devices(tmp_path, devices):
    save(tmp_path, {5: 0.5})
    state, known = checkpoint.Checkpoints(tmp_path).restore(5, abstract(devices=devices))
    chex.assert_trees_all_equal(jax.device_get(state), jax.device_get(make_state(5)))
    assert len(state.params["stem"]["kernel"].sharding.device_set) == devices
    assert known == about(0.5)


def test_saved_values_survive_donation(tmp_path):
    """The step after a save overwrites the state's memory while it is being written."""
    state = make_state(1)
    expected = jax.device_get(jax.tree.map(jnp.array, state))
    checkpoints, bump = checkpoint.Checkpoints(tmp_path), jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    checkpoints.save(state, about(0.5))
    for _ in range(5):
        state = bump(state)
    jax.block_until_ready(state)
    checkpoints.wait()
    restored, _ = checkpoints.restore(1, abstract())
    chex.assert_trees_all_equal(jax.device_get(restored), expected)


def test_newest_and_best_stay(tmp_path):
    save(tmp_path, {1: 0.9, 2: 0.1, 3: 0.8}, keep_newest=2, keep_best=1)
    save(tmp_path, {4: 0.7, 5: 0.6}, keep_newest=2, keep_best=1)  # another process goes on: it must know the losses too
    assert checkpoint.Checkpoints(tmp_path).steps() == [2, 4, 5]
    assert checkpoint.find("best", tmp_path) == (tmp_path, 2)
    assert checkpoint.find("newest", tmp_path) == (tmp_path, 5)
    assert checkpoint.find("4", tmp_path) == (tmp_path, 4)
    assert checkpoint.find(str(tmp_path / "2"), tmp_path / "elsewhere") == (tmp_path, 2)


def test_the_average_alone(tmp_path):
    save(tmp_path, {3: 0.5})
    ema, known = checkpoint.Checkpoints(tmp_path, read_only=True).restore_ema(3, abstract().ema)
    chex.assert_trees_all_equal(jax.device_get(ema), jax.device_get(make_state(3).ema))
    assert known["validation_loss"] == 0.5


@pytest.mark.parametrize("asked", ["newest", "best", "7", "/nowhere/7", "latest"])
def test_missing(tmp_path, asked):
    with pytest.raises(InputError, match="would do"):
        checkpoint.find(asked, tmp_path / "checkpoints")
    assert not (tmp_path / "checkpoints").exists()


def test_unknown_step_lists_the_known(tmp_path):
    save(tmp_path, {3: 0.5})
    with pytest.raises(InputError, match="'7'.*one of 3 would do"):
        checkpoint.find("7", tmp_path)


def test_another_network_is_named(tmp_path):
    save(tmp_path, {3: 0.5})
    with pytest.raises(InputError, match=r"another network.*map_label.*\(2, 32\) there, \(4, 32\) here"):
        checkpoint.Checkpoints(tmp_path).restore(3, abstract(classes=4))
    with pytest.raises(InputError, match="another network"):
        checkpoint.Checkpoints(tmp_path).restore_ema(3, abstract(classes=4).ema)


def test_truncated_files_are_noticed(tmp_path):
    """Every file that holds data, cut in half in turn: an error that names the checkpoint, or values that are still right."""
    save(tmp_path, {1: 0.5, 3: 0.4}, keep_newest=2)
    expected, harmless = jax.device_get(make_state(3)), []
    files = sorted(p for p in (tmp_path / "3").rglob("*") if p.is_file() and p.stat().st_size > 1)
    for path in files:
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        try:
            state, known = checkpoint.Checkpoints(tmp_path, read_only=True).restore(3, abstract())
            chex.assert_trees_all_equal(jax.device_get(state), expected)
            assert known == about(0.4)
            harmless.append(path.relative_to(tmp_path / "3"))
        except InputError as error:
            assert f"{tmp_path}" in str(error) and "cannot be read" in str(error)
        path.write_bytes(content)
    # Orbax reads the arrays from the two folders `d`; what each process wrote before they were merged is left over.
    arrays = [path for path in harmless if len(path.parts) == 3 and path.parent.name == "d"]
    assert not arrays and not [path for path in harmless if path.name in ("_METADATA", "metadata")], harmless


def test_no_space(tmp_path):
    with pytest.raises(InputError, match="GiB free.*keep_newest"):
        checkpoint.check_space(tmp_path, abstract(), copies=10**12)


def test_about_is_json(tmp_path):
    save(tmp_path, {3: 0.5})
    assert json.dumps(checkpoint.Checkpoints(tmp_path).about(3))
