"""Eight virtual devices for every test, so that sharding is exercised on any machine."""

import gc
import logging
import os
import re
import sys
import tempfile
from pathlib import Path

# Tests compile much and compute little: XLA's optimising of machine code would take most of their
# time.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] += " --xla_llvm_disable_expensive_passes=true"

# What one process has compiled, the others read: the commands that tests run, and pytest's own
# workers, which inherit this.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _CACHE = tempfile.TemporaryDirectory(prefix="compiled-")  # gone with the process that made it
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax
import pytest
from absl.testing import flagsaver

from rdm_jax.main import main
from tests.support.commands import arguments_of, error_line
from tests.support.configs import write_images

if jax.__version_info__ < (0, 11):  # nor does a newer one know the flag
    os.environ["XLA_FLAGS"] += (
        " --xla_cpu_use_fusion_emitters=false"  # they take a third of the time of compiling
    )
if jax.__version_info__ >= (0, 10):  # others may not know the flag
    # On busy cores eight devices take long to meet; XLA would end the process after 40 s.
    os.environ["XLA_FLAGS"] += " --xla_cpu_collective_call_terminate_timeout_seconds=180"
# Tracing makes many objects, and collecting them as often as usual takes a tenth of the tests'
# time.
gc.set_threshold(50_000, 20, 20)
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

pytest_plugins = ["tests.support.cpu_seconds"]


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    """A folder of 24 images in two classes, the argument of tests/support/configs.py."""
    folder = tmp_path_factory.mktemp("source") / "images"
    write_images(folder)
    return folder


@pytest.fixture(autouse=True)
def _log_as_a_library_has_it():
    """Takes back what commands that ran in a test's own process have set."""
    yield
    log = logging.getLogger("rdm_jax")
    log.handlers.clear()
    log.propagate = True
    log.setLevel(logging.NOTSET)


def pytest_collection_modifyitems(items):
    """A test is of one tier: the first, the second or the long one."""
    both = [
        item.nodeid for item in items if {"second", "long"} <= {m.name for m in item.iter_markers()}
    ]
    if both:
        raise pytest.UsageError(f"of two tiers: {', '.join(both)}")


@pytest.fixture
def command_here(capsys, monkeypatch):
    """Runs the command in the test's own process: `command_here(flag, ...)`.

    Returns the exit status and what was written to stdout and stderr.
    """

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["main", *arguments])
        capsys.readouterr()
        with flagsaver.flagsaver():
            status = main()
        return status, *capsys.readouterr()

    return call


@pytest.fixture
def refused(command_here):
    """Runs a command on the tiny config and asserts that it is refused by one sentence."""

    def check(image_folder: Path, workdir: Path, *flags: str, pattern: str) -> None:
        status, _, stderr = command_here(*arguments_of(image_folder, workdir, *flags))
        assert status == 2, stderr
        assert re.search(pattern, error_line(stderr)), stderr

    return check
