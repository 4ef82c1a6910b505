"""Shards: batches that are kept until all images exist, and the files they become."""

import dataclasses

import numpy as np
import pytest

from rdm_jax.data.sources import open_source
from rdm_jax.runtime.errors import Interrupted
from rdm_jax.runtime.signals import StopOnSignal
from rdm_jax.sampling import sample_shards
from tests.support.configs import tiny_config
from tests.support.fake_pipeline import FakeRelay
from tests.support.sampled import contents, sample, seeds_of


def test_sampling_resumes_after_a_signal(tmp_path):
    fake, stop = FakeRelay(tiny_config("images")), StopOnSignal()
    fake.after_each = lambda: setattr(stop, "requested", 15)
    with pytest.raises(Interrupted):
        sample_shards.sample_in_parts(fake, np.arange(12), tmp_path, stop)
    fake.after_each = lambda: None
    made, _ = sample_shards.sample_in_parts(fake, np.arange(12), tmp_path, StopOnSignal())
    assert fake.made == [list(range(8)), list(range(8, 12))]  # the first batch was not made again
    assert made.read(np.array([11, 0, 7]))[1].ravel().tolist() == [11, 0, 7]


def test_write_npz(tmp_path):
    made, _ = sample_shards.sample_in_parts(
        FakeRelay(tiny_config("images")), np.arange(12), tmp_path / "parts", StopOnSignal()
    )
    for name in ("one.npz", "other.npz"):
        sample_shards.write_npz(
            made, np.arange(12), ["stage1", "images"], {"seeds": np.arange(12)}, tmp_path / name
        )
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "other.npz").read_bytes()
    with np.load(tmp_path / "one.npz") as file:
        assert file.files == ["stage1", "images", "seeds"]
        np.testing.assert_array_equal(file["stage1"], np.ones((12, 4, 4, 1), np.uint8))
        np.testing.assert_array_equal(file["images"].ravel(), np.arange(12))


def test_write_png(tmp_path):
    seeds = np.arange(12) + 5
    made, _ = sample_shards.sample_in_parts(
        FakeRelay(tiny_config("images")), seeds, tmp_path / "parts", StopOnSignal()
    )
    for _ in range(2):  # the same pictures again
        sample_shards.write_png(made, seeds, tmp_path / "images")
        sample_shards.write_labels(seeds, np.arange(12) % 2, ("1", "10"), tmp_path / "images")
    source = open_source(f"folder:{tmp_path / 'images'}")
    assert (
        source.names == [f"{seed:010d}.png" for seed in range(5, 17)]
        and source.labels == [0, 1] * 6
    )
    assert source.class_names == ("1", "10")
    assert np.asarray(source.reader.load(source.names[3])).ravel().tolist() == [8]


def test_shard_that_cannot_be_written_raises(tmp_path):
    fake = FakeRelay(tiny_config("images"))
    fake.config = dataclasses.replace(
        fake.config, sampling=dataclasses.replace(fake.config.sampling, batch_size=4)
    )
    (tmp_path / f".{sample_shards._part_name(fake, np.arange(4))}.incomplete").mkdir()
    with pytest.raises(OSError, match="incomplete"):
        sample_shards.sample_in_parts(fake, np.arange(4), tmp_path, StopOnSignal())


def parts(folder) -> int:
    return len(list(folder.glob("samples/.parts-*/0*.npz")))


def test_shards_of_other_seeds_stay(tmp_path, caplog):
    caplog.set_level("INFO", logger="rdm_jax")
    with pytest.raises(Interrupted):
        sample(tmp_path, seeds="0-19", interrupted=True)
    sample(tmp_path, seeds="30")
    assert parts(tmp_path) == 1 and "1 finished batches of other seeds are kept" in caplog.text
    assert sample(tmp_path, seeds="0-19") == list(range(8, 20))
    assert seeds_of(tmp_path / "samples") == [30, *range(20)] and not list(
        tmp_path.glob("samples/.parts-*")
    )


@pytest.mark.parametrize("files", ["npz", "png"])
def test_shards_are_used_after_other_seeds(tmp_path, files):
    with pytest.raises(Interrupted):
        sample(tmp_path, files=files, seeds="0-19", interrupted=True)
    assert sample(tmp_path, files=files, seeds="6,20,2-3") == [20]
    assert sample(tmp_path, files=files, seeds="0-19") == list(range(8, 20))
    assert not list(tmp_path.glob("samples/.parts-*"))
    if files == "npz":
        assert seeds_of(tmp_path / "samples") == [6, 20, 2, 3, 0, 1, 4, 5, *range(7, 20)]
    else:
        source = open_source(f"folder:{tmp_path}/samples/images")
        assert [int(np.asarray(source.reader.load(name)).flat[0]) for name in source.names] == list(
            range(21)
        )


@pytest.mark.parametrize(
    "other", [{"labels": "0"}, {"steps": (10, 30)}], ids=["settings", "checkpoints"]
)
def test_shards_of_other_settings_stay_and_are_logged(tmp_path, other, caplog):
    caplog.set_level("INFO", logger="rdm_jax")
    with pytest.raises(Interrupted):
        sample(tmp_path, seeds="0-19", interrupted=True)
    (kept,) = tmp_path.glob("samples/.parts-*")
    before = contents(kept)
    assert sample(tmp_path, seeds="0-3", **other) == [0, 1, 2, 3]
    assert contents(kept) == before and list(tmp_path.glob("samples/.parts-*")) == [kept]
    said = "sampling.labels was 'balanced' and is '0'" if "labels" in other else "checkpoints was"
    assert f"finished batches of an interrupted run are kept in {kept} ({said}" in caplog.text


def test_shard_that_is_damaged_is_sampled_again(tmp_path):
    with pytest.raises(Interrupted):
        sample(tmp_path, seeds="0-19", interrupted=True)
    (part,) = tmp_path.glob("samples/.parts-*/0*.npz")
    part.write_bytes(part.read_bytes()[:-30])
    assert sample(tmp_path, seeds="0-9") == list(range(10))
    assert seeds_of(tmp_path / "samples") == list(range(10)) and not part.exists()
