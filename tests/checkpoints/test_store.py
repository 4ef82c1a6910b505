"""Checkpoints: save and restore, retention of the newest and the best, detection of damage."""

import errno
import functools
import json
import re
import shutil
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl import logging as absl_logging

from rdm_jax.checkpoints import folders, space, store, trees
from rdm_jax.checkpoints.checksums import CHECKSUMS, LATER
from rdm_jax.models.functional import functional
from rdm_jax.runtime import sharding
from rdm_jax.runtime.errors import InputError
from rdm_jax.training.step import init_state
from tests.support.configs import NETWORK
from tests.support.small_networks import shapes

OPTIMIZER = optax.adam(1e-3)


@functools.cache
def abstract_state(classes: int):
    network = functional(lambda rngs: NETWORK.build(shapes(3, classes), rngs=rngs))
    return jax.eval_shape(lambda params: init_state(params, OPTIMIZER), network.abstract)


def make_state(step: int, classes: int = 2):
    """A state of the right shapes whose values differ between steps and indices."""

    def fill(x):
        return jnp.asarray(step + np.arange(x.size).reshape(x.shape) / 7, x.dtype)

    return jax.tree.map(fill, abstract_state(classes)).replace(step=jnp.int32(step))


def abstract(classes: int = 2, devices: int = 8):
    mesh = jax.sharding.Mesh(jax.devices()[:devices], ("data",))
    return store.with_sharding(abstract_state(classes), sharding.replicated(mesh))


def about(loss: float | None) -> dict:
    return {"validation_loss": loss, "data": {"next_index": 7}, "classes": ["a", "b"]}


def save(folder, losses: dict[int, float | None], **kwargs):
    checkpoints = store.Checkpoints(folder, **kwargs)
    for step, loss in losses.items():
        checkpoints.save(make_state(step), about(loss))
    checkpoints.close()


@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.second), 8])
def test_restore_on_any_number_of_devices(tmp_path, devices):
    save(tmp_path, {5: 0.5})
    state, known = store.Checkpoints(tmp_path).restore(5, abstract(devices=devices))
    chex.assert_trees_all_equal(jax.device_get(state), jax.device_get(make_state(5)))
    assert len(state.params["stem"]["kernel"].sharding.device_set) == devices
    assert known == about(0.5)


@pytest.mark.parametrize("processes", [1, 8])
def test_restore_shares_the_reading_out(tmp_path, monkeypatch, processes):
    """Of several processes every device reads an eighth of what all are to have, where eight divides
    an axis; one process reads the whole."""
    save(tmp_path, {5: 0.5})
    read, gathered, spread = [], trees.gathered, trees.spread

    def spread_of_several(tree):
        with monkeypatch.context() as several:  # Orbax would wait for the others
            several.setattr(jax, "process_count", lambda: processes)
            return spread(tree)

    monkeypatch.setattr(trees, "spread", spread_of_several)
    monkeypatch.setattr(
        trees, "gathered", lambda tree, wanted: read.append(tree) or gathered(tree, wanted)
    )
    state, _ = store.Checkpoints(tmp_path).restore(5, abstract())
    kernel = read[0]["ema"]["stem"]["kernel"]  # (3, 3, 3, 8)
    part = 8 if processes == 1 else 1
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(3, 3, 3, part)}
    assert state.ema["stem"]["kernel"].sharding.is_fully_replicated


def test_save_survives_donation(tmp_path):
    """The step after a save overwrites the state's memory while the save is being written."""
    state = make_state(1)
    expected = jax.device_get(jax.tree.map(jnp.array, state))
    checkpoints = store.Checkpoints(tmp_path)
    bump = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    checkpoints.save(state, about(0.5))
    for _ in range(5):
        state = bump(state)
    jax.block_until_ready(state)
    checkpoints.wait()
    restored, _ = checkpoints.restore(1, abstract())
    chex.assert_trees_all_equal(jax.device_get(restored), expected)


def test_retention_keeps_newest_and_best(tmp_path):
    save(tmp_path, {1: 0.9, 2: 0.1, 3: 0.8}, keep_newest=2, keep_best=1)
    # Another process resumes: it must know the losses too.
    save(tmp_path, {4: 0.7, 5: 0.6}, keep_newest=2, keep_best=1)
    assert store.Checkpoints(tmp_path).steps() == [2, 4, 5]
    assert folders.find("best", tmp_path) == (tmp_path, 2)
    assert folders.find("newest", tmp_path) == (tmp_path, 5)
    assert folders.find("4", tmp_path) == (tmp_path, 4)
    assert folders.find(str(tmp_path / "2"), tmp_path / "elsewhere") == (tmp_path, 2)


def test_retention_ranks_non_finite_losses_last(tmp_path):
    save(tmp_path, {1: 0.3, 2: None, 3: 0.5}, keep_newest=1, keep_best=1)
    assert store.Checkpoints(tmp_path).steps() == [1, 3]
    save(tmp_path / "first", {1: None, 2: 0.5}, keep_newest=2, keep_best=1)
    assert folders.find("best", tmp_path / "first")[1] == 2


def test_newest_waits_for_what_process_0_sees(tmp_path, monkeypatch):
    """On a network file system, a new folder may become visible to other hosts later."""
    save(tmp_path, {3: 0.5})
    checkpoints, slept = store.Checkpoints(tmp_path), []
    listed = checkpoints._manager.all_steps
    monkeypatch.setattr(checkpoints._manager, "all_steps", lambda: listed() if slept else [])
    monkeypatch.setattr(store.distributed, "from_primary", lambda own: 3)
    monkeypatch.setattr(store.time, "sleep", slept.append)
    assert checkpoints.newest() == 3 and slept


def test_retention_compares_losses_of_same_images(tmp_path):
    checkpoints = store.Checkpoints(tmp_path, keep_newest=1, keep_best=1)
    for step, loss, images in (
        (1, 0.1, "one"),
        (2, 0.9, "other"),
        (3, 0.8, "other"),
        (4, 0.85, "other"),
    ):
        checkpoints.save(make_state(step), about(loss) | {"validated_on": images})
    checkpoints.close()
    assert store.Checkpoints(tmp_path).steps() == [3, 4]
    assert folders.find("best", tmp_path) == (tmp_path, 3)
    # As an older version saved it, without 'validated_on'.
    save(tmp_path / "before", {1: 0.1, 2: 0.2}, keep_newest=2)
    assert folders.find("best", tmp_path / "before")[1] == 1


def test_retention_deletes_a_step_atomically(tmp_path):
    """A step is first moved away, then deleted; remains of a killed run are deleted."""
    save(tmp_path, {1: 0.5, 2: 0.5})
    assert [path.name for path in tmp_path.iterdir()] == ["2"]
    (tmp_path / store.DELETED / "1").mkdir(parents=True)  # left by a killed run
    assert store.Checkpoints(tmp_path).steps() == [2]
    assert [path.name for path in tmp_path.iterdir()] == ["2"]


def test_restore_ema_only(tmp_path):
    save(tmp_path, {3: 0.5})
    ema, known = store.Checkpoints(tmp_path, read_only=True).restore_ema(3, abstract().ema)
    chex.assert_trees_all_equal(jax.device_get(ema), jax.device_get(make_state(3).ema))
    assert known["validation_loss"] == 0.5


def test_read_only_opens_without_warnings(tmp_path, caplog):
    save(tmp_path, {3: 0.5})
    before = absl_logging.get_verbosity()
    absl_logging.set_verbosity(absl_logging.WARNING)
    try:
        store.Checkpoints(tmp_path, read_only=True)
        assert absl_logging.get_verbosity() == absl_logging.WARNING
    finally:
        absl_logging.set_verbosity(before)
    assert not caplog.records


@pytest.mark.parametrize("asked", ["newest", "best", "7", "/nowhere/7", "latest"])
def test_find_refuses_missing_checkpoint(tmp_path, asked):
    with pytest.raises(InputError, match="no checkpoint|not a checkpoint") as refusal:
        folders.find(asked, tmp_path / "checkpoints")
    assert refusal.value.fix in (
        "Train this stage first (--mode=train).",
        "Use the folder of a step, such as runs/digits/stage1/checkpoints/700.",
    )
    assert not (tmp_path / "checkpoints").exists()


def test_find_lists_known_steps(tmp_path):
    save(tmp_path, {3: 0.5})
    with pytest.raises(InputError, match=r"'7'.*Use one of 3\."):
        folders.find("7", tmp_path)


def test_restore_names_another_network(tmp_path):
    save(tmp_path, {3: 0.5})
    with pytest.raises(
        InputError, match=r"another network.*map_label/kernel is \(2, 32\) there, \(4, 32\) here"
    ):
        store.Checkpoints(tmp_path).restore(3, abstract(classes=4))
    with pytest.raises(InputError, match="another network"):
        store.Checkpoints(tmp_path).restore_ema(3, abstract(classes=4).ema)


def test_restore_verifies_every_file(tmp_path):
    """A removed byte, a flipped bit, a missing file and an additional file are all named."""
    save(tmp_path, {1: 0.5, 3: 0.4}, keep_newest=2)

    def refused(name):
        fix = "Move (it away, so that step 1 is the newest|the damaged step's folder away)"
        return pytest.raises(InputError, match=rf"{tmp_path / '3'} is damaged .({name}) .*{fix}")

    def read():
        return store.Checkpoints(tmp_path, read_only=True).restore(3, abstract())

    files = sorted(
        path for path in (tmp_path / "3").rglob("*") if path.is_file() and path.name not in LATER
    )
    for path in files:
        content, name = path.read_bytes(), re.escape(str(path.relative_to(tmp_path / "3")))
        if path.name == CHECKSUMS:
            name = ".*"  # the flipped bit may be in another file's checksum
        flipped = bytearray(content)
        if content:
            flipped[len(content) // 2] ^= 4
        for damaged in (content[:-1], bytes(flipped)):
            if damaged != content:
                path.write_bytes(damaged)
                with refused(name):
                    read()
        path.unlink()
        with refused(name):
            read()
        path.write_bytes(content)
    (tmp_path / "3" / "ema" / "new").touch()
    with refused("ema/new"):
        read()
    (tmp_path / "3" / "ema" / "new").unlink()
    chex.assert_trees_all_equal(jax.device_get(read()[0]), jax.device_get(make_state(3)))


def test_store_sets_damaged_checkpoints_aside(tmp_path, caplog):
    folder = tmp_path / "checkpoints"
    save(folder, {1: 0.5, 2: 0.4, 3: 0.3}, keep_newest=3)
    for name in ("3/ema/_METADATA", "1/about/metadata"):
        (folder / name).write_text("{")
    checkpoints = store.Checkpoints(folder)
    assert checkpoints.steps() == [2]
    chex.assert_trees_all_equal(
        jax.device_get(checkpoints.restore(2, abstract())[0]), jax.device_get(make_state(2))
    )
    assert sorted(
        path.name.partition("-")[0] for path in (tmp_path / "checkpoints_damaged").iterdir()
    ) == ["1", "3"]
    (folder / "2" / "ema" / "_METADATA").write_text("{")
    with pytest.raises(
        InputError, match="checkpoints/2 is damaged .ema/_METADATA has 1 bytes instead .*no other"
    ):
        store.Checkpoints(folder)
    assert (folder / "2").is_dir()


@pytest.mark.parametrize("allowed", [0, pytest.param(2, marks=pytest.mark.second)])
def test_save_tolerates_configured_failures(tmp_path, monkeypatch, allowed):
    """A failed save leaves nothing behind; the last save must succeed."""
    folder = tmp_path / "checkpoints"
    checkpoints = store.Checkpoints(folder, keep_newest=3, max_failed_saves=allowed)
    checkpoints.save(make_state(1), about(0.5))
    checkpoints.wait()

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    written = store.write_checksums
    monkeypatch.setattr(store, "write_checksums", full)
    for step in range(2, 2 + allowed):
        checkpoints.save(make_state(step), about(0.5))
        checkpoints.wait()
    assert checkpoints.steps() == [1] and {path.name for path in folder.iterdir()} == {"1"}
    checkpoints.save(make_state(8), about(0.5))
    with pytest.raises(OSError, match="No space left"):
        checkpoints.wait()
    monkeypatch.setattr(store, "write_checksums", written)
    checkpoints.save(make_state(8), about(0.5))  # the same step again
    checkpoints.wait()
    assert checkpoints.steps() == [1, 8]
    monkeypatch.setattr(store, "write_checksums", full)
    checkpoints.save(make_state(9), about(0.5))
    with pytest.raises(OSError, match="No space left"):
        checkpoints.close()
    assert store.Checkpoints(folder).steps() == [1, 8]


def test_save_refuses_a_replaced_directory(tmp_path):
    """As when the directory is moved away during a save, which recreates it."""
    folder = tmp_path / "checkpoints"
    checkpoints = store.Checkpoints(folder)
    checkpoints.save(make_state(1), about(0.5))
    checkpoints.wait()
    folder.rename(tmp_path / "elsewhere")
    folder.mkdir()
    with pytest.raises(OSError, match="directory was replaced"):
        checkpoints.save(make_state(2), about(0.5))
    assert not list(folder.iterdir())
    folder.rmdir()
    (tmp_path / "elsewhere").rename(folder)
    checkpoints.save(make_state(2), about(0.5))
    checkpoints.close()
    assert checkpoints.steps() == [2]


def test_close_refuses_a_directory_replaced_during_the_last_save(tmp_path, monkeypatch):
    folder = tmp_path / "checkpoints"

    def moves_away(partial):
        folder.rename(tmp_path / "elsewhere")
        partial.mkdir(parents=True)

    checkpoints = store.Checkpoints(folder)
    checkpoints.save(make_state(1), about(0.5))
    checkpoints.wait()
    monkeypatch.setattr(store, "write_checksums", moves_away)
    checkpoints.save(make_state(2), about(0.5))
    with pytest.raises(OSError, match="directory was replaced"):
        checkpoints.close()


def test_check_space_counts_snapshots(tmp_path, monkeypatch):
    """Each has the averages alone."""
    state = make_state(1)
    state = state.replace(averages={"average0": state.ema})
    sizes = [sum(leaf.nbytes for leaf in jax.tree.leaves(part)) for part in (state, state.ema)]
    need = 2 * sizes[0] + 5 * sizes[1]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=need))
    space.check_space(tmp_path, state, 2, 5)
    with pytest.raises(InputError, match="2 checkpoints and 6 snapshots .*snapshot_every"):
        space.check_space(tmp_path, state, 2, 6)


def test_restore_part_reads_one_tree(tmp_path):
    """Of several averages, and of a training state."""
    state = make_state(1)
    trees = {f"average{n}": jax.tree.map(lambda x, n=n: x + n, state.ema) for n in (1, 2)}
    checkpoints = store.Checkpoints(tmp_path)
    checkpoints.save(state.replace(averages=trees), about(0.5))
    checkpoints.wait()
    found = checkpoints.restore_part(1, "averages", "average2", abstract().ema)
    chex.assert_trees_all_equal(jax.device_get(found), jax.device_get(trees["average2"]))
    found = checkpoints.restore_part(1, "train", "params", abstract().params)
    chex.assert_trees_all_equal(jax.device_get(found), jax.device_get(state.params))
    with pytest.raises(InputError, match="another network"):
        checkpoints.restore_part(1, "averages", "average1", abstract(classes=4).ema)
    checkpoints.close()


def test_save_averages_keeps_what_there_is(tmp_path):
    """All of them, and the first of two for the same step."""
    first, second = make_state(1).ema, make_state(2).ema
    snapshots = store.Checkpoints(tmp_path)
    for step, tree in ((1, first), (2, first), (2, second), (3, second)):
        snapshots.save_averages(step, {"average0": tree}, about(None))
    snapshots.close()
    snapshots = store.Checkpoints(tmp_path)
    assert snapshots.steps() == [1, 2, 3]
    found = snapshots.restore_part(2, "averages", "average0", abstract().ema)
    chex.assert_trees_all_equal(jax.device_get(found), jax.device_get(first))
    snapshots.close()


def test_check_space_refuses_too_few_bytes(tmp_path, monkeypatch):
    """The exact size of all copies is enough; one byte less is not."""
    copies, state = 3, make_state(1)
    need = copies * sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: SimpleNamespace(free=need if path == tmp_path else 0)
    )
    space.check_space(tmp_path, abstract(), copies)
    for too_many in (copies + 1, 10**12):
        with pytest.raises(
            InputError, match=f"GiB free, and {too_many} checkpoints take .*keep_newest"
        ):
            space.check_space(tmp_path, abstract(), too_many)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=need - 1))
    with pytest.raises(InputError, match="GiB free"):
        space.check_space(tmp_path, abstract(), copies)


def test_about_round_trips_as_json(tmp_path):
    known = about(0.5) | {"nested": {"list": [1, 2.5, None, "x"], "empty": {}}, "true": True}
    checkpoints = store.Checkpoints(tmp_path)
    checkpoints.save(make_state(3), known)
    checkpoints.close()
    found = store.Checkpoints(tmp_path).about(3)
    assert found == known == json.loads(json.dumps(found))
