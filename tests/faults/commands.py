"""The command as the campaign runs it: real processes, with a fault built in where none can be made
from outside."""

import os
import resource
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from rdm_jax.checkpoints.checksums import damage
from rdm_jax.training import metric_writer
from tests.support.paths import ROOT
from tests.test_main import read_arrays

GIB = 2**30
STAGE = ("--mode=train", "--stage=1")
NO_PICTURES = (
    "--config.stage1.training.preview_every=0",
    "--config.stage2.training.preview_every=0",
)


def short_and_long(kinds, short: str) -> list:
    """A test's parameters, of which one is for every day."""
    return [short, *(pytest.param(kind, marks=pytest.mark.long) for kind in kinds if kind != short)]


def environment(devices: int = 1, **others: str) -> dict[str, str]:
    """What a command starts with; it runs on so many virtual devices, or on the accelerator that
    FAULTS_PLATFORM names."""
    platform = os.environ.get("FAULTS_PLATFORM", "cpu")
    return {
        **os.environ,
        "JAX_PLATFORMS": platform,
        "JAX_NUM_CPU_DEVICES": str(devices),
        "PYTHONPATH": str(ROOT),
        **others,
    }


def command(images: Path, workdir: Path, *flags: str, broken: str = "") -> list[str]:
    """Of a run of tests/support/configs.py; `broken` names a fault of tests/faults/broken.py."""
    program = ["tests.faults.broken", broken] if broken else ["rdm_jax.main"]
    config = f"--config={ROOT}/tests/support/configs.py:{images}"
    return [sys.executable, "-m", *program, config, f"--workdir={workdir}", *NO_PICTURES, *flags]


def start(
    images: Path, workdir: Path, *flags: str, broken: str = "", devices: int = 1, **popen
) -> subprocess.Popen:
    kwargs = {
        "stdout": -1,
        "stderr": -1,
        "text": True,
        "env": environment(devices),
        "cwd": ROOT,
    } | popen  # pipes
    return subprocess.Popen(command(images, workdir, *flags, broken=broken), **kwargs)


def start_two(images: Path, workdir: Path, *flags: str, **kwargs) -> list[subprocess.Popen]:
    """The command in two processes, as on two hosts."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        where = (f"--coordinator=localhost:{free.getsockname()[1]}", "--processes=2")
    return [start(images, workdir, *flags, *where, f"--process={n}", **kwargs) for n in range(2)]


def run(
    images: Path, workdir: Path, *flags: str, status: int = 0, timeout: float = 300, **kwargs
) -> tuple[str, str]:
    """What a command printed; that it ended in time with this status is asserted."""
    process = start(images, workdir, *flags, **kwargs)
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    finally:
        process.kill()
    assert process.returncode == status, (process.returncode, stdout, stderr)
    return stdout, stderr


def bounded(images: Path, workdir: Path, *flags: str, **kwargs) -> str:
    """What a command said that refused its input, in bounded time and memory."""
    process = start(images, workdir, *flags, **kwargs)
    # Preparing takes 0.9 GiB where nothing is hostile; beyond the limit there would be no sentence.
    resource.prlimit(process.pid, resource.RLIMIT_DATA, (3 * GIB, 3 * GIB))
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2, stderr
    return said(stderr)


def mounted(mount: str, script: str) -> subprocess.CompletedProcess:
    """Runs a shell script with a mount of its own; skips the test where that is not allowed."""
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("nothing may be mounted here")
    # `timeout` ends all that the script has begun, and what they have said so far is still read.
    whole = ["timeout", "-s", "KILL", "300", "unshare", "-rm", "sh", "-c", f"{mount}\n{script}"]
    return subprocess.run(whole, env=environment(), cwd=ROOT, capture_output=True, text=True)


def wait_for(ready, process: subprocess.Popen, timeout: float = 120) -> bool:
    """Waits until `ready()`; False where the process ended before that."""
    deadline = time.monotonic() + timeout
    while not ready():
        if process.poll() is not None:
            return False
        assert time.monotonic() < deadline
        time.sleep(0.002)
    return True


def said(stderr: str, alone: bool = True) -> str:
    """The one sentence of an error; `alone` where no library has written a traceback beside it."""
    (line,) = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert not alone or "Traceback" not in stderr, stderr
    return line


def logged(workdir: Path, images: int):
    """Whether the metrics of so many images of stage 1 are on disk."""
    return lambda: any(
        line["images"] >= images for line in metric_writer.read(workdir / "stage1/metrics.jsonl")
    )


def steps(workdir: Path, stage: str = "stage1", sound: bool = True) -> list[int]:
    """The checkpoints that are listed; each of them is asserted to be sound, if that is to be."""
    folders = [
        folder for folder in (workdir / stage / "checkpoints").glob("*") if folder.name.isdecimal()
    ]
    found = {folder.name: damage(folder) if sound else "" for folder in folders}
    assert not any(found.values()), found
    return sorted(map(int, found))


def state(workdir: Path, step: int = 20, stage: str = "stage1") -> dict[str, np.ndarray]:
    """All arrays of a checkpoint."""
    folder = workdir / stage / "checkpoints" / str(step)
    return {
        f"{item}{name}": value
        for item in ("train", "ema")
        for name, value in read_arrays(folder / item).items()
    }


def assert_equal(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    """Bit for bit."""
    assert one.keys() == other.keys() and len(one) > 60
    for name, value in one.items():
        assert value.dtype == other[name].dtype and value.tobytes() == other[name].tobytes(), name
