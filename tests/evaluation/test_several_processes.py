"""Each process measures its share of the images, and all have the statistics of the whole."""

import json
import socket
import subprocess
import sys

import numpy as np
import pytest

from rdm_jax.evaluation.gathering import Gatherer
from rdm_jax.runtime.signals import StopOnSignal
from tests.support.commands import environment
from tests.support.measured_images import BATCH, COUNT, RandomStream, as_arrays, gathered, space
from tests.support.paths import ROOT


@pytest.fixture(scope="module")
def by_two(tmp_path_factory):
    """What two processes have found, the images that each has read, and the folder."""
    folder = tmp_path_factory.mktemp("gathered")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    arguments = [sys.executable, "-m", "tests.support.measured_images", port]
    options = {"stdout": -1, "stderr": -1, "text": True, "cwd": ROOT, "env": environment(2)}
    processes = [
        subprocess.Popen([*arguments, str(number), str(folder)], **options) for number in range(2)
    ]
    outputs = [process.communicate(timeout=200) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    read = [json.loads(output.splitlines()[-1]) for output, _ in outputs]
    with np.load(folder / "found.npz") as file:
        return dict(file), read, folder


def check_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6, atol=1e-8, err_msg=name)


@pytest.mark.second
def test_two_processes_measure_half_each_and_equal_one(by_two, tmp_path):
    found, read, _ = by_two
    for part, (straight, _) in enumerate(read):
        assert {n // BATCH % 2 for n in straight} == {part}
    assert sorted(read[0][0] + read[1][0]) == list(range(COUNT))
    expected = as_arrays(gathered(tmp_path)[0])
    for kind in ("straight", "resumed"):
        one_kind = {name.partition("/")[2]: value for name, value in found.items() if kind in name}
        check_equal(one_kind, expected)


@pytest.mark.second
def test_processes_resume_what_others_have_gathered(by_two, tmp_path):
    """Two are stopped: two read the rest, or one that adds up what the two have saved."""
    _, read, folder = by_two
    # The signal comes with image 30, which the second process reads in its second turn.
    rest = list(range(32, COUNT))
    assert sorted(read[0][1] + read[1][1]) == rest
    accumulator, more = gathered(folder / "left")
    assert more == rest
    check_equal(as_arrays(accumulator), as_arrays(gathered(tmp_path)[0]))
    Gatherer(space(), 20, StopOnSignal()).remove_saved(
        RandomStream(StopOnSignal()), folder / "left"
    )
    assert not list((folder / "left").iterdir())
