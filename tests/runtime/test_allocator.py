"""Freed memory is reused without new page faults."""

import subprocess
import sys

import pytest

from tests.support.commands import environment
from tests.support.paths import ROOT

SCRIPT = """
import ctypes, resource, sys
from rdm_jax.runtime.allocator import keep_freed_memory
kept = sys.argv[1] == "keep" and keep_freed_memory()
library, size = ctypes.CDLL(None), 2**26
library.malloc.restype = ctypes.c_void_p

def use():
    block = ctypes.c_void_p(library.malloc(ctypes.c_size_t(size)))
    ctypes.memset(block, 1, size)
    library.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

before = use()
print(int(kept), use() - before)
"""


def faults(how: str) -> tuple[int, int]:
    """Whether the setting exists, and the page faults of a second use of 64 MiB."""
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, how],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    kept, count = map(int, result.stdout.split())
    return kept, count


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc alone has mallopt")
def test_freed_memory_is_reused():
    kept, count = faults("keep")
    if not kept:
        pytest.skip("another C library")
    assert count < 100
    assert faults("return")[1] > 1_000
