"""The training loop: signals, checkpoints by time, changes of the config."""

import contextlib
import dataclasses
import json
import shutil
import signal
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rdm_jax.checkpoints import checksums, folders, store
from rdm_jax.config import Config
from rdm_jax.data.image_sets import ImageSet
from rdm_jax.runtime.errors import InputError, Interrupted
from rdm_jax.runtime.signals import StopOnSignal
from rdm_jax.training import metric_writer
from rdm_jax.training.count import Count
from rdm_jax.training.loop import Trainer
from rdm_jax.training.optimizer import build_optimizer
from rdm_jax.training.validation import Validation
from tests.support.configs import tiny_config
from tests.support.image_sets import image_set

QUIET = {
    "images": 80,
    "checkpoint_every": 10**6,
    "preview_every": 0,
    "validation": 8,
    "keep_newest": 9,
    "log_every": 8,
}


class Previews:
    """A probe that calls `preview` and does not evaluate."""

    evaluates = False

    def __init__(self, preview):
        self.preview = preview

    def evaluate(self, *_):
        raise AssertionError("nothing is evaluated")


def config(**training) -> Config:
    return tiny_config("nowhere", **QUIET | training)


def train(
    directory: Path,
    values: Config,
    *,
    images: ImageSet | None = None,
    allow=(),
    stop=None,
    preview=None,
) -> None:
    trainer = Trainer(values, 1, images or image_set(), directory, allow_changes=allow)
    trainer.run(stop or StopOnSignal(), Previews(preview) if preview else None)


def about(directory: Path, step: int) -> dict:
    return folders.read_about(directory / "checkpoints" / str(step))


def steps(directory: Path) -> list[int]:
    return sorted(int(folder.name) for folder in folders.step_folders(directory / "checkpoints"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of 80 images in batches of 8."""
    directory = tmp_path_factory.mktemp("trained") / "stage1"
    train(directory, config())
    return directory


@pytest.fixture
def saves(monkeypatch):
    """The (step, time) at which each save started."""
    began, save = [], store.Checkpoints.save

    def noted(self, state, known):
        began.append((int(state.step), time.monotonic()))
        save(self, state, known)

    monkeypatch.setattr(store.Checkpoints, "save", noted)
    return began


@pytest.mark.second
def test_signal_saves_before_anything_else(tmp_path, monkeypatch, saves):
    """Nothing is validated, drawn or compiled between a signal and its checkpoint.

    Metrics, whose tracker may take a while, are closed last.
    """
    stop, asked, closed = StopOnSignal(), [], []
    for part in (store.Checkpoints, metric_writer.MetricWriter):

        def close(self, *, real=part.close, **hurried):
            closed.append((type(self), hurried))
            real(self, **hurried)

        monkeypatch.setattr(part, "close", close)
    program = Trainer(config(), 1, image_set(), tmp_path)
    step = type(program._program).__call__

    def signalled(self, state, batch):
        if len(asked) == 3:
            stop.requested = signal.SIGTERM
        asked.append(time.monotonic())
        return step(self, state, batch)

    monkeypatch.setattr(type(program._program), "__call__", signalled)
    monkeypatch.setattr(Validation, "loss", lambda *_: time.sleep(600))
    with pytest.raises(Interrupted):
        program.run(stop)
    assert closed == [(store.Checkpoints, {}), (metric_writer.MetricWriter, {"hurried": True})]
    assert [number for number, _ in saves] == [4] and saves[0][1] - asked[3] < 1
    assert about(tmp_path, 4)["validation_loss"] is None and not (tmp_path / "loss.png").exists()
    assert max(line["images"] for line in metric_writer.read(tmp_path / "metrics.jsonl")) == 32


@pytest.mark.second
def test_signal_ends_validation(tmp_path, monkeypatch, saves):
    stop, signalled, parts = StopOnSignal(), [], Validation._parts

    def slow(self):
        for number, part in enumerate(parts(self)):
            time.sleep(0.2)
            if number == 2:
                stop.requested = signal.SIGTERM
                signalled.append(time.monotonic())
            yield part

    monkeypatch.setattr(Validation, "_parts", slow)
    with pytest.raises(Interrupted):  # instead of ten seconds of validation, and a preview
        values = config(validation=400, checkpoint_every=16, preview_every=16)
        train(tmp_path, values, stop=stop, preview=lambda *_: time.sleep(600))
    assert [number for number, _ in saves] == [2] and saves[0][1] - signalled[0] < 1


@pytest.mark.second
def test_preview_follows_checkpoint(tmp_path, saves):
    """A sampler may take minutes to compile, during which signals are not handled."""
    drawn = []
    train(
        tmp_path,
        config(preview_every=32),
        preview=lambda params, path: drawn.append((path.stem, saves[-1][0])),
    )
    assert drawn == [("0000000032", 4), ("0000000064", 8), ("0000000080", 10)]


@pytest.mark.second
@pytest.mark.parametrize("minutes, saved", [(1e-9, list(range(2, 11))), (30.0, [10])])
def test_checkpoints_by_time(tmp_path, minutes, saved, saves):
    train(tmp_path, config(checkpoint_minutes=minutes))
    found = [number for number, _ in saves]
    assert set(saved) <= set(found) <= {1, *saved}


@pytest.mark.second
def test_resume_hashes_the_newest_checkpoint_once(trained, monkeypatch):
    read, sha256 = [], checksums.sha256
    monkeypatch.setattr(checksums, "sha256", lambda path: read.append(path) or sha256(path))
    before = (trained / "checkpoints/10/checksums.json").read_text()
    train(trained, config())  # restores it and has nothing to do
    assert sorted(str(path.relative_to(trained / "checkpoints/10")) for path in read) == sorted(
        json.loads(before)
    )


def test_resume_refuses_other_changes(trained):
    for changed, says in (
        (
            {"learning_rate": 1e-4},
            "learning_rate was 0.001 and is 0.0001.*--allow_changes=learning_rate",
        ),
        ({"batch_size": 16}, "batch_size was 8 and is 16.*--allow_changes=batch_size"),
        ({"label_dropout": 0.5}, "label_dropout was 0.1 and is 0.5"),
    ):
        with pytest.raises(InputError, match=says):
            train(trained, config(images=160, **changed))
        with pytest.raises(InputError, match=says):
            train(trained, config(images=160, **changed), allow=["ema_halflife"])
    values = config(images=160)
    network = dataclasses.replace(values.stages[0].network, dropout=0.5, patch=2)
    values = dataclasses.replace(
        values, stages=(dataclasses.replace(values.stages[0], network=network), *values.stages[1:])
    )
    with pytest.raises(InputError, match="patch was 1 and is 2.*Use another workdir"):
        train(trained, values, allow=["dropout", "patch", "network"])


@pytest.mark.second
def test_resume_with_allowed_changes(trained, tmp_path, caplog):
    """80 images in batches of 8, then 80 in batches of 16; each epoch is still complete."""
    directory = copied(trained, tmp_path)
    values, seen = config(images=160, batch_size=16, learning_rate=1e-4), []
    trainer = Trainer(
        values, 1, image_set(), directory, allow_changes=["batch_size", "training.learning_rate"]
    )
    build = trainer._build

    def recording(program):
        put = program.put

        def record(batch):
            seen.append(batch["image"])
            return put(batch)

        program.put = record
        return program

    recording(trainer._program)
    trainer._build = lambda: recording(build())
    trainer.run(StopOnSignal())
    assert steps(directory) == [10, 15]
    known = about(directory, 15)
    assert known["count"] == {"step": 10, "images": 80} and known["data"] == {"next_index": 15}
    assert {
        (each["field"].rpartition(".")[2], each["was"], each["now"], each["step"])
        for each in known["changes"]
    } == {
        ("batch_size", 8, 16, 10),
        ("learning_rate", 1e-3, 1e-4, 10),
    }
    assert (
        "stage1: from step 10 (80 images) on, config.stage1.training.batch_size was 8 and is 16"
        in caplog.text
    )
    lines = metric_writer.read(directory / "metrics.jsonl")
    assert [line["images"] for line in lines if "loss" in line] == [
        *range(8, 81, 8),
        *range(96, 161, 16),
    ]
    # Images 80 to 95 are the last 16 of the fourth epoch of 24.
    order = np.random.default_rng((trainer._data_seed, 3)).permutation(24)
    np.testing.assert_array_equal(seen[0], image_set().batch(order[8:])["image"])
    train(directory, values)  # the change is part of the run now
    with pytest.raises(InputError, match="batch_size was 16 and is 8"):
        train(directory, config(images=240))


def copied(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "stage1"))


def test_finished_stage_ignores_other_images(trained, caplog):
    """Images added for the second stage do not affect the first one."""
    caplog.set_level("INFO", "rdm_jax")
    train(trained, config(), images=image_set(seed=1))
    assert "already trained on 80 images" in caplog.text and "identity" not in caplog.text


def test_learning_rate_continues_from_the_images_shown():
    """The warm-up counts images: with another batch size it continues where it was."""

    def rates(batch_size: int, count: Count) -> list[float]:
        optimizer = build_optimizer(
            config(warmup=80, batch_size=batch_size, learning_rate=1.0).stages[0].training, count
        )
        state = optimizer.init(jnp.zeros(()))
        found = []
        for step in range(20):
            update, state = optimizer.update(jnp.ones(()), state)
            found.append(-float(update)) if step >= count.step else None
        return found

    assert rates(16, Count(16))[:6] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1], rel=1e-3)
    assert rates(8, Count(16).changed(8, 6)) == pytest.approx([1.0] * 14, rel=1e-3)
    assert rates(16, Count(8).changed(16, 4))[:4] == pytest.approx([0.4, 0.6, 0.8, 1], rel=1e-3)


@pytest.mark.second
def test_resume_notices_other_images(trained, tmp_path, monkeypatch):
    """Losses on different images are not compared either."""
    directory = copied(trained, tmp_path)
    other = image_set(seed=1)
    for images in (other, image_set(count=32)):
        with pytest.raises(
            InputError,
            match="data.images.identity was .*Use another workdir, or .*--allow_changes=data",
        ):
            train(directory, config(images=160), images=images)
    monkeypatch.setattr(Validation, "loss", lambda *_: 100.0)
    train(
        directory,
        config(images=160, keep_newest=1, keep_best=1, checkpoint_every=40),
        images=other,
        allow=["data"],
    )
    assert about(directory, 20)["images"]["identity"] == other.identity
    assert 10 not in steps(directory)  # though its loss, of other images, was lower
    assert about(directory, 20)["validated_on"] != about(trained, 10)["validated_on"]


@pytest.mark.parametrize(
    "classes, kept",
    [
        (("a", "b"), True),
        pytest.param(("b", "a"), False, marks=pytest.mark.second),
        pytest.param(("c", "d"), False, marks=pytest.mark.second),
    ],
)
def test_start_from_keeps_embedding_of_same_classes(trained, tmp_path, caplog, classes, kept):
    caplog.set_level("INFO", "rdm_jax")
    images = image_set()
    images.class_names = classes
    values = config(start_from=str(trained / "checkpoints/10"))
    trainer = Trainer(values, 1, images, tmp_path / "stage1")
    with contextlib.closing(store.Checkpoints(tmp_path / "stage1/checkpoints")) as checkpoints:
        ours = trainer._start(checkpoints).state.ema
    with contextlib.closing(store.Checkpoints(trained / "checkpoints", read_only=True)) as given:
        theirs, _ = given.restore_ema(10, trainer.abstract.ema)
    same = [
        np.array_equal(*pair)
        for pair in zip(
            *(jax.tree.leaves(tree["map_label"]) for tree in (ours, theirs)), strict=True
        )
    ]
    assert all(same) == kept and ("class embedding re-initialised" in caplog.text) == (not kept)
    np.testing.assert_array_equal(ours["stem"]["kernel"], theirs["stem"]["kernel"])
