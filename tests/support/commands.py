"""Commands in processes of their own: with faults built in, with limits, stopped by signals."""

import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rdm_jax.training import metric_writer
from tests.support.paths import ROOT

GIB = 2**30
STAGE = ("--mode=train", "--stage=1")
NO_PREVIEWS = (
    "--config.stage1.training.preview_every=0",
    "--config.stage2.training.preview_every=0",
)


def environment(devices: int = 1, **others: str) -> dict[str, str]:
    """The environment of a command that runs on so many virtual CPU devices, or on the accelerator
    that FAULTS_PLATFORM names."""
    return {
        **os.environ,
        "JAX_PLATFORMS": os.environ.get("FAULTS_PLATFORM", "cpu"),
        "JAX_NUM_CPU_DEVICES": str(devices),
        "PYTHONPATH": str(ROOT),
        **others,
    }


def python(*arguments: str, devices: int = 1) -> subprocess.CompletedProcess[str]:
    """Runs Python with these arguments in the root of the repository."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment(devices),
        capture_output=True,
        text=True,
    )


def arguments_of(image_folder: Path, workdir: Path, *flags: str) -> list[str]:
    """The flags of a run of the tiny config."""
    config = f"--config={ROOT}/tests/support/configs.py:{image_folder}"
    return [config, f"--workdir={workdir}", *flags]


def command(image_folder: Path, workdir: Path, *flags: str, broken: str = "") -> list[str]:
    """The command line of a run of the tiny config without previews.

    Args:
      broken: a fault of tests/faults/broken.py.
    """
    program = ["tests.faults.broken", broken] if broken else ["rdm_jax.main"]
    arguments = arguments_of(image_folder, workdir, *NO_PREVIEWS, *flags)
    return [sys.executable, "-m", *program, *arguments]


def start(
    image_folder: Path,
    workdir: Path,
    *flags: str,
    broken: str = "",
    devices: int = 1,
    **popen,
) -> subprocess.Popen:
    """Starts the command; its outputs are pipes unless `popen` says otherwise."""
    options = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
        "env": environment(devices),
        "cwd": ROOT,
    }
    return subprocess.Popen(
        command(image_folder, workdir, *flags, broken=broken), **(options | popen)
    )


def start_two(image_folder: Path, workdir: Path, *flags: str, **options) -> list[subprocess.Popen]:
    """Starts the command in two processes, as on two hosts."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        where = (f"--coordinator=localhost:{free.getsockname()[1]}", "--processes=2")
    return [
        start(image_folder, workdir, *flags, *where, f"--process={number}", **options)
        for number in range(2)
    ]


def two(
    script: str, *arguments: str, devices: int = 1, **surroundings: str
) -> list[subprocess.Popen]:
    """Starts a script, or a module 'tests....', in two processes.

    Its arguments are a port, the process and `arguments`.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    options = {"text": True, "stdout": -1, "stderr": -1, "cwd": ROOT}
    options["env"] = environment(devices, **surroundings)
    command = [sys.executable, "-m" if script.startswith("tests.") else "-c", script, port]
    return [subprocess.Popen([*command, str(n), *arguments], **options) for n in range(2)]


def ended(processes: list[subprocess.Popen], status: int = 0) -> list[tuple[str, str]]:
    """Asserts that all processes end with this status. Returns their outputs."""
    try:
        outputs = [process.communicate(timeout=400) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [status] * len(processes), outputs
    return outputs


def run(
    image_folder: Path,
    workdir: Path,
    *flags: str,
    status: int = 0,
    timeout: float = 300,
    **options,
) -> tuple[str, str]:
    """Runs the command; asserts that it ends in time with this status. Returns its outputs."""
    process = start(image_folder, workdir, *flags, **options)
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    finally:
        process.kill()
    assert process.returncode == status, (process.returncode, stdout, stderr)
    return stdout, stderr


def bounded(image_folder: Path, workdir: Path, *flags: str, **options) -> str:
    """Asserts that the command refuses its input in bounded time and memory. Returns its error."""
    process = start(image_folder, workdir, *flags, **options)
    # Preparing takes 0.9 GiB where nothing is hostile. Beyond the limit there is no error message.
    resource.prlimit(process.pid, resource.RLIMIT_DATA, (3 * GIB, 3 * GIB))
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2, stderr
    return error_line(stderr)


def mounted(mount: str, script: str) -> subprocess.CompletedProcess[str]:
    """Runs a shell script with a mount of its own; skips the test where that is not allowed."""
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("nothing may be mounted here")
    # `timeout` ends all processes of the script; their output so far is still read.
    limited = ["timeout", "-s", "KILL", "300", "unshare", "-rm", "sh", "-c", f"{mount}\n{script}"]
    return subprocess.run(limited, env=environment(), cwd=ROOT, capture_output=True, text=True)


def wait_for(ready: Callable[[], bool], process: subprocess.Popen, timeout: float = 120) -> bool:
    """Waits until `ready()`; False where the process ended before that."""
    deadline = time.monotonic() + timeout
    while not ready():
        if process.poll() is not None:
            return False
        assert time.monotonic() < deadline
        time.sleep(0.002)
    return True


def stop_when(ready: Callable[[], bool], process: subprocess.Popen, signal_number: int) -> int:
    """Sends a signal as soon as `ready()`. Returns the exit status."""
    assert wait_for(ready, process), process.communicate()
    process.send_signal(signal_number)
    process.communicate(timeout=60)
    return process.returncode


def error_line(stderr: str, alone: bool = True) -> str:
    """The one error of a command; `alone` where no library has written a traceback beside it."""
    (line,) = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert not alone or "Traceback" not in stderr, stderr
    return line


def logged(workdir: Path, images: int, stage: str = "stage1") -> Callable[[], bool]:
    """Whether the metrics of so many images are on disk."""
    metrics = workdir / stage / "metrics.jsonl"
    return lambda: any(line["images"] >= images for line in metric_writer.read(metrics))
