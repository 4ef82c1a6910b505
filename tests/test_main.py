"""The command as a user runs it: from images to samples in small, stopped and continued, and
refusing what cannot work."""

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from absl.testing import flagsaver

from rdm_jax.checkpoints import store
from rdm_jax.config import parse
from rdm_jax.config.saved import read_saved
from rdm_jax.main import main
from rdm_jax.run import run as run_here
from rdm_jax.runtime.errors import InputError, Interrupted
from rdm_jax.training import metric_writer
from tests.support.configs import LOW, tiny_config, write_images
from tests.support.paths import ROOT
from tests.support.pictures import shows_a_curve, shows_images

ENVIRONMENT = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}


def command(images: Path, workdir: Path, *flags: str) -> list[str]:
    config = f"--config={ROOT}/tests/tiny.py:{images}"
    return [sys.executable, "-m", "rdm_jax.main", config, f"--workdir={workdir}", *flags]


def run(images: Path, workdir: Path, *flags: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(images, workdir, *flags), env=ENVIRONMENT, cwd=ROOT, text=True, capture_output=True
    )


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory):
    """An undisturbed run."""
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    done = run(images, workdir)
    assert done.returncode == 0, done.stderr
    return workdir, done


def test_everything_is_left_behind(finished, images):
    workdir, done = finished
    samples = np.load(workdir / "samples/samples.npz")
    assert samples["images"].shape == (12, 8, 12, 3) and samples["images"].dtype == np.uint8
    assert samples["stage1"].shape == (12, 4, 6, 3)
    assert samples["seeds"].tolist() == list(range(12)) and samples["labels"].tolist() == [0, 1] * 6
    for stage in ("stage1", "stage2"):
        assert shows_a_curve(workdir / stage / "loss.png")
        for picture in ("previews/0000000080.png", "previews/0000000160.png"):
            assert shows_images(workdir / stage / picture), picture
        assert list((workdir / stage / "tensorboard").glob("events.out.tfevents.*"))
        lines = metric_writer.read(workdir / stage / "metrics.jsonl")
        assert [line["images"] for line in lines if "loss" in line] == list(range(16, 161, 16))
        assert [line["images"] for line in lines if "validation_loss" in line] == [40, 80, 120, 160]
        assert {10, 15, 20} <= set(
            store.Checkpoints(workdir / stage / "checkpoints", read_only=True).steps()
        )
    for picture in ("samples/grid.png", "contact_sheet.png"):
        assert shows_images(workdir / picture), picture
    assert parse(read_saved(workdir / "config.json")) == tiny_config(images, low=LOW)
    for said in ("24 images", "compiled in", "images/s", "left", "network evaluations", "done"):
        assert said in done.stdout + done.stderr, said


def test_again_does_nothing_but_say_so(finished, images):
    workdir, _ = finished
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*.np*")}
    again = run(images, workdir)
    assert again.returncode == 0
    for said in ("stage1: already trained", "stage2: already trained", "12 images are already in"):
        assert said in again.stdout
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*.np*")} == before


def test_sampling_takes_seeds_classes_steps_and_guidance(finished, images):
    """Image 9 of the run is made again alone, and again as the only one of another class."""
    workdir, _ = finished
    flags = ["--mode=sample", "--config.sampling.seeds=9", "--config.sampling.batch_size=1"]
    alone = run(images, workdir, *flags, "--config.sampling.name=alone")
    assert alone.returncode == 0, alone.stderr
    old, new = np.load(workdir / "samples/samples.npz"), np.load(workdir / "alone/samples.npz")
    # Another batch size is another program, whose sums may differ in float32's last bits: one level
    # of uint8 at the most.
    assert np.abs(old["images"][9].astype(int) - new["images"][0]).max() <= 1
    flags += [
        "--config.sampling.labels=0",
        "--config.stage1.guidance=2.0",
        "--config.stage1.sampler.steps=4",
    ]
    other = run(
        images, workdir, *flags, "--config.sampling.name=other", "--config.stage2.checkpoint=10"
    )
    assert other.returncode == 0, other.stderr
    assert "stage2 from step 10" in other.stdout and "7 network evaluations" in other.stdout
    assert np.load(workdir / "other/samples.npz")["labels"].tolist() == [0]


def check_equal_states(one: Path, other: Path, *stages: str):
    """The final parameters, moments, counters and averages of two workdirs are equal to the last
    bit."""
    for stage in stages:
        for item in ("train", "ema"):
            ours, theirs = (
                read_arrays(workdir / stage / "checkpoints" / "20" / item)
                for workdir in (one, other)
            )
            assert ours.keys() == theirs.keys() and len(ours) > 30
            for name in ours:
                np.testing.assert_array_equal(
                    ours[name], theirs[name], err_msg=f"{stage} {item} {name}"
                )


def read_tree(item: Path) -> dict:
    """As NumPy arrays, wherever they were saved."""
    with ocp.PyTreeCheckpointer() as reader:
        args = jax.tree.map(
            lambda _: ocp.RestoreArgs(restore_type=np.ndarray),
            reader.metadata(item).item_metadata.tree,
        )
        return reader.restore(item, ocp.args.PyTreeRestore(restore_args=args))


def read_arrays(item: Path) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_flatten_with_path(read_tree(item))[0]
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def stop_when(process: subprocess.Popen, ready, signal_number: int) -> int:
    """Sends a signal as soon as `ready()`, and returns the exit status."""
    deadline = time.monotonic() + 120
    while not ready():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal_number)
    process.communicate(timeout=60)
    return process.returncode


def logged(workdir: Path, stage: str, images: int):
    """Whether the metrics of so many images are on disk."""
    return lambda: any(
        line["images"] >= images for line in metric_writer.read(workdir / stage / "metrics.jsonl")
    )


def test_killed_and_continued_is_bit_equal(finished, images, tmp_path):
    """kill -9 in the middle of each stage, off the checkpoints; SIGTERM in sampling's place is
    another test."""
    workdir = tmp_path / "killed"
    for stage in ("stage1", "stage2"):
        process = subprocess.Popen(
            command(images, workdir), env=ENVIRONMENT, cwd=ROOT, stdout=-1, stderr=-1
        )
        assert stop_when(process, logged(workdir, stage, 96), signal.SIGKILL) == -signal.SIGKILL
    done = run(images, workdir)
    assert done.returncode == 0 and "going on from" in done.stdout, done.stderr
    check_equal_states(workdir, finished[0], "stage1", "stage2")
    left, right = (
        np.load(workdir / "samples/samples.npz"),
        np.load(finished[0] / "samples/samples.npz"),
    )
    np.testing.assert_array_equal(left["images"], right["images"])


@pytest.mark.long  # tests/faults has a signal that is short
@pytest.mark.parametrize(
    "number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "CtrlC"]
)
def test_stopping_loses_nothing_and_goes_on_bit_equal(finished, images, tmp_path, number, status):
    workdir = tmp_path / "stopped"
    flags = ["--mode=train", "--stage=1", "--config.stage1.training.checkpoint_every=100000"]
    process = subprocess.Popen(
        command(images, workdir, *flags), env=ENVIRONMENT, cwd=ROOT, stdout=-1, stderr=-1
    )
    assert stop_when(process, logged(workdir, "stage1", 48), number) == status
    (step,) = store.Checkpoints(workdir / "stage1/checkpoints", read_only=True).steps()
    assert 6 <= step < 20  # saved where it stopped, far from any checkpoint
    assert (
        max(line["step"] for line in metric_writer.read(workdir / "stage1/metrics.jsonl")) == step
    )
    done = run(images, workdir, *flags)
    assert done.returncode == 0 and f"going on from {step * 8} images" in done.stdout, done.stderr
    check_equal_states(workdir, finished[0], "stage1")


def test_a_signal_when_all_is_done_is_not_lost(images, tmp_path, monkeypatch):
    """An experiment makes many runs in one process."""
    monkeypatch.setattr("rdm_jax.run._work", lambda *_: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Interrupted):
        run_here(tiny_config(images).to_config_dict(), str(tmp_path))


def test_bad_images_are_refused_or_left_out_and_listed(tmp_path):
    write_images(tmp_path / "images")
    (tmp_path / "images" / "a" / "000.png").write_bytes(b"no image")
    refused = run(tmp_path / "images", tmp_path / "run", "--mode=prepare")
    assert refused.returncode == 2 and refused.stderr.strip().splitlines()[-1].startswith(
        "error: image 'a/000.png'"
    )
    done = run(tmp_path / "images", tmp_path / "run", "--mode=prepare", "--skip_bad")
    assert done.returncode == 0, done.stderr
    assert (
        "1 of 24 entries are left out" in done.stdout
        and "23 images" in done.stdout
        and "std assumed: 0.5" in done.stdout
    )
    manifest = json.loads((tmp_path / "images_prepared" / "manifest.json").read_text())
    assert manifest["count"] == 23 and list(manifest["skipped"]) == ["a/000.png"]
    again = run(tmp_path / "images", tmp_path / "run", "--mode=prepare")
    assert again.returncode == 0 and "as they were written" in again.stdout


def test_diverged_run_stops_and_keeps_the_last_good_state(images, tmp_path):
    flags = [
        "--mode=train",
        "--stage=1",
        "--config.stage1.training.learning_rate=1e30",
        "--config.stage1.training.max_skipped=3",
    ]
    done = run(images, tmp_path / "run", *flags)
    assert done.returncode == 1
    assert (
        "3 steps in a row" in done.stderr
        and "learning_rate" in done.stderr
        and "Traceback" not in done.stderr
    )
    (step,) = store.Checkpoints(tmp_path / "run/stage1/checkpoints", read_only=True).steps()
    arrays = read_arrays(tmp_path / f"run/stage1/checkpoints/{step}/train")
    assert all(np.isfinite(value).all() for value in arrays.values())


REFUSED = {
    "unknown field": (["--config.stage1.network.chanels=8"], r"chanels.*channels"),
    "unknown flag": (["--wordkir=x"], "wordkir"),
    "wrong type": (["--config.stage1.training.images=many"], "images=many"),
    "not divisible by p": (
        ["--config.stage2.resolution=(9, 9)"],
        r"stage2.resolution=\(9, 9\).*divisible by 2",
    ),
    "not divisible by the stride": (
        ["--config.stage1.network.patch=3"],
        r"stage1.resolution=\(4, 6\).*stride",
    ),
    "stages that do not fit": (
        ["--config.stage1.resolution=(8, 8)"],
        r"stage2.resolution=\(8, 12\).*\(16, 16\)",
    ),
    "missing data": (
        ["--config.data.source=folder:/nowhere", "--config.data.directory={tmp}/new"],
        "/nowhere",
    ),
    "prepared otherwise": (["--config.data.channels=1"], r"images_prepared.*channels"),
    "missing config": (["--config=configs/nothing.py"], "nothing.py"),
    "class out of range": (["--config.sampling.labels=0,2"], r"labels='0,2'.*0 to 1"),
    "seed out of range": (["--config.sampling.seeds=0-4294967296"], "seeds='0-4294967296'"),
    "no seeds": (["--config.sampling.seeds=a-b"], "seeds='a-b'"),
    "stage that is not there": (["--mode=train", "--stage=3"], "--stage=3"),
    "stage without its mode": (["--stage=1"], "--stage=1 with --mode=all"),
    "stray word": (["config.seed=5"], "config.seed=5.*--config.seed=5 would do"),
    "checkpoint that is not there": (["--config.stage2.checkpoint=/nowhere/9"], "/nowhere/9"),
    "checkpoint of no kind": (["--config.stage2.checkpoint=bset"], "checkpoint='bset'"),
    "nothing to sample from": (["--mode=sample"], r"/run' does not exist.*training first"),
    "guidance without dropout": (
        ["--config.stage1.guidance=2.0", "--config.stage1.training.label_dropout=0.0"],
        r"stage1.guidance=2.0.*label_dropout",
    ),
}


def check_refused(status: int, stderr: str, pattern: str):
    assert status == 2, stderr
    (line,) = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert re.search(pattern, line) and "Traceback" not in stderr


@pytest.fixture
def refused(capsys, monkeypatch):
    """Runs the command in this process and checks that it is refused by one sentence."""

    def call(arguments: list[str], pattern: str):
        monkeypatch.setattr(sys, "argv", ["main", *arguments[3:]])
        with flagsaver.flagsaver():
            status = main()
        check_refused(status, capsys.readouterr().err, pattern)

    return call


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_sentence(finished, images, tmp_path, refused, case):
    flags, pattern = REFUSED[case]
    refused(
        command(
            images, tmp_path / "run", *[flag.replace("{tmp}", str(tmp_path)) for flag in flags]
        ),
        pattern,
    )
    assert not list((tmp_path / "run").rglob("checkpoints"))


def test_a_refused_run_leaves_the_workdir_as_it_was(images, tmp_path, refused):
    wrong = ["--config.stage1.network.channels=16", "--config.sampling.labels=7"]
    refused(command(images, tmp_path / "run", *wrong), r"labels='7'")
    assert not (tmp_path / "run/config.json").exists()


def test_checkpoint_of_a_network_of_the_same_shape_is_refused(finished, images, refused):
    flags = ["--mode=sample", "--config.sampling.name=again"]
    workdir = finished[0]
    path = f"--config.stage1.checkpoint={workdir}/stage2/checkpoints/20"  # the same network, trained on another process
    refused(command(images, workdir, *flags, path), r"stage1.process.*of another network")


def test_another_config_in_the_same_workdir_is_refused(finished, images, refused):
    workdir, _ = finished
    before = (workdir / "config.json").read_text()
    refused(
        command(images, workdir, "--config.stage2.network.channels=16"),
        r"stage2.network.channels was 8 and is 16",
    )
    assert (workdir / "config.json").read_text() == before


def test_batch_that_devices_cannot_share_is_refused(images, tmp_path, refused):
    flags = ["--config.stage2.training.batch_size=12"]
    refused(
        command(images, tmp_path / "run", *flags), r"stage2.training.batch_size=12.*multiple of 8"
    )


def test_workdir_that_cannot_be_written_is_refused(images, tmp_path, refused):
    (tmp_path / "file").write_text("in the way")
    refused(command(images, tmp_path / "file" / "run"), "cannot be written")


@pytest.mark.parametrize(
    ("workdir", "flags", "says"),
    [
        ("", {}, "--workdir='' names no folder"),
        ("gs://bucket/run", {}, "--workdir='gs://bucket/run' is a URL"),
        ("file:///run", {"mode": "report"}, "--workdir='file:///run' is a URL"),
        (
            "run",
            {"mode": "import", "stage": 1, "weights": "s3://b/x.pkl"},
            "--weights='s3://b/x.pkl' is a URL",
        ),
        (
            "run",
            {"mode": "report", "evaluations": ["hdfs://x"]},
            "--evaluations='hdfs://x' is a URL",
        ),
        (
            "run",
            {"change": {"checkpoint": "gs://b/run/5"}},
            "config.stage1.checkpoint='gs://b/run/5' is a URL",
        ),
        (
            "run",
            {"change": {"training.start_from": "gs://b/5"}},
            "config.stage1.training.start_from='gs://b/5' is a URL",
        ),
    ],
)
def test_paths_that_are_none_are_refused_before_anything_is_made(
    images, tmp_path, monkeypatch, workdir, flags, says
):
    monkeypatch.chdir(tmp_path)
    values = tiny_config(images).to_config_dict()
    values.stage1.update_from_flattened_dict(flags.pop("change", {}))
    with pytest.raises(InputError, match=re.escape(says)):
        run_here(values, workdir, **flags)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mode", ["sample", "evaluate", "report", "export"])
def test_workdir_with_a_typo_is_refused_where_a_run_is_needed(images, tmp_path, mode):
    flags = {"stage": 1, "weights": str(tmp_path / "x.safetensors")} if mode == "export" else {}
    values = tiny_config(images).to_config_dict()
    values.evaluation.features = "classifier"
    (tmp_path / "runs/digits").mkdir(parents=True)
    for wrong in ("runs/digts", "run/digits"):
        says = rf"{wrong}' does not exist, and --mode={mode}.*--workdir='{tmp_path}/runs/digits' would do"
        with pytest.raises(InputError, match=says):
            run_here(values, str(tmp_path / wrong), mode=mode, **flags)
    with pytest.raises(InputError, match="elsewhere' does not exist.*--mode=train"):
        run_here(values, str(tmp_path / "elsewhere"), mode=mode, **flags)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["digits", "runs"]


def test_new_workdir_that_is_spelt_almost_as_another_is_told(tmp_path, caplog):
    (tmp_path / "digits").mkdir()
    with pytest.raises(InputError, match="nowhere"):
        run_here(
            tiny_config("/nowhere").to_config_dict(), str(tmp_path / "digts"), mode="train", stage=2
        )
    assert f"--workdir='{tmp_path}/digts' is a new run; '{tmp_path}/digits' exists" in caplog.text


def test_run_without_checkpoints_says_what_is_missing(images, tmp_path):
    with pytest.raises(InputError, match=r"no checkpoint in .*stage1/checkpoints.*--mode train"):
        run_here(tiny_config(images).to_config_dict(), str(tmp_path), mode="sample")


def test_work_in_another_thread_goes_on_without_signal_handlers(images, tmp_path):
    """As in a notebook server."""
    values = tiny_config(images, low=LOW).to_config_dict()
    thread = threading.Thread(
        target=run_here, args=(values, str(tmp_path)), kwargs={"mode": "prepare"}
    )
    before = signal.getsignal(signal.SIGTERM)
    thread.start()
    thread.join()
    assert (tmp_path / "contact_sheet.png").is_file() and signal.getsignal(signal.SIGTERM) == before


def test_workdir_in_use_is_refused(images, tmp_path, refused):
    (tmp_path / "run").mkdir()
    with (tmp_path / "run/.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused(command(images, tmp_path / "run"), "in use by another run")


def test_damaged_checkpoint_is_refused(finished, images, tmp_path, refused):
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir)
    (largest,) = sorted(
        (workdir / "stage2/checkpoints/20/ema/d").iterdir(), key=lambda p: p.stat().st_size
    )[-1:]
    largest.write_bytes(largest.read_bytes()[:100])
    flags = ["--mode=sample", "--config.sampling.name=again"]
    refused(
        command(images, workdir, *flags),
        r"stage2/checkpoints/20 is damaged .ema/d/.* has 100 bytes.*moving it.*step 15",
    )
    assert not (workdir / "again").exists()
