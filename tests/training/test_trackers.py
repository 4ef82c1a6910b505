"""Trackers: what they get, that a resumed run is the same one, and that their failures stop nothing."""

import dataclasses
import sys
import threading
import time
from types import ModuleType, SimpleNamespace

import pytest

from rdm_jax.modes import run
from rdm_jax.runtime.errors import InputError, Interrupted
from rdm_jax.training import metric_writer, trackers
from tests.support.configs import tiny_config


def config_of(folder="images", **training):
    return dataclasses.replace(tiny_config(folder, **training), tracker="wandb")


class FakeRun:
    """Keeps what is logged; `failing` names methods that raise."""

    def __init__(self, failing=()):
        self.logged, self.finished, self._failing = [], 0, failing

    def define_metric(self, name, step_metric):
        self.metrics = {name: step_metric}

    def log(self, values):
        if "log" in self._failing:
            raise ConnectionError("no network")
        self.logged.append(values)

    def finish(self):
        self.finished += 1


@pytest.fixture
def fake(monkeypatch):
    """The library without a network: its runs, and the arguments that opened them."""
    module, made = ModuleType("wandb"), SimpleNamespace(runs=[], opened=[], failing=())

    def init(**arguments):
        if "init" in made.failing:
            raise TimeoutError("the server does not answer")
        made.opened.append(arguments)
        made.runs.append(FakeRun(made.failing))
        return made.runs[-1]

    made.settings = SimpleNamespace(mode="online", api_key="0" * 40, base_url="https://host.org")
    module.setup = lambda: made
    module.init, module.Image, module.Settings = init, lambda path: f"image {path}", dict
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr("rdm_jax.runtime.console.log.propagate", True)
    return made


def test_tracker_gets_metrics_and_pictures(fake, tmp_path):
    writer = metric_writer.open_writer(config_of(), tmp_path / "run/stage1", 0)
    writer.write(1, images=8, loss=0.5, grad_norm=float("nan"))
    writer.picture(tmp_path / "preview.png", 8)
    writer.close()
    (made,) = fake.runs
    assert made.logged == [
        {"step": 1, "images": 8, "loss": 0.5},
        {"images": 8, "preview": f"image {tmp_path / 'preview.png'}"},
    ]
    assert made.metrics == {"*": "images"} and made.finished == 1
    (opened,) = fake.opened
    assert opened["group"] == "run" and opened["name"] == "run/stage1"
    assert (
        opened["project"] == "rdm_jax" and opened["config"]["stage1"]["training"]["images"] == 160
    )


def test_resumed_training_continues_the_same_run(fake, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    for stage, step in (("stage1", 0), ("stage1", 1), ("stage2", 0)):
        metric_writer.open_writer(config_of(), tmp_path / stage, step).close()
    first, again, other = (opened["id"] for opened in fake.opened)
    assert first == again != other and len(first) == 8
    assert all(opened["resume"] == "allow" for opened in fake.opened)
    assert {opened["project"] for opened in fake.opened} == {"mine"}


@pytest.mark.parametrize(
    ("failing", "said"), [("init", "the server does not answer"), ("log", "no network")]
)
def test_failing_tracker_is_left(fake, tmp_path, caplog, failing, said):
    fake.failing = (failing,)
    writer = metric_writer.open_writer(config_of(), tmp_path, 0)
    for step in range(3):
        writer.write(step, images=8 * step)
    writer.close()
    assert [line["step"] for line in metric_writer.read(tmp_path / "metrics.jsonl")] == [0, 1, 2]
    assert caplog.text.count(f"tracker wandb: {said}; training continues without it") == 1


def test_waiting_tracker_is_left(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("rdm_jax.runtime.console.log.propagate", True)
    monkeypatch.setattr(trackers, "SECONDS_TO_CLOSE", 0.05)
    monkeypatch.setattr(trackers, "CALLS_THAT_WAIT", 2)
    answer = threading.Event()
    opened = SimpleNamespace(write=lambda values: answer.wait(), close=lambda: None)
    tracker = trackers.Background(lambda: opened, "slow")
    writer = metric_writer.MetricWriter(tmp_path, 0, tracker)
    for step in range(9):
        writer.write(step, images=8)
    writer.close()
    answer.set()
    assert len(metric_writer.read(tmp_path / "metrics.jsonl")) == 9
    assert "tracker slow: not finished in 0.05 s" in caplog.text


def test_interrupted_training_waits_less(tmp_path, monkeypatch):
    """And only when its checkpoints are closed (`Trainer.run`)."""
    monkeypatch.setattr(trackers, "SECONDS_IF_HURRIED", 0.05)
    answer = threading.Event()
    opened = SimpleNamespace(close=answer.wait)
    begun = time.monotonic()
    with (
        pytest.raises(Interrupted),
        metric_writer.MetricWriter(tmp_path, 0, trackers.Background(lambda: opened, "slow")),
    ):
        raise Interrupted(15)
    answer.set()
    assert time.monotonic() - begun < trackers.SECONDS_TO_CLOSE


def test_online_tracker_without_a_key_is_refused(fake, tmp_path, monkeypatch):
    """It would ask for one in its thread."""
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    trackers.check(config_of())
    fake.settings.api_key = None
    for text in ("", "machine github.com login me password 1"):
        (tmp_path / "netrc").write_text(text)
        with pytest.raises(InputError, match=r"no API key for https://host.org. Run 'wandb login'"):
            trackers.check(config_of())
    for host in ("host.org", "api.wandb.ai"):
        (tmp_path / "netrc").write_text(f"machine {host} login user password 1")
        trackers.check(config_of())
    (tmp_path / "netrc").unlink()
    fake.settings.mode = "offline"
    trackers.check(config_of())


def test_missing_library_is_refused_before_any_work(image_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match=r"wandb is not installed. Run pip install 'rdm_jax\[wan"):
        run(config_of(image_folder), tmp_path / "run", mode="train")
    assert not (tmp_path / "run/stage1").exists()
    run(config_of(image_folder), tmp_path / "run", mode="prepare")  # which tracks nothing


@pytest.mark.long
def test_training_is_tracked(fake, image_folder, tmp_path):
    """In the end it has each step's metrics and the preview; a finished run opens nothing."""
    config = config_of(image_folder, images=32, checkpoint_every=16, preview_every=32)
    for _ in range(2):
        run(config, tmp_path / "run", mode="train", stage=1)
    (made,) = fake.runs
    names = {name for values in made.logged for name in values}
    assert {"step", "images", "loss", "validation_loss", "images_per_second", "preview"} <= names
    lines = metric_writer.read(tmp_path / "run/stage1/metrics.jsonl")
    assert [values for values in made.logged if "step" in values] == lines
    assert made.logged[-1] == {
        "images": 32,
        "preview": f"image {tmp_path / 'run/stage1/previews/0000000032.png'}",
    }


@pytest.mark.second
def test_offline_run_is_kept_for_a_later_upload(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="needs pip install 'rdm_jax[wandb]'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for step in (0, 1):
        writer = metric_writer.open_writer(config_of(), tmp_path / "stage1", step)
        writer.write(step + 1, images=8 * (step + 1), loss=0.5)
        writer.close()
    named = (tmp_path / "stage1/wandb_id").read_text()
    files = sorted((tmp_path / "stage1").glob(f"wandb/offline-run-*-{named}/run-{named}.wandb"))
    assert files and all(path.stat().st_size > 100 for path in files)
    assert b"loss" in b"".join(path.read_bytes() for path in files)
