"""Processes that wait for each other, and that are preempted together."""

import re
import signal
import time

import jax
import numpy as np
import pytest

from rdm_jax.checkpoints import folders
from rdm_jax.runtime import distributed
from rdm_jax.runtime.errors import InputError
from tests.support.checkpoints import read_arrays
from tests.support.commands import STAGE, ended, environment, start_two, two

WAIT = """
import sys, time
from rdm_jax.cli.exit_codes import exit_status
from rdm_jax.runtime import console, distributed, waiting
port, number, limit = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
waiting.SECONDS_BETWEEN_LINES, waiting.SECONDS_TO_WAIT = 0.2, limit
def work():
    console.show_log(quiet=number > 0)
    distributed.join(f"localhost:{port}", 2, number)
    slow = lambda: time.sleep(1) or [number, {"a": 0.1}]
    print(distributed.primary_alone("counts slowly", slow))
    assert distributed.primary_first("looks", lambda: number) == number
distributed.exit_with(lambda: exit_status(work, lambda: None))
"""


@pytest.mark.second
def test_wait_for_a_slow_first_process_is_said():
    (first, _), (second, _) = ended(two(WAIT, "100"))
    assert first.splitlines()[-1] == second.splitlines()[-1] == "[0, {'a': 0.1}]"
    line = r"waiting for process 0, which counts slowly \(for 0 min so far\)"
    assert re.search(line, second) and not re.search(line, first)


@pytest.mark.long
def test_wait_for_a_slow_first_process_has_an_end():
    for _, errors in ended(two(WAIT, "0.3"), 2):
        assert re.search(
            r"error: waited 8.33e-05 h for process 0, which counts slowly. See the log of", errors
        )


def test_failed_process_says_why_before_it_waits_and_raises_its_own_error(monkeypatch, caplog):
    """Although the others never come."""

    def meet(what, seconds=None):
        assert what == "process 0, which counts" and seconds <= 1200
        assert "this process failed (full), and waits for process 0, which counts" in caplog.text
        raise InputError("waited", "")

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(distributed, "meet", meet)
    together = distributed.raise_together("process 0, which counts")
    with pytest.raises(OSError, match="full"), together:
        raise OSError("full")


STEPS = """
import os, sys, time, signal
from rdm_jax.runtime import distributed, signals
port, number = sys.argv[1], int(sys.argv[2])
distributed.join(f"localhost:{port}", 2, number)
stop = signals.StopOnSignal()  # not entered: signals are the service's
for step in range(100):
    distributed.hear_preemption(stop)
    if stop.requested:
        break
    if step == 10 and number == 1 and "send" in sys.argv:
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.02 + 0.01 * number)
print(stop.requested, step)
"""


@pytest.mark.second
def test_preemption_of_one_process_is_heard_by_all_in_the_same_step():
    (first, _), (second, _) = ended(two(STEPS, "send"))
    assert first == second and first.startswith("15 ") and 10 < int(first.split()[1]) < 99


@pytest.mark.long
def test_without_the_preemption_service_nothing_is_heard():
    outputs = ended(two(STEPS, JAX_ENABLE_PREEMPTION_SERVICE="false"))
    assert [output for output, _ in outputs] == ["None 99\n"] * 2


PREEMPTED = (
    *STAGE,
    "--config.stage1.training.images=320",
    "--config.stage1.training.checkpoint_every=320",
)


@pytest.fixture(scope="module")
def straight(image_folder, tmp_path_factory):
    """A run of two processes that nothing stops."""
    workdir = tmp_path_factory.mktemp("straight")
    ended(start_two(image_folder, workdir, *PREEMPTED))
    return workdir


@pytest.mark.long
@pytest.mark.parametrize(
    ("broken", "service"), [("signals_left_to_jax", "true"), ("slow_steps", "false")]
)
def test_preempted_process_saves_with_the_other_and_resumes_bit_equal(
    image_folder, straight, tmp_path, broken, service
):
    """Of two processes that leave SIGTERM to JAX's service, and of two without the service."""
    options = {"env": environment(JAX_ENABLE_PREEMPTION_SERVICE=service)}
    pair = start_two(image_folder, tmp_path, *PREEMPTED, broken=broken, **options)
    metrics = tmp_path / "stage1/metrics.jsonl"
    while not (metrics.is_file() and metrics.read_text()) and pair[0].poll() is None:
        time.sleep(0.02)
    pair[1].send_signal(signal.SIGTERM)
    ended(pair, 143)
    (saved,) = folders.step_folders(tmp_path / "stage1/checkpoints")  # whole: by both
    assert 0 < int(saved.name) < 40
    (first, _), _ = ended(start_two(image_folder, tmp_path, *PREEMPTED, **options))
    assert f"stage1: resuming from {8 * int(saved.name):,} images" in first
    for item in ("ema", "train"):
        ours, theirs = (
            read_arrays(workdir / f"stage1/checkpoints/40/{item}")
            for workdir in (tmp_path, straight)
        )
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            np.testing.assert_array_equal(value, theirs[name], err_msg=name)
