"""Faults 3, 4, 5 and 11: stopped by signals, resumed, moved to other devices, and started twice."""

import itertools
import json
import shutil
import signal
import time

import jax
import numpy as np
import pytest

from rdm_jax import config as configs
from rdm_jax.checkpoints import store
from rdm_jax.data.image_sets import open_prepared
from rdm_jax.runtime import sharding
from rdm_jax.runtime.signals import ANSWERS
from rdm_jax.training import loop, metric_writer
from tests.support.checkpoints import assert_equal, state, steps
from tests.support.commands import STAGE, error_line, logged, run, start, wait_for
from tests.support.configs import LOW, tiny_config

LONG = ("--config.stage1.training.images=160000",)
STATUS = {signal.SIGTERM: 143, signal.SIGINT: 130}
SECONDS = 30


def in_a_step(workdir):
    return logged(workdir, 96)


def in_a_save(workdir):
    """While the second checkpoint is being written."""
    return lambda: list((workdir / "stage1/checkpoints").glob("1*.orbax-checkpoint-tmp*"))


# The others are long: tests/test_main.py stops a whole run by each signal in a step.
SIGNALS = [pytest.param(in_a_save, signal.SIGTERM, 2, marks=pytest.mark.second)]
SIGNALS += [
    pytest.param(*signals, marks=pytest.mark.long)
    for signals in itertools.product((in_a_step, in_a_save), STATUS, (1, 2))
    if signals != SIGNALS[0].values
]


def stopped(images, workdir, *flags, moment, number: int, times: int, **kwargs) -> bytes:
    """Stderr of a command that received a signal `times` times, each after it had answered the one
    before.

    Signals sent at once may merge into one. Asserts that the command ends in time with the status
    of the signal.
    """
    log = workdir.with_suffix(".stderr")
    with log.open("wb") as stderr:
        process = start(images, workdir, *STAGE, *flags, stderr=stderr, **kwargs)
    assert wait_for(moment(workdir), process), log.read_text()
    began = time.monotonic()
    for answer in (b"", *ANSWERS)[:times]:
        assert wait_for(lambda answer=answer: answer in log.read_bytes(), process), log.read_text()
        process.send_signal(number)
    process.communicate(timeout=SECONDS)
    assert process.returncode == STATUS[number] and time.monotonic() - began < SECONDS, (
        log.read_text()
    )
    return log.read_bytes()


@pytest.mark.parametrize(("moment", "number", "times"), SIGNALS)
def test_3_signal(image_folder, tmp_path, fault, number, moment, times):
    workdir = tmp_path / "run"
    stderr = stopped(image_folder, workdir, *LONG, moment=moment, number=number, times=times)
    assert b"stopped by" in stderr and [answer in stderr for answer in ANSWERS] == [True, times > 1]
    saved = steps(workdir)[-1]
    seen = [line["images"] for line in metric_writer.read(workdir / "stage1/metrics.jsonl")]
    assert saved * 8 == max(
        seen
    )  # the step that it was stopped at, whose validation loss is the last line
    what = f"{moment.__name__}, {times} of them"
    fault(
        3,
        1,
        f"{what}: a checkpoint of that step is there, status {STATUS[number]}, within {SECONDS} s",
    )


@pytest.mark.long  # tests/runtime/test_signals.py has the same within a process
@pytest.mark.parametrize("number", STATUS)
def test_3_signal_three_times(image_folder, finished, tmp_path, fault, number):
    """The first two signals wait for a save that takes a minute; the third does not."""
    workdir = tmp_path / "run"
    stderr = stopped(
        image_folder,
        workdir,
        moment=in_a_save,
        number=number,
        times=3,
        broken="second_save_is_slow",
    )
    assert steps(workdir) == [5] and b"Traceback" not in stderr
    run(image_folder, workdir, *STAGE)
    assert_equal(state(workdir), state(finished))
    fault(
        3,
        1,
        f"three times in a row: status {STATUS[number]} at once, nothing partial is listed, the end is bit-equal",
    )


def shortened(trained, workdir, step: int):
    """A copy of a workdir as it was at a step."""
    shutil.copytree(trained, workdir)
    for folder in (workdir / "stage1/checkpoints").iterdir():
        if int(folder.name) > step:
            shutil.rmtree(folder)
    return workdir


def about(workdir) -> dict:
    return json.loads((workdir / "stage1/checkpoints/20/about/metadata").read_text())


@pytest.mark.long  # tests/test_main.py has whole runs that are stopped and resume
def test_4_resume_twice_from_one_checkpoint(image_folder, finished, tmp_path, fault):
    for name in ("one", "other"):
        workdir = shortened(finished, tmp_path / name, 10)
        assert "resuming from 80 images" in run(image_folder, workdir, *STAGE)[0]
        assert_equal(state(workdir), state(finished))  # parameters, EMA, moments, step, counters
        assert about(workdir) == about(
            finished
        )  # data position, loss of fixed images under fixed noise
    fault(4, 2, "parameters, EMA, moments, step, data position and losses are bit-equal")


@pytest.mark.long
def test_5_restore_on_other_devices(image_folder, finished, tmp_path, fault):
    """Each checkpoint is restored from the one before, sharded over other devices, and saved
    again."""
    config = configs.parse(tiny_config(image_folder, low=LOW).to_config_dict())
    source = open_prepared(f"{image_folder}_prepared")
    whole = loop.Trainer(config, 1, source, tmp_path).abstract
    directory, wanted = finished / "stage1/checkpoints", state(finished)
    for number, devices in enumerate((8, 1, 2, 4, 8)):
        mesh = sharding.make_mesh(fsdp=devices, devices=jax.devices()[:devices])
        abstract = sharding.by_rules(whole, mesh)
        restored, about = store.Checkpoints(directory, read_only=True).restore(20, abstract)
        directory = tmp_path / str(number) / "stage1/checkpoints"
        saving = store.Checkpoints(directory)
        saving.save(restored, about)
        saving.close()
        cut = [
            leaf
            for leaf in jax.tree.leaves(restored.params)
            if not leaf.sharding.is_fully_replicated
        ]
        assert bool(cut) == (devices > 1)
        assert_equal(state(tmp_path / str(number)), wanted)
    fault(
        5,
        5,
        "sharded over 8, 1, 2, 4 and 8 devices in turn, saved and restored: all values are bit-equal",
    )


@pytest.mark.long
@pytest.mark.parametrize("devices", [(8, 1), (8, 2, 4, 1, 8)], ids=str)
def test_5_resume_on_other_devices(image_folder, tmp_path, fault, devices):
    """Each part of a run uses another number of devices: it starts from what was saved, and the
    order of the data is the same."""
    workdir, losses = tmp_path / "run", {}
    for number, count in enumerate(devices, 1):
        flags = (
            *STAGE,
            f"--config.stage1.training.images={40 * number}",
            "--config.stage1.training.log_every=8",
        )
        run(image_folder, workdir, *flags, devices=count)
    run(
        image_folder,
        tmp_path / "alone",
        *STAGE,
        f"--config.stage1.training.images={40 * len(devices)}",
        "--config.stage1.training.log_every=8",
    )
    for place in (workdir, tmp_path / "alone"):
        losses[place] = [
            line["loss"]
            for line in metric_writer.read(place / "stage1/metrics.jsonl")
            if "loss" in line
        ]
    one, other = losses.values()
    # The same images under the same noise, batch after batch, or the losses would differ in their
    # first digits.
    assert len(one) == 5 * len(devices) and np.allclose(one, other, rtol=1e-4)
    fault(
        5,
        len(devices) - 1,
        f"devices {devices}: the losses of all global batches are those of one device",
    )


@pytest.mark.long  # tests/test_main.py has a second run refused
def test_11_two_runs_in_one_workdir(image_folder, tmp_path, fault):
    workdir = tmp_path / "run"
    first = start(image_folder, workdir, *STAGE, *LONG)
    assert wait_for(logged(workdir, 16), first), first.communicate()
    assert "in use by another run" in error_line(run(image_folder, workdir, *STAGE, status=2)[1])
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert (workdir / ".lock").exists()
    run(image_folder, workdir, *STAGE)
    fault(11, 2, "the second is refused; the lock of a killed run does not block")
