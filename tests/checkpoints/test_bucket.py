"""Checkpoints in a bucket: whole or not at all, whatever ended the process or failed in the store."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rdm_jax.checkpoints import folders
from rdm_jax.checkpoints.store import Checkpoints, with_sharding
from rdm_jax.runtime import mounts, sharding
from rdm_jax.runtime.errors import InputError

STEP = "run/stage1/checkpoints"

pytestmark = pytest.mark.second


@pytest.fixture
def folder(store):
    """A folder of checkpoints in a bucket."""
    return mounts.any_path(store.url(STEP))


def state(step: int) -> types.SimpleNamespace:
    """What is saved of a training state, in small."""
    tree = {"a": jnp.arange(6.0) + step}
    return types.SimpleNamespace(step=jnp.int32(step), params=tree, ema=tree, averages={})


def save(checkpoints: Checkpoints, *steps: int) -> None:
    for step in steps:
        checkpoints.save(state(step), {"validation_loss": 1 / step})
        checkpoints.wait()


def steps_in(folder) -> list[int]:
    return sorted(int(path.name) for path in folders.step_folders(folder))


def restored(folder, step: int) -> np.ndarray:
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state(step).ema)
    ema, _ = Checkpoints(folder, read_only=True).restore_ema(
        step, with_sharding(abstract, sharding.replicated(sharding.local_mesh()))
    )
    return np.asarray(ema["a"])


def test_a_saved_state_is_restored_and_others_are_deleted(folder, store):
    save(checkpoints := _open(folder), 1, 3, 30)
    checkpoints.close()
    assert steps_in(folder) == [3, 30]
    assert not store.names(f"{STEP}/1/")
    np.testing.assert_array_equal(restored(folder, 3), np.arange(6.0) + 3)
    assert folders.find(store.url(f"{STEP}/3"), folder.parent) == (folder, 3)


def test_what_a_killed_process_leaves_is_not_a_checkpoint(folder, store):
    """It ended before the marker was written, or in the middle of a deletion."""
    save(checkpoints := _open(folder), 1, 2)
    checkpoints.close()
    kept = dict(store.server.buckets[store.name])
    store.server.delete(store.name, f"{STEP}/2/commit_success.txt")
    assert steps_in(folder) == [1]
    assert _open(folder).newest() == 1 and not store.names(f"{STEP}/2/")

    store.server.buckets[store.name] = kept
    store.server.delete(store.name, f"{STEP}/2/ema/manifest.ocdbt")
    assert _open(folder).newest() == 1 and not store.names(f"{STEP}/2/")
    np.testing.assert_array_equal(restored(folder, 1), np.arange(6.0) + 1)


@pytest.mark.parametrize("name", ["checksums.json", "ema/manifest.ocdbt"])
def test_a_checkpoint_that_cannot_be_read_is_not_deleted(folder, store, name):
    save(checkpoints := _open(folder), 1, 2)
    checkpoints.close()
    store.server.answer = lambda method, path: 401 * path.endswith(f"/2/{name}")
    with pytest.raises(OSError) as error:
        _open(folder)
    assert error.value.filename.startswith(store.url(f"{STEP}/2"))
    store.server.answer = lambda method, path: 0

    store.server.put(store.name, f"{STEP}/2/{name}", b"{}")
    with pytest.raises(InputError, match="2 is damaged"):
        _open(folder)
    assert steps_in(folder) == [1, 2]


@pytest.mark.parametrize("part", ["ema/", "commit_success.txt", "checksums.json"])
def test_a_save_that_the_store_refuses_is_logged_and_is_no_checkpoint(folder, store, caplog, part):
    save(checkpoints := _open(folder), 1)
    store.server.answer = lambda method, path: 403 if f"{STEP}/2/{part}" in path else 0
    save(checkpoints, 2)
    assert f"checkpoint {store.url(STEP)}/2 cannot be written" in caplog.text
    assert checkpoints.steps() == [1] == steps_in(folder)
    store.server.answer = lambda method, path: 0
    save(checkpoints, 2)
    checkpoints.close()
    np.testing.assert_array_equal(restored(folder, 2), np.arange(6.0) + 2)


def test_a_store_that_is_away_during_a_save_ends_nothing(folder, store, caplog):
    save(checkpoints := _open(folder), 1)
    store.server.answer = lambda method, path: 403
    save(checkpoints, 2)
    assert f"checkpoint {store.url(STEP)}/2 cannot be written" in caplog.text
    with pytest.raises(OSError, match="Forbidden"):  # one may fail
        save(checkpoints, 3)
    store.server.answer = lambda method, path: 0
    save(checkpoints, 4)
    checkpoints.close()
    assert steps_in(folder) == [1, 4] and not store.names(f"{STEP}/2/")


def test_a_save_after_the_lock_is_lost_ends_the_run(folder, store, monkeypatch):
    """It neither counts as failed nor removes what another run is writing."""
    save(checkpoints := _open(folder), 1)
    store.server.put(store.name, f"{STEP}/9/theirs", b"")
    monkeypatch.setitem(mounts.taken, store.url("run"), "process 1 on other")
    with pytest.raises(InputError, match="lost its lock to process 1 on other"):
        save(checkpoints, 2)
    with pytest.raises(InputError, match="lost its lock"):
        checkpoints._give_up(OSError("as the lock was lost during the save"))
    assert store.names(f"{STEP}/9/") and steps_in(folder) == [1]
    checkpoints.close()


def test_a_busy_store_is_asked_again(folder, store):
    """It answers 503 to every fifth request of the save."""
    checkpoints, requests = _open(folder), iter(range(10**6))
    store.server.answer = lambda method, path: 503 * (next(requests) % 5 == 4)
    save(checkpoints, 1)
    store.server.answer = lambda method, path: 0
    checkpoints.close()
    assert next(requests) > 20
    np.testing.assert_array_equal(restored(folder, 1), np.arange(6.0) + 1)


def _open(folder) -> Checkpoints:
    return Checkpoints(folder, keep_newest=2, max_failed_saves=1)
