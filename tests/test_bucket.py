"""Runs in a bucket: killed, resumed elsewhere, sampled and evaluated as in a local folder."""

import functools
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from rdm_jax.data.image_sets import open_prepared
from rdm_jax.data.images import ImageSpec
from rdm_jax.data.prepare import prepare
from rdm_jax.evaluation import classifier as classifiers
from rdm_jax.training import metric_writer
from tests.support.checkpoints import assert_equal, state, steps
from tests.support.commands import STAGE, environment, error_line, run, start, wait_for
from tests.support.configs import write_images
from tests.support.object_store import ObjectStore, serving

LOAD = """
import numpy as np, rdm_jax
pipe = rdm_jax.load("gs://bucket/run")
other = "gs://bucket/run/stage1/checkpoints/10"
assert pipe.checkpoints[0]["step"] == 20 and pipe.sample(np.arange(2))[-1].shape == (2, 8, 12, 3)
assert rdm_jax.load("gs://bucket/run", stage1={"checkpoint": other}).checkpoints[0]["step"] == 10
"""


@pytest.fixture(scope="module")
def server():
    """A store with one bucket."""
    pytest.importorskip("gcsfs")
    with serving("bucket") as server:
        yield server


class Machine:
    """A host: its home, its temporary files and its prepared images are its own."""

    def __init__(self, folder: Path, images: Path, server: ObjectStore, devices: int = 1):
        self.folder = folder
        for name in ("home", "tmp"):
            (folder / name).mkdir()
        own = {"HOME": str(folder / "home"), "TMPDIR": str(folder / "tmp")}
        self.env = env = environment(devices, **server.environment, **own)
        self._prepared = f"--config.data.directory={folder}/prepared"
        self._run = functools.partial(run, images, env=env, timeout=1200)
        self._start = functools.partial(start, images, env=env)

    def run(self, workdir: str | Path, *flags: str, **options) -> tuple[str, str]:
        return self._run(workdir, self._prepared, *flags, **options)

    def start(self, workdir: str | Path, *flags: str) -> subprocess.Popen:
        return self._start(workdir, self._prepared, *flags)

    def python(self, script: str) -> None:
        subprocess.run([sys.executable, "-c", script], env=self.env, check=True, timeout=1200)


@pytest.fixture(scope="module")
def machine(image_folder, tmp_path_factory, server):
    """Makes machines."""
    folder = tmp_path_factory.mktemp
    return lambda **options: Machine(folder("machine"), image_folder, server, **options)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """The flags of an evaluation by a small classifier, which every machine has."""
    folder = tmp_path_factory.mktemp("classifier")
    write_images(folder / "images", count=32)
    learnt, held_out = open_prepared(
        prepare(f"folder:{folder}/images", folder / "prepared", ImageSpec(8, 12))
    ).split(8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classifiers, "IMAGES_SHOWN", 300)
        classifiers.classifier_space(learnt, held_out, folder / "network.safetensors", train=True)
    return [
        "--config.evaluation.features=classifier",
        "--config.evaluation.images=samples",
        "--config.evaluation.batch_size=8",
        f"--config.evaluation.weights={folder}/network.safetensors",
    ]


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


@pytest.fixture(scope="module")
def killed(machine, server, tmp_path_factory):
    """A run in gs://bucket/run, killed in each stage and resumed elsewhere, and one that was not.

    The folder of a copy of the one, that of the other, and the log of the last part.
    """
    here, there, folder = machine(), machine(), tmp_path_factory.mktemp("runs")
    here.run(folder / "local")
    for stage in ("stage1", "stage2"):
        process = here.start("gs://bucket/run")
        ready = saved(server, "run", 10, stage)
        assert wait_for(ready, process, timeout=1200)
        process.kill()
        process.communicate()
    stdout, _ = there.run("gs://bucket/run")
    assert not list((there.folder / "tmp").glob("rdm_jax-*"))  # nothing stays on the machine
    return downloaded(server, "run", folder / "copy"), folder / "local", stdout


@pytest.mark.long
def test_run_killed_and_resumed_elsewhere_equals_a_local_one(killed):
    copy, local, stdout = killed
    assert "stage1: already trained" in stdout and "stage2: resuming from" in stdout
    assert "-> gs://bucket/run/samples" in stdout
    check_equal(copy, local, "stage1", "stage2")
    ours, theirs = (np.load(each / "samples/samples.npz") for each in (copy, local))
    np.testing.assert_array_equal(ours["images"], theirs["images"])
    assert (copy / "contact_sheet.png").is_file() and (copy / "stage1/loss.png").is_file()
    assert list((copy / "stage2/tensorboard").glob("events.*"))
    for stage in ("stage1", "stage2"):  # a copy is a workdir
        assert steps(copy, stage) == steps(local, stage)


@pytest.mark.long
def test_a_run_in_a_bucket_is_sampled_and_evaluated(killed, machine, server, classifier):
    before, elsewhere = set(server.names("bucket")), machine()
    flags = [*classifier, "--config.sampling.seeds=0-13"]
    elsewhere.run("gs://bucket/run", *flags, "--mode=sample")
    stdout, _ = elsewhere.run("gs://bucket/run", *flags, "--mode=evaluate")
    assert "evaluation: reusing the samples in gs://bucket/run/samples" in stdout
    elsewhere.run("gs://bucket/run", *flags, "--mode=report")
    new = set(server.names("bucket")) - before
    assert {
        "run/evaluation/evaluation.json",
        "run/report/report.md",
        "run/samples/grid-2.png",
    } <= new
    assert not any("parts" in name or "incomplete" in name or ".gathered" in name for name in new)
    elsewhere.python(LOAD)


@pytest.mark.long
def test_two_runs_and_a_store_that_fails(machine, server, tmp_path):
    """The second run is refused. A save that fails is skipped, and training goes on."""
    here, there, seen = machine(), machine(), threading.Event()

    def answer(method: str, path: str) -> int:
        if "/checkpoints/10/" not in path:
            return 0
        seen.wait(600)  # the second run looks for a heartbeat of the first, which has not ended yet
        return 403

    server.answer = answer
    first = here.start("gs://bucket/fails", *STAGE)
    assert wait_for(saved(server, "fails", 5), first, timeout=1200)
    _, stderr = there.run("gs://bucket/fails", *STAGE, status=2)
    assert "--workdir='gs://bucket/fails' is in use by another run (process" in error_line(stderr)
    seen.set()
    stdout, stderr = first.communicate(timeout=1200)
    server.answer = lambda method, path: 0
    assert first.returncode == 0, stderr
    assert "checkpoint gs://bucket/fails/stage1/checkpoints/10 cannot be written" in stdout
    here.run(tmp_path / "local", *STAGE)
    copy = downloaded(server, "fails", tmp_path / "copy")
    check_equal(tmp_path / "local", copy, "stage1")

    server.answer = lambda method, path: 403
    _, stderr = there.run("gs://bucket/fails", *STAGE, status=2)
    assert "gs://bucket cannot be read (Forbidden" in error_line(stderr)
    server.answer = lambda method, path: 0


@pytest.mark.long
def test_two_machines_share_nothing_but_the_bucket(machine, server, classifier, tmp_path):
    """They are killed, and one of their size goes on; so do two, and sample and evaluate."""
    two, one = [machine(devices=2), machine(devices=2)], machine(devices=4)
    one.run(tmp_path / "local", *STAGE)

    def start_all(*more: str):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            where = [f"--coordinator=localhost:{free.getsockname()[1]}", "--processes=2"]
        return [
            each.start("gs://bucket/two", *classifier, *more, *where, f"--process={number}")
            for number, each in enumerate(two)
        ]

    pair = start_all(*STAGE)
    assert wait_for(saved(server, "two", 10), pair[0], timeout=1200)
    for process in pair:
        process.kill()
        process.communicate()
    stdout, _ = one.run("gs://bucket/two", *classifier, *STAGE)
    assert "stage1: resuming from" in stdout
    pair = start_all()
    outputs = [process.communicate(timeout=1200) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], outputs
    assert "evaluation: reusing the samples in gs://bucket/two/samples" in outputs[0][0]
    copy = downloaded(server, "two", tmp_path / "copy")
    ours, theirs = (state(each) for each in (copy, tmp_path / "local"))
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    assert len(np.load(copy / "samples/samples.npz")["images"]) == 12
    assert (copy / "evaluation/evaluation.json").is_file()
