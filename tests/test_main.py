"""The command as a user runs it: from images to samples, killed and resumed."""

import json
import shutil
import signal
import threading
from pathlib import Path

import numpy as np
import pytest

from rdm_jax.checkpoints import store
from rdm_jax.config import parse
from rdm_jax.config.saved import read_saved
from rdm_jax.modes import run as run_here
from rdm_jax.runtime.errors import Interrupted
from rdm_jax.training import metric_writer
from tests.support.checkpoints import assert_equal, read_arrays, state
from tests.support.commands import (
    STAGE,
    arguments_of,
    error_line,
    logged,
    run,
    start,
    stop_when,
)
from tests.support.configs import LOW, tiny_config, write_images
from tests.support.pictures import shows_a_curve, shows_images

PREVIEWS = [f"--config.stage{number}.training.preview_every=80" for number in (1, 2)]


@pytest.fixture(scope="module")
def finished(image_folder, tmp_path_factory):
    """The workdir of an undisturbed run, and its outputs."""
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    return workdir, "".join(run(image_folder, workdir, *PREVIEWS))


def test_run_leaves_everything_behind(finished, image_folder):
    workdir, output = finished
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
    assert parse(read_saved(workdir / "config.json")) == tiny_config(image_folder, low=LOW)
    for said in ("24 images", "compiled in", "images/s", "left", "NFE", "done"):
        assert said in output, said


def test_finished_run_is_left_alone(finished, image_folder, command_here):
    workdir, _ = finished
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*.np*")}
    status, stdout, _ = command_here(*arguments_of(image_folder, workdir, *PREVIEWS))
    assert status == 0
    for said in ("stage1: already trained", "stage2: already trained", "12 images are already in"):
        assert said in stdout
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*.np*")} == before


@pytest.mark.second
def test_sampling_takes_seeds_classes_steps_and_guidance(finished, image_folder):
    """Image 9 of the run is made again alone, and again as the only one of another class."""
    workdir, _ = finished
    flags = ["--mode=sample", "--config.sampling.seeds=9", "--config.sampling.batch_size=1"]
    run(image_folder, workdir, *flags, "--config.sampling.name=alone")
    old, new = np.load(workdir / "samples/samples.npz"), np.load(workdir / "alone/samples.npz")
    # Another batch size is another program, whose sums may differ in float32's last bits: one level
    # of uint8 at the most.
    assert np.abs(old["images"][9].astype(int) - new["images"][0]).max() <= 1
    flags += [
        "--config.sampling.labels=0",
        "--config.stage1.guidance=2.0",
        "--config.stage1.sampler.steps=4",
        "--config.sampling.name=other",
        "--config.stage2.checkpoint=10",
    ]
    stdout, _ = run(image_folder, workdir, *flags)
    assert "stage2 from step 10" in stdout and "NFE 7 per image" in stdout
    assert np.load(workdir / "other/samples.npz")["labels"].tolist() == [0]


def kill(image_folder: Path, workdir: Path, stage: str, *flags: str) -> None:
    """SIGKILL in the middle of a stage, between two checkpoints."""
    process = start(image_folder, workdir, *flags)
    assert stop_when(logged(workdir, 96, stage), process, signal.SIGKILL) == -signal.SIGKILL


def test_killed_stage_resumes_bit_equal(finished, image_folder, tmp_path):
    kill(image_folder, tmp_path / "run", "stage1", *STAGE)
    stdout, _ = run(image_folder, tmp_path / "run", *STAGE)
    assert "resuming from" in stdout
    assert_equal(state(tmp_path / "run"), state(finished[0]))


@pytest.mark.long  # the first tier kills one stage
def test_run_killed_in_each_stage_resumes_bit_equal(finished, image_folder, tmp_path):
    workdir = tmp_path / "killed"
    for stage in ("stage1", "stage2"):
        kill(image_folder, workdir, stage)
    stdout, _ = run(image_folder, workdir)
    assert "resuming from" in stdout
    for stage in ("stage1", "stage2"):
        assert_equal(state(workdir, stage=stage), state(finished[0], stage=stage))
    ours, theirs = (np.load(each / "samples/samples.npz") for each in (workdir, finished[0]))
    np.testing.assert_array_equal(ours["images"], theirs["images"])


@pytest.mark.long  # tests/faults has a signal that is short
@pytest.mark.parametrize(
    "number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "CtrlC"]
)
def test_stopped_stage_resumes_bit_equal(finished, image_folder, tmp_path, number, status):
    workdir = tmp_path / "stopped"
    flags = [*STAGE, "--config.stage1.training.checkpoint_every=100000"]
    process = start(image_folder, workdir, *flags)
    assert stop_when(logged(workdir, 48), process, number) == status
    (step,) = store.Checkpoints(workdir / "stage1/checkpoints", read_only=True).steps()
    assert 6 <= step < 20  # saved where it stopped, far from any checkpoint
    lines = metric_writer.read(workdir / "stage1/metrics.jsonl")
    assert max(line["step"] for line in lines) == step
    stdout, _ = run(image_folder, workdir, *flags)
    assert f"resuming from {step * 8} images" in stdout
    assert_equal(state(workdir), state(finished[0]))


def test_signal_after_the_work_is_not_lost(image_folder, tmp_path, monkeypatch):
    """An experiment makes many runs in one process."""
    monkeypatch.setattr("rdm_jax.modes._work", lambda *_: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Interrupted):
        run_here(tiny_config(image_folder).to_config_dict(), str(tmp_path))


def test_bad_images_are_refused_or_left_out_and_listed(tmp_path, command_here):
    folder = tmp_path / "images"
    write_images(folder)
    (folder / "a" / "000.png").write_bytes(b"no image")
    prepare = arguments_of(folder, tmp_path / "run", "--mode=prepare")
    status, _, stderr = command_here(*prepare)
    assert status == 2 and error_line(stderr).startswith("error: image 'a/000.png'")
    assert stderr.strip().splitlines()[-1] == error_line(stderr)
    status, stdout, _ = command_here(*prepare, "--skip_bad")
    assert status == 0
    for said in ("1 of 24 entries are left out", "23 images", "assumed std: 0.5"):
        assert said in stdout, said
    manifest = json.loads((tmp_path / "images_prepared" / "manifest.json").read_text())
    assert manifest["count"] == 23 and list(manifest["skipped"]) == ["a/000.png"]
    status, stdout, _ = command_here(*prepare)
    assert status == 0 and "match their hashes" in stdout


@pytest.mark.second
def test_diverged_run_stops_and_keeps_the_last_good_state(image_folder, tmp_path):
    flags = [
        "--config.stage1.training.learning_rate=1e30",
        "--config.stage1.training.max_skipped=3",
    ]
    _, stderr = run(image_folder, tmp_path / "run", *STAGE, *flags, status=1)
    assert "3 steps in a row" in stderr and "learning_rate" in stderr and "Traceback" not in stderr
    (step,) = store.Checkpoints(tmp_path / "run/stage1/checkpoints", read_only=True).steps()
    arrays = read_arrays(tmp_path / f"run/stage1/checkpoints/{step}/train")
    assert all(np.isfinite(value).all() for value in arrays.values())


def test_work_in_another_thread_goes_on_without_signal_handlers(image_folder, tmp_path):
    """As in a notebook server."""
    values = tiny_config(image_folder, low=LOW).to_config_dict()
    thread = threading.Thread(
        target=run_here, args=(values, str(tmp_path)), kwargs={"mode": "prepare"}
    )
    before = signal.getsignal(signal.SIGTERM)
    thread.start()
    thread.join()
    assert (tmp_path / "contact_sheet.png").is_file() and signal.getsignal(signal.SIGTERM) == before


def test_checkpoint_of_another_process_is_refused(finished, image_folder, refused):
    """Of a network of the same shape."""
    workdir, _ = finished
    flags = ["--mode=sample", "--config.sampling.name=again"]
    flags += [f"--config.stage1.checkpoint={workdir}/stage2/checkpoints/20"]
    refused(image_folder, workdir, *flags, pattern=r"stage1.process.*of another network")


def test_another_config_in_the_same_workdir_is_refused(finished, image_folder, refused):
    workdir, _ = finished
    before = (workdir / "config.json").read_text()
    flag = "--config.stage2.network.channels=16"
    refused(image_folder, workdir, flag, pattern=r"stage2.network.channels was 8 and is 16")
    assert (workdir / "config.json").read_text() == before


def test_damaged_checkpoint_is_refused(finished, image_folder, tmp_path, refused):
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir)
    arrays = (workdir / "stage2/checkpoints/20/ema/d").iterdir()
    largest = max(arrays, key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:100])
    flags = ["--mode=sample", "--config.sampling.name=again"]
    damage = r"stage2/checkpoints/20 is damaged .ema/d/.* has 100 bytes instead of .*Move it away.*step 15"
    refused(image_folder, workdir, *flags, pattern=damage)
    assert not (workdir / "again").exists()
