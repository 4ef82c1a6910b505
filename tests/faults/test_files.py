"""Fault 16: untrusted files. Nothing in them is executed, written elsewhere, or waited for; they
are refused by name."""

import contextlib
import datetime
import functools
import json
import os
import pickle
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from rdm_jax.data.images import ImageSpec
from rdm_jax.data.manifest import MANIFEST
from rdm_jax.data.prepare import prepare
from rdm_jax.runtime.errors import InputError
from tests.faults.fuzzing import CHANGES, READERS, changed
from tests.faults.tiers import one_of_many
from tests.support import commands
from tests.support.commands import GIB, bounded
from tests.support.configs import write_images
from tests.support.paths import ROOT

SECONDS_EACH = 600  # of the long campaign
SECONDS_A_FILE = datetime.timedelta(seconds=30)  # on busy cores; all of these files are small


class Hostile:
    """Its pickle creates a canary file when Python's own reader loads it."""

    def __init__(self, path):
        self._path = str(path)

    def __reduce__(self):
        return open, (self._path, "w")


def archive_of(pickled: bytes, path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", pickled)
        file.writestr("archive/version", "3\n")


FEATURES = "tensorflow_datasets.core.features.features_dict.FeaturesDict"
WITHIN = {
    "pythonClassName": FEATURES,
    "jsonFeature": {"json": json.dumps({"a": {"type": "canary_module.Hostile", "content": {}}})},
}
# Files of a prepared set, what is written in them (None: all of it), what comes in its place, and
# what the refusal says.
CHANGED = {
    "manifest": (MANIFEST, '"file": "', '"file": "../', "is no file beside it"),
    "features": ("features.json", FEATURES, "canary_module.Hostile", "to be imported"),
    "features within text": ("features.json", None, json.dumps(WITHIN), "to be imported"),
    "data set": ("dataset_info.json", '"{DATASET}', '"../{DATASET}', "files beside it"),
}


def write_hostile(kind: str, folder, canary):
    """Writes a file of a kind. Returns what its refusal says, and the arguments that make the
    command read it."""
    path, pickled = folder / "hostile", pickle.dumps({"ema": Hostile(canary)})
    load = ["--mode=import", "--stage=1", f"--weights={path}"]
    if kind == "pickle":
        path.write_bytes(pickled)
    elif kind == "torch archive":
        archive_of(pickled, path)
    elif kind == "safetensors header":
        path.write_bytes((2**40).to_bytes(8, "little") + b"{" + bytes(100))
    elif kind == "npz of objects":
        path = path.with_suffix(".npz")
        np.savez(path, images=np.array([Hostile(canary)], object))
        load = [
            "--mode=evaluate",
            "--config.evaluation.features=classifier",
            f"--config.evaluation.images=npz:{path}",
        ]
        return "hostile.npz cannot be used (it holds Python objects", load
    elif kind == "config":
        path.write_text('{"stage1": ' * 10_000)
        load = [f"--config={ROOT}/configs/saved.py:{path}"]
    else:  # prepared images
        name, old, new, says = CHANGED[kind]
        write_images(folder / "images")
        file = prepare(f"folder:{folder / 'images'}", path, ImageSpec(8, 12)) / name
        text = file.read_text()
        assert old is None or old in text
        file.write_text(text.replace(old, new) if old else new)
        (folder / "canary_module.py").write_text(f"open({str(canary)!r}, 'w')")
        load = [
            "--mode=train",
            f"--config.data.source=folder:{folder / 'images'}",
            f"--config.data.directory={path}",
        ]
        return says, load
    return path.name, load


KINDS = ("pickle", "torch archive", "safetensors header", "npz of objects", "config", *CHANGED)


@pytest.mark.parametrize(
    "kind", one_of_many(KINDS, "pickle")
)  # all readers are fuzzed below, within a process
def test_16_hostile_file(image_folder, tmp_path, fault, kind):
    canary = tmp_path / "canary"
    says, load = write_hostile(kind, tmp_path, canary)
    environment = commands.environment(PYTHONPATH=f"{ROOT}:{tmp_path}")
    assert says in bounded(image_folder, tmp_path / "run", *load, env=environment)
    assert not canary.exists()
    fault(16, 1, f"{kind}: refused by its name, nothing executed, in bounded time and memory")


def test_canary_is_made_by_pickle(tmp_path):
    """Python's own reader creates the canary."""
    pickle.loads(pickle.dumps(Hostile(tmp_path / "canary"))).close()
    assert (tmp_path / "canary").exists()


# What Python's audit events are called where something is executed, or written other than to a file
# that is opened.
EXECUTES = (
    "os.system",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "subprocess.Popen",
    "pickle.find_class",
)
WRITES = (
    "os.remove",
    "os.rename",
    "os.mkdir",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.chmod",
    "socket.connect",
)
watching: list[list[str]] = []


@functools.cache
def watch() -> None:
    """Installs an audit hook, which cannot be removed; it records while `watching` is not empty."""

    def hook(event: str, arguments: tuple) -> None:
        if watching:
            opened = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if opened or event in (*EXECUTES, *WRITES):
                watching[-1].append(f"{event} {arguments}")

    sys.addaudithook(hook)


@contextlib.contextmanager
def watched():
    """Records whatever is executed or written in the `with` block."""
    watch()
    watching.append([])
    try:
        yield watching[-1]
    finally:
        watching.pop()


def peak_of_memory(reset: bool = False) -> int:
    """Peak memory of this process in bytes, since its start or since the last `reset`."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    (line,) = [
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    ]
    return int(line.split()[1]) * 1024


def fuzz(name: str, folder, seconds: float = 0, **kwargs) -> int:
    """Reads many changed files, and returns how many; a reader may raise nothing but InputError."""
    reader, trials = READERS[name], 0
    path = reader.write(folder)
    sound, before = path.read_bytes(), set(folder.rglob("*"))
    reader.read(path)

    @settings(
        deadline=SECONDS_A_FILE, database=None, suppress_health_check=list(HealthCheck), **kwargs
    )
    @given(CHANGES)
    def try_some(changes):
        nonlocal trials
        trials += 1
        path.write_bytes(changed(sound, changes))
        with contextlib.suppress(InputError), watched() as done:
            reader.read(path)
        assert not done and set(folder.rglob("*")) == before

    began, before_all = time.monotonic(), peak_of_memory(reset=True)
    while not trials or time.monotonic() - began < seconds:
        try_some()
    assert peak_of_memory() - before_all < GIB
    return trials


@pytest.mark.second
@pytest.mark.parametrize("name", READERS)
def test_16_fuzzed(tmp_path, fault, name):
    trials = fuzz(name, tmp_path, max_examples=40, derandomize=True)
    fault(16, trials, f"{name}, fuzzed: read, or the documented error")


@pytest.mark.long
@pytest.mark.parametrize("name", READERS)
def test_16_fuzzed_for_ten_minutes(tmp_path, fault, name):
    seconds = float(os.environ.get("FUZZ_SECONDS", SECONDS_EACH))
    trials = fuzz(name, tmp_path, max_examples=1000, seconds=seconds)
    fault(16, trials, f"{name}, fuzzed for {seconds:.0f} s: read, or the documented error")
