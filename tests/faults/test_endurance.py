"""Fault 19: a long run."""

import ctypes
import gc
import os
import threading
from pathlib import Path
from typing import NamedTuple

import pytest

from rdm_jax import config as configs
from rdm_jax.data.image_sets import open_prepared
from rdm_jax.data.images import Form
from rdm_jax.data.prepare import prepare
from rdm_jax.interrupt import StopOnSignal
from rdm_jax.training import loop
from tests.tiny import tiny_config

STEPS, EARLY = 100_000, 5_000


class Seen(NamedTuple):
    """What a process has at one step: bytes of memory in use, threads, open files."""

    memory: int
    threads: int
    files: int

    @classmethod
    def now(cls) -> "Seen":
        """What this process has, without what malloc keeps of freed memory (300 MiB after compiling) and Python of cycles."""
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return cls(pages * os.sysconf("SC_PAGE_SIZE"), threading.active_count(), len(os.listdir("/proc/self/fd")))


@pytest.mark.long
def test_19_a_hundred_thousand_steps(images, tmp_path, fault, monkeypatch):
    """Memory, threads and open files after 5,000 steps, and at the end, after 95 more saves.

    What tensorstore converts to JSON it does not free (0.1.71 to 0.1.86 seen): some 1,750 Python objects a save of this network.
    """
    training = {"images": 8 * STEPS, "checkpoint_every": 8 * 1000, "preview_every": 0, "log_every": 800}
    config = configs.parse(tiny_config(images, **training).to_config_dict())
    source = open_prepared(prepare(f"folder:{images}", tmp_path / "set", Form(8, 8)), cache_bytes=2**30)
    seen: dict[int, Seen] = {}
    add = loop.Window.add

    def measured(self, step, values):
        if step in (EARLY, STEPS):
            seen[step] = Seen.now()
        return add(self, step, values)

    monkeypatch.setattr(loop.Window, "add", measured)
    loop.Trainer(config, 1, source, tmp_path / "stage1").run(StopOnSignal())
    grown = Seen(*(then - before for before, then in zip(seen[EARLY], seen[STEPS], strict=True)))
    assert grown.memory < 50 * 2**20 and grown.threads <= 2 and grown.files <= 4, seen
    memory = f"memory in use {grown.memory / 2**20:+.1f} MiB"
    fault(19, 1, f"{STEPS:,} steps: {memory}, threads {grown.threads:+}, files {grown.files:+} since step {EARLY:,}")
