"""Batches: order, exact resumption, processes and workers."""

import collections
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import chex
import numpy as np
import pytest
from PIL import Image

from rdm_jax.data.image_sets import open_prepared
from rdm_jax.data.images import ImageSpec
from rdm_jax.data.pipeline import train_iterator
from rdm_jax.data.prepare import prepare
from rdm_jax.runtime.errors import InputError

COUNT = 23


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """23 noise images of 6x4 whose first red value is their index, in classes of even and odd."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for index in range(COUNT):
        pixels = rng.integers(0, 256, (6, 4, 3), np.uint8)
        pixels[0, 0, 0] = index
        file = root / "images" / ("even", "odd")[index % 2] / f"{index:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file)
    return prepare(f"folder:{root}/images", root / "set", ImageSpec(6, 4))


@pytest.fixture(scope="module")
def source(directory):
    return open_prepared(directory, cache_bytes=2**20)


def numbers(batches):
    """Names the images of some batches, in order."""
    return np.concatenate([batch["image"][:, 0, 0, 0] for batch in batches]).tolist()


def take(count, iterator):
    return list(itertools.islice(iterator, count))


def test_image_set_items_and_attributes(directory):
    source = open_prepared(directory)
    assert (len(source), source.image_shape, source.class_names) == (
        COUNT,
        (6, 4, 3),
        ("even", "odd"),
    )
    for item in source:
        chex.assert_shape(item["image"], (6, 4, 3))
        chex.assert_shape(item["label"], ())
        assert item["image"].dtype == np.uint8 and item["label"].dtype == np.int32
        assert item["image"][0, 0, 0] % 2 == item["label"]
    for index in (COUNT, -1):
        with pytest.raises(IndexError):
            source[index]


def test_cached_batches_equal_uncached_ones(directory, source):
    indices = [5, 5, 0, COUNT - 1]
    chex.assert_trees_all_equal(source.batch(indices), open_prepared(directory).batch(indices))
    chex.assert_trees_all_equal(source[7], open_prepared(directory)[7])


def test_cache_needs_enough_bytes(directory, capfd):
    size = COUNT * 6 * 4 * 3
    open_prepared(directory, cache_bytes=size - 1)
    assert "decoding" not in capfd.readouterr().err
    open_prepared(directory, cache_bytes=size)
    assert "decoding" in capfd.readouterr().err


def test_open_prepared_reads_grey_images_without_labels(tmp_path):
    (tmp_path / "images").mkdir()
    pixels = np.arange(12, dtype=np.uint8).reshape(3, 4)
    Image.fromarray(pixels).save(tmp_path / "images" / "0.png")
    source = open_prepared(
        prepare(f"folder:{tmp_path}/images", tmp_path / "set", ImageSpec(3, 4, channels=1))
    )
    assert source.class_names == ()
    chex.assert_trees_all_equal(source[0], {"image": pixels[..., None], "label": np.int32(-1)})


@pytest.mark.parametrize("batch_size", [1, 4, 23, 60])
def test_iterator_visits_every_image_once_per_epoch(source, batch_size):
    batches = take(
        -(-3 * COUNT // batch_size), train_iterator(source, batch_size=batch_size, seed=0)
    )
    for batch in batches:
        chex.assert_shape(batch["image"], (batch_size, 6, 4, 3))
        chex.assert_shape(batch["label"], (batch_size,))
        assert batch["image"].dtype == np.uint8 and batch["label"].dtype == np.int32
        np.testing.assert_array_equal(batch["image"][:, 0, 0, 0] % 2, batch["label"])
    order = numbers(batches)
    epochs = [order[start : start + COUNT] for start in (0, COUNT, 2 * COUNT)]
    assert all(sorted(epoch) == list(range(COUNT)) for epoch in epochs)
    assert list(range(COUNT)) not in epochs
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_order_is_independent_of_batch_size(source):
    by_4 = numbers(take(15, train_iterator(source, batch_size=4, seed=0)))
    by_60 = numbers(take(1, train_iterator(source, batch_size=60, seed=0)))
    assert by_4 == by_60


def test_order_depends_on_seed(source):
    epochs = {}
    for seed in range(4):
        order = numbers(take(4, train_iterator(source, batch_size=COUNT, seed=seed)))
        assert order == numbers(take(4, train_iterator(source, batch_size=COUNT, seed=seed)))
        epochs |= {
            (seed, epoch): tuple(order[epoch * COUNT : (epoch + 1) * COUNT]) for epoch in range(4)
        }
    assert len(set(epochs.values())) == 16


def test_order_is_uniform(source):
    """Image 0 is equally often at each of 23 positions: chi-square, 22 degrees, 5.6 sigma at 60."""
    order = np.array(numbers(take(1000, train_iterator(source, batch_size=COUNT, seed=5)))).reshape(
        1000, COUNT
    )
    counts = collections.Counter(np.argmin(order, axis=1).tolist())
    assert sum((counts[place] - 1000 / COUNT) ** 2 / (1000 / COUNT) for place in range(COUNT)) < 60


@pytest.mark.parametrize("count", [2, 3, 12])
def test_processes_share_global_batches_and_state(source, count):
    whole = train_iterator(source, batch_size=12, seed=3)
    parts = [
        train_iterator(source, batch_size=12, seed=3, process_index=i, process_count=count)
        for i in range(count)
    ]
    for _ in range(6):
        batches = [next(part) for part in parts]
        joined = {
            key: np.concatenate([batch[key] for batch in batches]) for key in ("image", "label")
        }
        chex.assert_trees_all_equal(joined, next(whole))
        assert [part.get_state() for part in parts] == [whole.get_state()] * count


@pytest.mark.parametrize("taken", [0, 1, 7])
def test_state_is_json_and_resumes_with_other_processes(source, taken):
    iterator = train_iterator(source, batch_size=12, seed=1)
    take(taken, iterator)
    time.sleep(0.05)  # Time for the threads to run ahead, which the state must not show.
    state = json.loads(json.dumps(iterator.get_state()))
    expected = take(5, iterator)
    for count in (1, 2):
        parts = [
            train_iterator(source, batch_size=12, seed=1, process_index=i, process_count=count)
            for i in range(count)
        ]
        for part in parts:
            take(3, part)  # Restoring also turns back an iterator that went on.
            part.set_state(state)
        resumed = [numbers([batch]) for batch in expected]
        assert [sum((numbers([next(part)]) for part in parts), []) for _ in range(5)] == resumed


def test_batches_are_writable(source):
    """Writes to a batch must not change the cache."""
    before = source.batch(np.arange(COUNT))["image"]
    next(train_iterator(source, batch_size=COUNT, seed=0))["image"][...] = 0
    np.testing.assert_array_equal(source.batch(np.arange(COUNT))["image"], before)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 9, "process_count": 2}, "batch_size=9"),
        ({"process_index": 2, "process_count": 2}, "process_index=2"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_train_iterator_refuses_bad_arguments(source, change, named):
    with pytest.raises(InputError, match=named):
        train_iterator(source, **({"batch_size": 8, "seed": 0} | change))


@pytest.fixture
def copy(directory, tmp_path):
    return shutil.copytree(directory, tmp_path / "copy")


def shard(copy):
    (file,) = copy.glob("*.array_record*")
    return file


def damage(copy, kind):
    if kind == "no directory":
        shutil.rmtree(copy)
    elif kind == "no info":
        (copy / "dataset_info.json").unlink()
    elif kind == "broken info":
        (copy / "dataset_info.json").write_text('{"name": ')
    elif kind == "no features":
        (copy / "features.json").unlink()
    elif kind == "no shard":
        shard(copy).unlink()
    elif kind == "empty shard":
        shard(copy).write_bytes(b"")
    elif kind == "half a shard":
        shard(copy).write_bytes(shard(copy).read_bytes()[: shard(copy).stat().st_size // 2])
    elif kind == "fewer records":
        info = (copy / "dataset_info.json").read_text()
        (copy / "dataset_info.json").write_text(info.replace(f'"{COUNT}"', f'"{COUNT + 1}"'))


@pytest.mark.parametrize(
    "kind",
    [
        "no directory",
        "no info",
        "broken info",
        "no features",
        "no shard",
        "empty shard",
        "half a shard",
        "fewer records",
    ],
)
def test_open_prepared_refuses_missing_or_damaged_sets(copy, kind):
    damage(copy, kind)
    with pytest.raises(InputError, match=str(copy)):
        open_prepared(copy)


def test_flipped_bit_names_record_and_directory(copy):
    content = bytearray(shard(copy).read_bytes())
    start = content.index(b"IDAT", content.index(b"IDAT") + 1)  # In the second image.
    content[start + 30] ^= 1
    shard(copy).write_bytes(content)
    source = open_prepared(copy)
    source[0]
    with pytest.raises(InputError, match=f"record 1 of {copy}"):
        source[1]
    with pytest.raises(InputError, match=f"record 1 of {copy}"):
        open_prepared(copy, cache_bytes=2**20)
    with pytest.raises(
        InputError, match=f"record 1 of {copy}"
    ):  # From the prefetching threads, too.
        take(COUNT, train_iterator(source, batch_size=4, seed=0))


def test_flipped_bits_are_refused_or_harmless(copy):
    """array_record's own checksums: whichever byte is hit, wrong pixels are never handed out."""
    wanted = open_prepared(copy).batch(range(COUNT))
    whole, refused = shard(copy).read_bytes(), 0
    written = np.flatnonzero(np.frombuffer(whole, np.uint8))  # All else is padding.
    for place in np.random.default_rng(0).choice(written, 100, replace=False).tolist():
        shard(copy).write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        try:
            found = open_prepared(copy).batch(range(COUNT))
        except InputError:
            refused += 1
            continue
        chex.assert_trees_all_equal(found, wanted)
    assert refused > 90


def test_shard_of_another_size_is_refused(copy):
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["shards"][0]["bytes"] += 1
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="array_record.* bytes"):
        open_prepared(copy)


@pytest.mark.second
def test_workers_keep_order_across_stops(directory):
    """0 and 2 workers, stopped in both epochs and resumed with the other number of them."""
    images = open_prepared(directory)
    per_epoch = 6  # batches of 8 for 23 images: epochs end within batches

    def iterator(workers, **processes):
        return train_iterator(images, batch_size=8, seed=2, workers=workers, **processes)

    whole = take(per_epoch, iterator(0))
    assert (
        sorted(numbers(whole)[:COUNT])
        == sorted(numbers(whole)[COUNT : 2 * COUNT])
        == list(range(COUNT))
    )
    handed_out, state = [], {"next_index": 0}
    for workers, count in ((2, 2), (0, 3), (2, 1)):
        part = iterator(workers)
        part.set_state(state)
        handed_out += take(count, part)
        state = json.loads(json.dumps(part.get_state()))
        part.close()
    chex.assert_trees_all_equal(handed_out, whole)


def test_cached_set_uses_no_workers(source):
    iterator = train_iterator(source, batch_size=4, seed=0, workers=2)
    chex.assert_trees_all_equal(next(iterator), next(train_iterator(source, batch_size=4, seed=0)))
    assert multiprocessing.active_children() == []


def ends(process):
    """Whether a process that is not a child ends, or becomes a zombie, within some seconds."""
    for _ in range(100):
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.1)
    return False


def workers_of_this():
    return [process for process in multiprocessing.active_children() if process.is_alive()]


SENT = [
    pytest.param(signal.SIGKILL, id="killed", marks=pytest.mark.second),
    pytest.param(signal.SIGSTOP, id="hanging", marks=pytest.mark.long),
]


@pytest.mark.parametrize("sent", SENT)
def test_workers_are_restarted_in_order(directory, sent):
    undisturbed = take(12, train_iterator(open_prepared(directory), batch_size=4, seed=9))
    batches = train_iterator(
        open_prepared(directory), batch_size=4, seed=9, workers=2, worker_timeout=10.0
    )
    seen = take(5, batches)
    for process in workers_of_this():
        os.kill(process.pid, sent)
    seen += take(7, batches)
    batches.close()
    chex.assert_trees_all_equal(seen, undisturbed)


def test_workers_that_fail_twice_raise(directory):
    batches = train_iterator(
        open_prepared(directory), batch_size=4, seed=9, workers=1, worker_timeout=0.01
    )  # less than a start
    with pytest.raises(
        InputError,
        match="config.data.workers=1: the workers failed twice .*no batch in 0.01 s.*"
        "worker_timeout",
    ):
        next(batches)
    assert all(ends(process.pid) for process in workers_of_this())
