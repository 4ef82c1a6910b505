"""Environment variables that JAX or XLA cannot use: named, with exit status 2."""

import importlib.util
import os
import re
import subprocess
import sys

import jax
import pytest

from rdm_jax.cli.exit_codes import exit_status
from tests.support.paths import ROOT

DEVICES = """
import jax
from rdm_jax.runtime.environment import backend_error
try:
    jax.devices()
except Exception as error:
    exit(f"error: {backend_error(error)}")
"""


def run_with(name: str, value: str, *arguments: str) -> tuple[int, str]:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), name: value}
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=ROOT, text=True, capture_output=True
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("JAX_NUM_CPU_DEVICES", "abc", "JAX_NUM_CPU_DEVICES='abc' cannot be used .*abc"),
        (
            "XLA_FLAGS",
            "--xla_no_such_flag=1",
            "XLA_FLAGS='--xla_no_such_flag=1' cannot be used .Unknown flag",
        ),
        (
            "XLA_FLAGS",
            "--xla_backend_optimization_level=abc",
            "XLA_FLAGS=.* cannot be used .*interpret value abc",
        ),
    ],
)
def test_main_names_invalid_variable(name, value, says):
    status, stderr = run_with(name, value, "-m", "rdm_jax.main")
    (line,) = stderr.splitlines()
    assert status == 2 and re.match(
        rf"error: {says}.*\. (Set another value|Use flags that this version)", line
    )


@pytest.mark.parametrize("platform", ["no_such_platform", "cuda"])
def test_backend_error_names_missing_platform(platform):
    if platform == "cuda" and os.path.exists("/dev/nvidia0"):
        pytest.skip("a GPU is present")
    _, stderr = run_with("JAX_PLATFORMS", platform, "-c", DEVICES)
    assert re.match(
        rf"error: JAX_PLATFORMS='{platform}' cannot be used .*\. Set JAX_PLATFORMS=cpu or unset",
        stderr.splitlines()[-1],
    )


def test_exit_status_of_missing_platform_has_no_traceback(monkeypatch, capsys):
    monkeypatch.setenv("JAX_PLATFORMS", "mars")

    def work():
        raise RuntimeError(
            "Unable to initialize backend 'mars': not known. (set JAX_PLATFORMS='' to choose one)"
        )

    assert exit_status(work, lambda: None) == 2
    assert re.fullmatch(
        r"error: JAX_PLATFORMS='mars' cannot be used .*\. Set JAX_PLATFORMS=cpu or unset it\.\n",
        capsys.readouterr().err,
    )


def of_the_device():
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nmore")


def of_the_host():
    raise MemoryError("Unable to allocate 9 bytes")


@pytest.mark.parametrize("work", [of_the_device, of_the_host])
def test_exit_status_without_memory_names_the_batch_size(capsys, work):
    assert exit_status(work, lambda: None) == 2
    assert re.fullmatch(
        r"error: there is too little memory \(.* 9 bytes\)\. Lower the batch size "
        r"\(stageN\.training\.batch_size .*\.\n",
        capsys.readouterr().err,
    )


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None or os.path.exists("/dev/accel0"),
    reason="needs libtpu on a machine without a TPU",
)
def test_libtpu_does_not_log_that_there_is_no_tpu():
    script = "import jax, rdm_jax.runtime.environment as e; e.quiet_libtpu(); jax.devices()"
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd=ROOT, text=True, capture_output=True
    )
    assert done.returncode == 0
    assert "TPU_" not in done.stderr and "WARNING" not in done.stderr
