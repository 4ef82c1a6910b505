"""Several processes on one machine, as on several hosts: they train, stop, go on, sample and
evaluate as one process does."""

import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from rdm_jax.checkpoints import folders
from rdm_jax.cli.exit_codes import exit_status
from rdm_jax.data.image_sets import open_prepared
from rdm_jax.data.images import ImageSpec
from rdm_jax.data.prepare import prepare
from rdm_jax.evaluation import classifier
from rdm_jax.runtime import distributed
from rdm_jax.runtime.errors import InputError
from tests.support.checkpoints import read_arrays
from tests.support.commands import STAGE, arguments_of, ended, start, start_two
from tests.support.configs import write_images
from tests.support.paths import ROOT

FLAGS = (
    "--config.evaluation.features=classifier",
    "--config.evaluation.images=samples",
    "--config.data.held_out=8",
)
FLAGS += (
    "--config.evaluation.seeds=0-19",
    "--config.evaluation.batch_size=8",
    "--config.sampling.batch_size=4",
    "--config.sampling.seeds=0-19",
    "--config.stage1.training.averages=(0.05, 0.1)",
    "--config.stage1.training.snapshot_every=16",
    "--config.stage1.average=0.08",  # reconstructed from the snapshots
)


def flags(images: Path) -> list[str]:
    """Those of every run here, for `start` and `start_two`."""
    return [*FLAGS, f"--config.evaluation.weights={images.parent / 'classifier.safetensors'}"]


@pytest.fixture(scope="module")
def classified(tmp_path_factory):
    """A folder of images, with a classifier that evaluations can use beside it."""
    folder = tmp_path_factory.mktemp("source") / "images"
    write_images(folder, count=32)
    learnt, held_out = open_prepared(
        prepare(f"folder:{folder}", f"{folder}_prepared", ImageSpec(8, 12))
    ).split(8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classifier, "IMAGES_SHOWN", 300)
        classifier.classifier_space(
            learnt, held_out, folder.parent / "classifier.safetensors", train=True
        )
    return folder


def check_same_parameters(one: Path, other: Path, *stages: str):
    """Up to the order of sums over devices."""
    items = [f"{stage}/checkpoints/20/ema" for stage in stages]
    items += ["stage1/checkpoints/20/averages", "stage1/snapshots/8/averages"]
    for item in items:
        ours, theirs = (read_arrays(workdir / item) for workdir in (one, other))
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            np.testing.assert_allclose(value, theirs[name], rtol=1e-5, atol=1e-6, err_msg=name)


def check_same(one: Path, other: Path):
    """Parameters, samples and figures, up to the order of sums over devices."""
    check_same_parameters(one, other, "stage1", "stage2")
    ours, theirs = (np.load(workdir / "samples/samples.npz") for workdir in (one, other))
    for name in ("images", "stage1"):
        assert (
            np.abs(ours[name].astype(int) - theirs[name].astype(int)).max() <= 1
        )  # parameters differ in their last bits
    assert (
        ours["seeds"].tolist() == theirs["seeds"].tolist()
        and ours["labels"].tolist() == theirs["labels"].tolist()
    )
    ours, theirs = (
        json.loads((workdir / "evaluation/evaluation.json").read_text())["results"]
        for workdir in (one, other)
    )
    for name, row in ours.items():
        assert row["images"] == theirs[name]["images"]
        np.testing.assert_allclose(
            [*row["metrics"].values()], [*theirs[name]["metrics"].values()], rtol=1e-3, atol=1e-4
        )


@pytest.mark.second
def test_two_processes_train_as_one_does(classified, tmp_path):
    ended([start(classified, tmp_path / "one", *flags(classified), *STAGE, devices=4)])
    others = [
        "--config.parallel.fsdp=2",
        "--config.stage1.training.checkpoint_minutes=1e-6",
    ]  # which the first alone decides
    others += [
        "--config.stage1.training.checkpoint_every=100000",
        "--config.stage1.training.keep_newest=20",
    ]
    (first, _), _ = ended(
        start_two(classified, tmp_path / "two", *flags(classified), *STAGE, *others, devices=2)
    )
    assert "train on 4 cpu device(s) of 2 process(es)" in first
    assert len(folders.step_folders(tmp_path / "two/stage1/checkpoints")) > 2
    check_same_parameters(tmp_path / "one", tmp_path / "two", "stage1")


@pytest.mark.long
def test_two_processes_stop_resume_and_equal_one(classified, tmp_path):
    ended([start(classified, tmp_path / "one", *flags(classified), devices=4)])
    pair = start_two(
        classified, tmp_path / "two", *flags(classified), "--config.parallel.fsdp=2", devices=2
    )
    metrics = tmp_path / "two/stage1/metrics.jsonl"
    while not (metrics.is_file() and metrics.read_text()) and pair[0].poll() is None:
        time.sleep(0.05)
    pair[1].send_signal(signal.SIGTERM)  # one of them is enough
    ended(pair, 143)
    (first, _), (second, _) = ended(
        start_two(classified, tmp_path / "two", *flags(classified), devices=2)
    )  # on another mesh
    assert "all on 4 cpu device(s) of 2 process(es)" in first and "stage1: resuming from" in first
    # Both have generated a part of the images, and both read all of them back.
    assert "evaluation: reusing the samples in" in first
    # Only process 0 logs, except for the wait for it (XLA's Gloo logs in all).
    assert not re.search(r"^\d\d:\d\d:\d\d (?!waiting )", second, re.MULTILINE)
    check_same(tmp_path / "one", tmp_path / "two")


@pytest.mark.second
def test_refusal_of_one_process_ends_all(classified, tmp_path):
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (_, first), (_, second) = ended(
            start_two(classified, tmp_path, *flags(classified), devices=2), 2
        )
    assert "is in use by another run" in first and "another process failed" in second


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("host", 2, 0), "--coordinator='host' is not a host with a port. Use host:port"),
        (("host:1", None, 0), "do not go together: .* Pass --processes and --process too"),
        (("host:1", 2, None), "do not go together: .* Pass --processes and --process too"),
        (("", 2, 0), "do not go together: .* Pass --coordinator=host:port"),
        (("none", None, 1), "do not go together: .* Pass --coordinator=host:port"),
    ],
)
def test_join_refuses_flags_that_do_not_go_together(flags, says):
    with pytest.raises(InputError, match=says):
        distributed.join(*flags)


def test_join_refuses_a_process_that_is_none_of_them():
    with pytest.raises(
        InputError, match="--process=2 with --processes=2 is out of range. Use 0 to 1"
    ):
        distributed.join("localhost:1", 2, 2)


JOIN = """
import sys
from rdm_jax.runtime import console, distributed
console.show_log()
distributed.join(*eval(sys.argv[1]))
"""


def joining(
    coordinator: str, processes: int | None, process: int | None, **surroundings: str
) -> subprocess.Popen:
    """A process that waits 3 s for others."""
    arguments = [sys.executable, "-c", JOIN, repr((coordinator, processes, process, 3))]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        **surroundings,
    }
    return subprocess.Popen(arguments, env=environment, text=True, stdout=-1, stderr=-1)


@pytest.mark.second
def test_join_waits_for_processes_and_names_the_missing():
    """The first and another one of three SLURM tasks, and the second of two without its first."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    slurm = {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "3",
        "JAX_COORDINATOR_PORT": str(port),
    }
    some = [
        joining("", None, None, **slurm, SLURM_PROCID=str(i), SLURM_LOCALID="0") for i in range(2)
    ]
    outputs = ended([*some, joining("localhost:1", 2, 1)], 2)
    where = [(3, f"localhost:{port}", 0), (3, f"localhost:{port}", 1), (2, "localhost:1", 1)]
    for (said, errors), (count, address, number) in zip(outputs, where, strict=True):
        who = rf"the {count} processes of this run at {address} .this is process {number}."
        assert re.search(rf"waiting up to 3 s for {who}; --coordinator=none runs alone", said)
        (line,) = errors.splitlines()
        assert re.fullmatch(
            rf"error: {who} have not all started within 3 s\. Start all .*--coordinator=none to run alone\.",
            line,
        )


@pytest.mark.parametrize(
    "surroundings",
    [
        {
            "SLURM_JOB_ID": "7",
            "SLURM_STEP_NODELIST": "x",
            "SLURM_NTASKS": "1",
            "SLURM_PROCID": "0",
            "SLURM_LOCALID": "0",
        },
        {
            "OMPI_MCA_orte_hnp_uri": "4096.0;tcp://x:1",
            "OMPI_COMM_WORLD_SIZE": "1",
            "OMPI_COMM_WORLD_RANK": "0",
        },
        {"TPU_WORKER_HOSTNAMES": "localhost"},
        {"TPU_PROCESS_ADDRESSES": "local", "TPU_WORKER_ID": "0", "CLOUD_TPU_TASK_ID": "0"},
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"},  # in an allocation, but not in a step of it
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "TPU_WORKER_HOSTNAMES": "localhost"},
    ],
    ids=["slurm", "open-mpi", "colab", "kaggle", "allocation", "allocation without TPUs"],
)
def test_join_leaves_one_process_of_a_cluster_alone(monkeypatch, surroundings):
    asked = []
    monkeypatch.setattr(
        jax.distributed, "initialize", lambda *_, **__: asked.append(1) or {}["coordinator_address"]
    )
    for name in ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES"):
        monkeypatch.delenv(name, raising=False)  # a command here may have set it
    for name, value in surroundings.items():
        monkeypatch.setenv(name, value)
    distributed.join("", None, None)
    assert bool(asked) == (surroundings.get("SLURM_NTASKS") == "4")  # jax itself tells that one


def test_command_joins_a_cluster_where_libtpu_finds_no_chips(
    image_folder, tmp_path, monkeypatch, command_here
):
    """What keeps libtpu quiet must not look like a cluster of one host."""
    asked = []
    monkeypatch.setattr(
        jax.distributed, "initialize", lambda *_, **__: asked.append(1) or {}["coordinator_address"]
    )
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "SLURM_JOB_ID": "7",
        "SLURM_NTASKS": "4",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TPU_WORKER_HOSTNAMES", raising=False)
    command_here(*arguments_of(image_folder, tmp_path / "run", "--mode=prepare"))
    assert asked


def test_join_does_nothing_alone():
    distributed.join("", None, None)
    assert jax.process_count() == 1 and distributed.is_primary()
    with distributed.raise_together():
        assert distributed.primary_first("counts", lambda: 3) == 3
    assert distributed.allgather({"a": np.arange(3)})["a"].tolist() == [[0, 1, 2]]
    assert [int(distributed.largest(value)) for value in (0, 2, 1)] == [0, 2, 1]


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_exit_with_keeps_the_status_without_outputs(monkeypatch, closed):
    """One of several processes, whose end is not to wait for the others."""
    ended = []
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "SECONDS_TO_LEAVE", 0)
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr(sys, closed, None)
    with pytest.raises(SystemExit):  # which the real `_exit` leaves no time for
        distributed.exit_with(lambda: 2)
    assert ended == [2]


def test_exit_status_names_a_process_that_is_gone(monkeypatch, capsys):
    def work():
        raise RuntimeError(
            "INTERNAL: Barrier failed because: task is set to ERROR: UNAVAILABLE: Task 1 heartbeat timeout."
        )

    with pytest.raises(RuntimeError):
        exit_status(work, lambda: None)  # not one of several
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    assert exit_status(work, lambda: None) == 1
    assert re.fullmatch(
        "error: another process of this run has ended .*Start all of them again; they resume .*checkpoint.\n",
        capsys.readouterr().err,
    )
