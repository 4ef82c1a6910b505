"""Runs in a bucket: killed, resumed elsewhere, sampled and evaluated as in a local folder."""

import functools
import json
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from rdm_jax.checkpoints import folders
from rdm_jax.training import metric_writer
from tests.support.checkpoints import assert_equal, state
from tests.support.commands import STAGE, environment, error_line, run, start, stop_when, wait_for
from tests.support.configs import write_images
from tests.support.object_store import ObjectStore, serving

# The last bits of one image measured twice are the same.
FLAGS = [
    "--config.evaluation.features=classifier",
    "--config.evaluation.images=samples",
    "--config.evaluation.batch_size=8",
    "--config.data.held_out=8",
]


@pytest.fixture(scope="module")
def server():
    """A store with one bucket."""
    pytest.importorskip("gcsfs")
    with serving("bucket") as server:
        yield server


class Machine:
    """A host: its home, its temporary files and its images are its own."""

    def __init__(self, folder: Path, server: ObjectStore, devices: int = 1):
        self.folder, self.images = folder, folder / "images"
        write_images(self.images, count=32)
        for name in ("home", "tmp"):
            (folder / name).mkdir()
        own = {"HOME": str(folder / "home"), "TMPDIR": str(folder / "tmp")}
        env = environment(devices, **server.environment, **own)
        self.run = functools.partial(run, self.images, env=env)
        self.start = functools.partial(start, self.images, env=env)


@pytest.fixture
def machine(tmp_path, server):
    """Makes machines by name."""
    return lambda name, **options: Machine(_made(tmp_path / name), server, **options)


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def saved(
    server: ObjectStore, workdir: str, step: int, stage: str = "stage1"
) -> Callable[[], bool]:
    """Whether a bucket has a whole checkpoint."""
    name = f"{workdir}/{stage}/checkpoints/{step}/commit_success.txt"
    return lambda: name in server.buckets["bucket"]


def downloaded(server: ObjectStore, workdir: str, folder: Path) -> Path:
    """Copies a workdir from the bucket."""
    for name in server.names("bucket", f"{workdir}/"):
        path = folder / name.removeprefix(f"{workdir}/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(server.buckets["bucket"][name].data)
    return folder


def losses(workdir: Path, stage: str) -> list[tuple]:
    """What metrics.jsonl has, but for the times."""
    lines = metric_writer.read(workdir / stage / "metrics.jsonl")
    return [(line["step"], line.get("loss"), line.get("validation_loss")) for line in lines]


def check_equal(one: Path, other: Path, *stages: str) -> None:
    for stage in stages:
        assert_equal(state(one, stage=stage), state(other, stage=stage))
        assert losses(one, stage) == losses(other, stage)


@pytest.mark.long
def test_run_killed_and_resumed_elsewhere_equals_a_local_one(machine, server, tmp_path):
    here, there = machine("here"), machine("there")
    here.run(tmp_path / "local", *FLAGS)
    server.buckets["bucket"] = {}
    for stage in ("stage1", "stage2"):
        process = here.start("gs://bucket/run", *FLAGS)
        assert (
            stop_when(saved(server, "run", 10, stage), process, signal.SIGKILL) == -signal.SIGKILL
        )
    stdout, _ = there.run("gs://bucket/run", *FLAGS)
    assert "stage1: already trained" in stdout and "stage2: resuming from" in stdout
    assert "gs://bucket/run/samples" in stdout and str(there.folder / "tmp") not in stdout
    assert not list((there.folder / "tmp").glob("rdm_jax-*"))  # nothing stays on the machine

    copy = downloaded(server, "run", tmp_path / "copy")
    check_equal(tmp_path / "local", copy, "stage1", "stage2")
    assert [path.name for path in folders.step_folders(copy / "stage2/checkpoints")]
    ours, theirs = (np.load(each / "samples/samples.npz") for each in (copy, tmp_path / "local"))
    np.testing.assert_array_equal(ours["images"], theirs["images"])
    ours, theirs = (
        json.loads((each / "evaluation/evaluation.json").read_text())["results"]
        for each in (copy, tmp_path / "local")
    )
    assert ours == theirs
    assert (copy / "contact_sheet.png").is_file() and (copy / "stage1/loss.png").is_file()
    assert list((copy / "stage2/tensorboard").glob("events.*"))

    # From the bucket alone, and a copy of it is a workdir.
    before = set(server.names("bucket"))
    elsewhere = machine("elsewhere")
    more = ("--config.sampling.seeds=0-13", "--config.evaluation.seeds=0-11")
    elsewhere.run("gs://bucket/run", *FLAGS, "--mode=sample", *more)
    elsewhere.run("gs://bucket/run", *FLAGS, "--mode=evaluate", "--config.evaluation.name=again")
    elsewhere.run("gs://bucket/run", *FLAGS, "--mode=report")
    new = set(server.names("bucket")) - before
    assert {"run/again/evaluation.json", "run/report/report.md", "run/samples/grid-2.png"} <= new
    assert not any("parts" in name or "incomplete" in name for name in new)
    stdout, _ = here.run(copy, *FLAGS)
    assert "stage2: already trained" in stdout


@pytest.mark.long
def test_two_runs_and_a_store_that_fails(machine, server, tmp_path):
    """The second run is refused. A save that fails is skipped, and training goes on."""
    here, there = machine("here"), machine("there")
    first = here.start("gs://bucket/fails", *STAGE)
    assert wait_for(saved(server, "fails", 5), first)
    _, stderr = there.run("gs://bucket/fails", *STAGE, status=2)
    assert "--workdir='gs://bucket/fails' is in use by another run (process" in error_line(stderr)
    server.answer = lambda method, path: 403 if "/checkpoints/10/" in path else 0
    stdout, stderr = first.communicate(timeout=300)
    server.answer = lambda method, path: 0
    assert first.returncode == 0, stderr
    assert "checkpoint gs://bucket/fails/stage1/checkpoints/10 cannot be written" in stdout
    here.run(tmp_path / "local", *STAGE)
    copy = downloaded(server, "fails", tmp_path / "copy")
    check_equal(tmp_path / "local", copy, "stage1")
    assert [*folders.step_folders(tmp_path / "local/stage1/checkpoints")]

    server.answer = lambda method, path: 403
    _, stderr = there.run("gs://bucket/fails", *STAGE, status=2)
    assert "gs://bucket cannot be read (Forbidden" in error_line(stderr)
    server.answer = lambda method, path: 0


@pytest.mark.long
def test_two_machines_share_nothing_but_the_bucket(machine, server, tmp_path):
    """They are killed, and one of their size goes on; so do two, and sample and evaluate."""
    two = [machine(name, devices=2) for name in ("first", "second")]
    one = machine("one", devices=4)
    weights = tmp_path / "classifier.safetensors"
    one.run(tmp_path / "local", *FLAGS)
    (tmp_path / "local/classifier.safetensors").rename(weights)
    flags = [*FLAGS, f"--config.evaluation.weights={weights}"]

    def start_all(*more: str):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            where = [f"--coordinator=localhost:{free.getsockname()[1]}", "--processes=2"]
        return [
            each.start("gs://bucket/two", *flags, *more, *where, f"--process={number}")
            for number, each in enumerate(two)
        ]

    pair = start_all(*STAGE)
    assert wait_for(saved(server, "two", 10), pair[0], timeout=400)
    for process in pair:
        process.kill()
        process.communicate()
    stdout, _ = one.run("gs://bucket/two", *flags, *STAGE)
    assert "stage1: resuming from" in stdout
    pair = start_all()
    outputs = [process.communicate(timeout=600) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], outputs
    assert "evaluation: reusing the samples in gs://bucket/two/samples" in outputs[0][0]
    copy = downloaded(server, "two", tmp_path / "copy")
    for stage in ("stage1", "stage2"):
        ours, theirs = (state(each, stage=stage) for each in (copy, tmp_path / "local"))
        for name, value in theirs.items():
            np.testing.assert_allclose(ours[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    assert len(np.load(copy / "samples/samples.npz")["images"]) == 12
