"""Eight virtual devices for every test, so that sharding is exercised on any machine."""

import collections
import contextlib
import gc
import logging
import os
import re
import sys
import tempfile
from pathlib import Path
from unittest import mock

# All processes share what one has compiled: pytest's workers and the commands that tests run. The
# cache goes with the tests unless JAX_COMPILATION_CACHE_DIR says where to keep it.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _CACHE = tempfile.TemporaryDirectory(prefix="compiled-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE.name
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

# It defines flags, which `flagsaver` would remove if a command imported it at its first use.
import array_record.python.array_record_data_source  # noqa: F401
import jax
import pytest
from absl.testing import flagsaver

from rdm_jax.main import main
from tests.support.commands import arguments_of, error_line
from tests.support.configs import write_images
from tests.support.cpu_seconds import recorded

# Tests compile much and compute little: optimizing machine code would take most of their time.
XLA_FLAGS = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
XLA_FLAGS += ["--xla_cpu_parallel_codegen_split_count=1"]  # pytest's workers use all cores already
if jax.__version_info__ < (0, 11):  # later ones do not know the flag
    # Fusion emitters take a third of the time of compiling.
    XLA_FLAGS += ["--xla_cpu_use_fusion_emitters=false"]
if jax.__version_info__ >= (0, 10):  # earlier ones do not know the flag
    # On busy cores eight devices take long to meet; XLA would end the process after 40 s.
    XLA_FLAGS += ["--xla_cpu_collective_call_terminate_timeout_seconds=180"]
# Not twice in pytest's workers: the flags are in the keys of the compile cache.
before = os.environ.get("XLA_FLAGS", "").split()
os.environ["XLA_FLAGS"] = " ".join([*before, *(flag for flag in XLA_FLAGS if flag not in before)])

# Tracing makes many objects; collecting them as often as usual takes a tenth of the tests' time.
gc.set_threshold(50_000, 20, 20)
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

pytest_plugins = [
    "tests.support.cpu_seconds",
    "tests.support.hub_server",
    "tests.support.object_store",
]


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


@pytest.hookimpl(trylast=True)  # what is not selected has left
def pytest_collection_modifyitems(items):
    """The files that take longest come first, so that parallel workers end together."""
    seconds = recorded(Path(__file__).parent / "cpu_seconds.json")
    files = collections.Counter()
    for item in items:
        files[file_of(item)] += seconds.get(item.nodeid, 0)
    items.sort(key=lambda item: -files[file_of(item)])


def pytest_itemcollected(item):
    """Every test is of one tier."""
    if item.get_closest_marker("second") and item.get_closest_marker("long"):
        raise pytest.UsageError(f"{item.nodeid} is of two tiers. Mark it second or long.")


def file_of(item):
    """The file of a test, relative to the repository."""
    return item.nodeid.partition("::")[0]


@contextlib.contextmanager
def kept_flags():
    """Gives absl's flags their values back, and removes those of fields (`--config.field`). Flags
    of libraries that were imported meanwhile stay: they are defined only once."""
    before = flagsaver.save_flag_values()
    yield
    after = flagsaver.save_flag_values()
    libraries = {name: value for name, value in after.items() if not name.startswith("config.")}
    flagsaver.restore_flag_values(libraries | before)


@pytest.fixture
def command_here(capsys, monkeypatch):
    """Runs the command in the test's own process: `command_here(flag, ...)`.

    Returns the exit status and what was written to stdout and stderr.
    """

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["main", *arguments])
        capsys.readouterr()
        with kept_flags(), mock.patch.dict(os.environ):
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
