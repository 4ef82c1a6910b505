"""Fault 19: a long run."""

import os
import threading
from pathlib import Path

import pytest

from rdm_jax import config as configs
from rdm_jax.data.image_sets import open_prepared
from rdm_jax.data.images import Form
from rdm_jax.data.prepare import prepare
from rdm_jax.interrupt import StopOnSignal
from rdm_jax.training import loop
from tests.tiny import tiny_config

STEPS, EARLY = 100_000, 5_000


def resident() -> int:
    """Bytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.long
def test_19_a_hundred_thousand_steps(images, tmp_path, fault, monkeypatch):
    """Memory, threads and open files after 5,000 steps, and at the end."""
    training = {"images": 8 * STEPS, "checkpoint_every": 8 * 1000, "preview_every": 0, "log_every": 800}
    config = configs.parse(tiny_config(images, **training).to_config_dict())
    source = open_prepared(prepare(f"folder:{images}", tmp_path / "set", Form(8, 8)), cache_bytes=2**30)
    seen: dict[int, tuple[int, int, int]] = {}
    add = loop.Window.add

    def measured(self, step, values):
        if step in (EARLY, STEPS):
            seen[step] = (resident(), threading.active_count(), len(os.listdir("/proc/self/fd")))
        return add(self, step, values)

    monkeypatch.setattr(loop.Window, "add", measured)
    loop.Trainer(config, 1, source, tmp_path / "stage1").run(StopOnSignal())
    (memory, threads, files), (memory_then, threads_then, files_then) = seen[EARLY], seen[STEPS]
    assert memory_then - memory < 50 * 2**20 and threads_then <= threads + 2 and files_then <= files + 4, seen
    grown = f"memory {(memory_then - memory) / 2**20:+.1f} MiB, threads {threads_then - threads:+}, files {files_then - files:+}"
    fault(19, 1, f"{STEPS:,} steps: {grown} since step {EARLY:,}")
