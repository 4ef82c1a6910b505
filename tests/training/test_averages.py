"""Averages of several lengths: tracked, saved, resumed, and reconstructed after the training."""

import shutil
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rdm_jax.checkpoints import averages, folders, profiles, store
from rdm_jax.checkpoints.profiles import average_names
from rdm_jax.config import Config
from rdm_jax.runtime import sharding
from rdm_jax.runtime.errors import InputError, Interrupted
from rdm_jax.runtime.signals import StopOnSignal
from rdm_jax.training.loop import Trainer
from rdm_jax.training.step import power_weight
from tests.support.checkpoints import assert_equal, read_arrays, steps
from tests.support.configs import tiny_config
from tests.support.image_sets import image_set

KEPT, TRACKED, STEPS = (0.05, 0.1), 0.15, 32
TRAINING = {
    "images": 256,
    "checkpoint_every": 10**6,
    "preview_every": 0,
    "validation": 8,
    "log_every": 80,
    "averages": (*KEPT, TRACKED),
    "snapshot_every": 16,
}


def config(**training) -> Config:
    return tiny_config("nowhere", **TRAINING | training)


def train(workdir: Path, values: Config, stop: StopOnSignal | None = None) -> Trainer:
    trainer = Trainer(values, 1, image_set(), workdir / "stage1")
    trainer.run(stop or StopOnSignal())
    return trainer


def snapshots(workdir: Path) -> dict[int, dict[str, np.ndarray]]:
    """The arrays of all snapshots by their steps."""
    found = folders.step_folders(workdir / "stage1" / "snapshots")
    return {int(folder.name): read_arrays(folder / "averages") for folder in found}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of 32 steps that keeps two widths, and tracks a third one."""
    workdir = tmp_path_factory.mktemp("trained")
    train(workdir, config())
    return workdir


@pytest.mark.parametrize("width", [0.02, 0.1, 0.28])
def test_power_weight_gives_the_power_function(width):
    """Also where the batch size changes: images count."""
    sizes = [8] * 20 + [24] * 10
    random = np.random.default_rng(0)
    values, seen, average = random.normal(size=len(sizes)), 0, 0.0
    ends = np.cumsum([0, *sizes]) / sum(sizes)
    for size, value in zip(sizes, values, strict=True):
        seen += size
        weight = power_weight(jnp.float32(seen), batch_size=size, width=width)
        average += float(weight) * (value - average)
    wanted = np.diff(ends ** (profiles.exponent(width) + 1)) @ values
    assert average == pytest.approx(wanted, rel=1e-5)


@pytest.mark.long
def test_reconstruction_equals_the_average_tracked_directly(trained):
    """The third width from the snapshots of the other two, on a network's own training."""
    directory = trained / "stage1/checkpoints"
    about = folders.read_about(directory / str(STEPS))
    about["stage"]["training"]["averages"] = list(KEPT)
    own = [averages.Part(directory, STEPS, "averages", name) for name in average_names(KEPT)]
    chosen = averages._reconstructed(TRACKED, own, about, "average")
    assert len(chosen.snapshots) > 12 and chosen.snapshots[-1] == STEPS
    network = config().stage(1).build(3, 2)
    abstract = store.with_sharding(network.abstract, sharding.replicated(sharding.local_mesh()))
    found = jax.tree.leaves(jax.device_get(chosen.read(abstract)))
    kept = read_arrays(directory / str(STEPS) / "averages")
    wanted = [value for name, value in kept.items() if "average2" in name]
    nearest = [value for name, value in kept.items() if "average1" in name]
    train = read_arrays(directory / str(STEPS) / "train")
    parameters = [value for name, value in train.items() if name.startswith("['params']")]
    # Of the parameters, and of what averaging changes in them.
    error = _distance(found, wanted)
    assert error < 1e-4 * _norm(wanted)
    assert error < 0.02 * _distance(parameters, wanted)
    assert error < 0.1 * _distance(nearest, wanted)


def _norm(arrays) -> float:
    return float(np.sqrt(sum((np.asarray(array, np.float64) ** 2).sum() for array in arrays)))


def _distance(some, others) -> float:
    return _norm(a.astype(np.float64) - b for a, b in zip(some, others, strict=True))


@pytest.mark.long
@pytest.mark.parametrize("last", [13, 14])
def test_snapshots_survive_an_interruption(trained, tmp_path, monkeypatch, last):
    """Bit for bit, whether the run ends between two snapshots or at one (step 14)."""
    values, stop, taken = config(), StopOnSignal(), []
    trainer = Trainer(values, 1, image_set(), tmp_path / "stage1")
    step = type(trainer._program).__call__

    def signalled(self, running, batch):
        taken.append(len(taken) + 1)
        if taken[-1] == last:
            stop.requested = signal.SIGTERM
        return step(self, running, batch)

    monkeypatch.setattr(type(trainer._program), "__call__", signalled)
    with pytest.raises(Interrupted):
        trainer.run(stop)
    monkeypatch.undo()
    assert max(snapshots(tmp_path)) == 12 and taken[-1] == last
    train(tmp_path, values)
    assert_same_snapshots(tmp_path, trained)


@pytest.mark.long
def test_snapshots_survive_lost_work(trained, tmp_path):
    """As after SIGKILL: snapshots are newer than the checkpoint that training resumes from. They are
    made again, and one that has no place there does not stay."""
    short = config(images=160, checkpoint_every=80, keep_newest=9)
    train(tmp_path, short)
    (tmp_path / "stage1/checkpoints/20").rename(tmp_path / "lost")
    folder = tmp_path / "stage1/snapshots"
    shutil.copytree(folder / "20", folder / "23")
    shutil.rmtree(folder / "14")
    shutil.copytree(folder / "12", folder / "14")
    assert steps(tmp_path) == [10] and max(snapshots(tmp_path)) == 23
    train(tmp_path, config())
    assert_same_snapshots(tmp_path, trained)


def assert_same_snapshots(workdir: Path, other: Path) -> None:
    ours, theirs = snapshots(workdir), snapshots(other)
    assert sorted(ours) == sorted(theirs) == list(range(2, STEPS + 1, 2))
    for step, arrays in ours.items():
        assert_equal(arrays, theirs[step])
    last = [folder / f"stage1/checkpoints/{STEPS}/averages" for folder in (workdir, other)]
    assert_equal(*map(read_arrays, last))


@pytest.mark.second
def test_retention_of_checkpoints_keeps_snapshots(trained):
    """A snapshot makes no checkpoint."""
    assert steps(trained) == [STEPS] and len(snapshots(trained)) == STEPS // 2


@pytest.mark.second
def test_widths_cannot_change_within_a_run(trained):
    before = snapshots(trained).keys()
    with pytest.raises(InputError, match=r"training.averages was .* Use another workdir\."):
        train(trained, config(averages=(0.1, 0.2)))
    assert snapshots(trained).keys() == before


@pytest.mark.second
def test_run_without_averages_has_no_snapshots(tmp_path):
    train(tmp_path, config(images=16, averages=()))
    assert {path.name for path in (tmp_path / "stage1/checkpoints/2").iterdir()} >= {"ema", "train"}
    assert not (tmp_path / "stage1/checkpoints/2/averages").exists()
    assert not (tmp_path / "stage1/snapshots").exists()
