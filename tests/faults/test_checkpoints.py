"""Faults 1, 2, 6, 7, 9 and 10: checkpoints interrupted during writing, or damaged later."""

import random
import shutil
import signal
import time
from typing import NamedTuple

import numpy as np
import orbax.checkpoint as ocp
import pytest

from rdm_jax.checkpoints.checksums import CHECKSUMS, LATER, write_checksums
from rdm_jax.training import metric_writer
from tests.support.checkpoints import assert_equal, read_tree, state, steps
from tests.support.commands import STAGE, error_line, run, start, wait_for

EVERY_STEP = (
    "--config.stage1.training.checkpoint_every=8",
    "--config.stage1.training.keep_newest=2",
)


@pytest.fixture
def trained(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def newest(workdir) -> int:
    return max(steps(workdir, sound=False), default=0)


class Pace(NamedTuple):
    """Seconds per phase of a training that saves after every step."""

    first: float  # from its start until its first checkpoint is listed
    each: float  # from there to the next

    @classmethod
    def seen(cls, images, workdir) -> "Pace":
        began, process, listed = time.monotonic(), start(images, workdir, *STAGE, *EVERY_STEP), []
        for step in (1, 3):
            assert wait_for(lambda step=step: newest(workdir) >= step, process), (
                process.communicate()
            )
            listed.append(time.monotonic())
        process.kill()
        process.communicate()
        return cls(listed[0] - began, (listed[1] - listed[0]) / 2)


def killed_until_done(images, workdir, kills: int, moments: random.Random, pace: Pace) -> list[str]:
    """Kills training repeatedly, and returns the phase of each kill.

    One kill in four falls between the start and the first checkpoint, the others within the two
    saves after that.
    """
    within = []
    for _ in range(kills):
        before, early = newest(workdir), moments.random() < 0.25
        process = start(images, workdir, *STAGE, *EVERY_STEP)
        if not early and not wait_for(lambda before=before: newest(workdir) > before, process):
            break
        time.sleep(moments.uniform(0, pace.first if early else 2 * pace.each))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if process.returncode != -signal.SIGKILL:  # it was done before
            break
        saving = any((workdir / "stage1/checkpoints").glob("*.orbax-checkpoint-tmp*"))
        within.append("a start" if early else "a save" if saving else "a step")
        steps(workdir)  # all of them are sound
    return within


@pytest.mark.long  # tests/test_main.py has whole runs that are killed in each stage
@pytest.mark.parametrize("kills", [3, 50])
def test_1_kill_at_random_moments(image_folder, finished, tmp_path, fault, kills):
    within, attempt, pace = [], 0, Pace.seen(image_folder, tmp_path / "pace")
    while len(within) < kills:
        workdir, attempt = tmp_path / str(attempt), attempt + 1
        within += killed_until_done(
            image_folder, workdir, min(5, kills - len(within)), random.Random(attempt), pace
        )
        run(image_folder, workdir, *STAGE, *EVERY_STEP)
        assert_equal(state(workdir), state(finished))
    assert kills < 50 or {"a start", "a save"} <= set(within)
    counts = ", ".join(f"{within.count(what)} within {what}" for what in sorted(set(within)))
    fault(
        1,
        len(within),
        f"{counts}: a sound step was found, the end is bit-equal, nothing partial was listed",
    )


@pytest.mark.second
def test_2_kill_between_last_write_and_commit(image_folder, finished, tmp_path, fault):
    workdir = tmp_path / "run"
    run(image_folder, workdir, *STAGE, broken="killed_before_commit", status=-signal.SIGKILL)
    left = {path.name for path in (workdir / "stage1/checkpoints").iterdir()}
    assert steps(workdir) == [5] and any(name.startswith("10.") for name in left)
    run(image_folder, workdir, *STAGE)  # which saves the same step
    assert (
        steps(workdir)
        == [10, 15, 20]
        == sorted(int(path.name) for path in (workdir / "stage1/checkpoints").iterdir())
    )
    assert_equal(state(workdir), state(finished))
    fault(2, 1, "the step was not listed, its remains are gone, and it was saved again")


def damaged(path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "cut":
        content = content[:-1]
    else:
        content[len(content) // 2] ^= 1
    path.write_bytes(content)


def files_of(step) -> list:
    found = [path for path in sorted(step.rglob("*")) if path.is_file() and path.stat().st_size]
    return [path for path in found if str(path.relative_to(step)) not in LATER]


@pytest.mark.long  # tests/training has each file cut and flipped within a process
@pytest.mark.parametrize("count", [2, 10**6])
def test_6_damage_in_each_file(image_folder, trained, finished, fault, count):
    """The damaged file is named; for a damaged checksum, the file that it belongs to."""
    files = files_of(trained / "stage1/checkpoints/20")
    chosen = files[:: max(1, len(files) // count)][:count]
    for number, path in enumerate(chosen):
        how = ("cut", "flipped")[number % 2] if count < len(files) else None
        for each in [how] if how else ("cut", "flipped"):
            shutil.rmtree(trained)
            shutil.copytree(finished, trained)
            damaged(path, each)
            stdout, _ = run(image_folder, trained, *STAGE)
            named = (
                f"{path.relative_to(trained / 'stage1/checkpoints/20')} "
                if path.name != CHECKSUMS
                else ""
            )
            assert f"20 is damaged ({named}" in stdout and "the newest is now step 15" in stdout
            assert_equal(state(trained), state(finished))  # trained again from step 15
    fault(
        6,
        len(chosen) * (1 if count < len(files) else 2),
        "named; the step before was used; the end is bit-equal",
    )


@pytest.mark.long  # tests/test_main.py has a damaged checkpoint refused
def test_6_sampling_refuses_damaged_checkpoint(image_folder, trained, fault):
    damaged(files_of(trained / "stage1/checkpoints/20/ema")[-1], "flipped")
    flags = ("--mode=sample", "--config.stage2.checkpoint=newest")
    assert "checkpoints/20 is damaged (ema/" in error_line(
        run(image_folder, trained, *flags, status=2)[1]
    )
    for step in (10, 15):
        damaged(files_of(trained / f"stage1/checkpoints/{step}/train")[0], "cut")
    assert "checkpoints/20 is damaged (ema/" in error_line(
        run(image_folder, trained, *STAGE, status=2)[1]
    )
    assert {path.name for path in (trained / "stage1/checkpoints").iterdir()} == {"10", "15", "20"}
    fault(
        6,
        2,
        "if nothing else is sound, or in sampling, the run is refused and changes nothing",
    )


@pytest.mark.long  # tests/training has the same within a process
def test_7_files_missing_or_added_and_other_config(image_folder, trained, finished, fault):
    files = files_of(trained / "stage1/checkpoints/20")
    files[0].unlink()
    stdout, _ = run(image_folder, trained, *STAGE)
    assert (
        f"20 is damaged ({files[0].relative_to(trained / 'stage1/checkpoints/20')} is missing)"
        in stdout
    )
    (trained / "stage1/checkpoints/20/ema/more").touch()
    stdout, _ = run(image_folder, trained, *STAGE)
    assert "20 is damaged (ema/more does not belong to it)" in stdout
    assert_equal(state(trained), state(finished))
    for flag in ("network.channels=16", "network.dtype=bfloat16"):
        refusal = error_line(
            run(image_folder, trained, *STAGE, f"--config.stage1.{flag}", status=2)[1]
        )
        assert f"config.stage1.{flag.partition('=')[0]} was" in refusal
    fault(7, 4, "an error or a line that names the file or the field")


@pytest.mark.long
def test_7_damaged_metrics_and_missing_config(image_folder, trained, fault):
    lines = (trained / "stage1/metrics.jsonl").read_bytes().splitlines(keepends=True)
    lines[3] = bytes([lines[3][0] | 0x80]) + lines[3][1:]
    (trained / "stage1/metrics.jsonl").write_bytes(b"".join(lines))
    (trained / "config.json").unlink()  # the checkpoint knows as well
    refusal = error_line(
        run(image_folder, trained, *STAGE, "--config.stage1.training.learning_rate=0.5", status=2)[
            1
        ]
    )
    assert "config.stage1.training.learning_rate was 0.001 and is 0.5" in refusal
    stdout, _ = run(image_folder, trained, *STAGE, "--config.stage1.training.images=176")
    assert "metrics.jsonl: line 4 is damaged and skipped" in stdout
    assert len(metric_writer.read(trained / "stage1/metrics.jsonl")) >= len(lines)
    fault(
        7,
        2,
        "without config.json, another config is named; a damaged line of the metrics is named and skipped",
    )


def first_leaf(tree: dict) -> tuple[dict, str]:
    """The dict that holds the first array of a tree of dicts, and its key."""
    key = next(iter(tree))
    return first_leaf(tree[key]) if isinstance(tree[key], dict) else (tree, key)


CHANGES = {
    "of a wrong shape": lambda holder, key: holder.update({key: np.repeat(holder[key], 2, axis=0)}),
    "missing": lambda holder, key: holder.pop(key),
    "of another dtype": lambda holder, key: holder.update({key: holder[key].astype(np.float16)}),
}


@pytest.mark.long
@pytest.mark.parametrize("how", CHANGES)
def test_7_checkpoint_of_other_arrays(image_folder, trained, fault, how):
    """The checksums are those of the files, but the arrays are wrong."""
    step = trained / "stage1/checkpoints/20"
    tree = read_tree(step / "train")
    holder, key = first_leaf(tree["params"])
    CHANGES[how](holder, key)
    shutil.rmtree(step / "train")
    with ocp.PyTreeCheckpointer() as writer:
        writer.save(step / "train", tree)
    write_checksums(step)
    refusal = error_line(run(image_folder, trained, *STAGE, status=2)[1])
    assert "checkpoints/20 is of another network (params/" in refusal and f"/{key} is " in refusal
    fault(7, 1, f"an array that is {how}: an error that names it")


@pytest.mark.long
def test_10_retention_keeps_only_checkpoint_if_saves_fail(image_folder, tmp_path, fault):
    flags = (
        "--config.stage1.training.max_failed_saves=1",
        "--config.stage1.training.keep_newest=1",
    )
    run(image_folder, tmp_path / "run", *STAGE, *flags, broken="saves_fail", status=2)
    assert steps(tmp_path / "run") == [5]
    fault(10, 2, "with one checkpoint to keep, it is kept while later saves fail")


@pytest.mark.long  # tests/training has saves that fail within a process
@pytest.mark.parametrize(
    ("broken", "status"), [("saves_fail", 2), ("one_save_fails", 0), ("last_save_fails", 2)]
)
def test_9_failure_in_writer_thread(image_folder, tmp_path, fault, broken, status):
    flags = ("--config.stage1.training.max_failed_saves=1",)
    stdout, stderr = run(
        image_folder, tmp_path / "run", *STAGE, *flags, broken=broken, status=status
    )
    assert "/10 cannot be written: " in stdout + stderr or broken == "last_save_fails"
    assert "No space left" in (error_line(stderr) if status else stdout)
    expected = {"one_save_fails": [5, 15, 20], "saves_fail": [5], "last_save_fails": [5, 10, 15]}[
        broken
    ]
    assert steps(tmp_path / "run") == expected[-3:]
    assert not list((tmp_path / "run/stage1/checkpoints").glob("*tmp*"))
    fault(9, 1, f"{broken}: logged, with status {status}; older checkpoints are sound")


@pytest.mark.long
def test_9_exit_waits_for_save(image_folder, finished, tmp_path, fault):
    run(image_folder, tmp_path / "run", *STAGE, broken="last_save_is_slow")
    assert_equal(state(tmp_path / "run"), state(finished))
    fault(9, 1, "a normal exit waits for a save in progress")


@pytest.mark.long
def test_10_retention_keeps_only_sound_checkpoint(image_folder, trained, finished, fault):
    """All checkpoints but the oldest are damaged, one is to be kept, and the second save is killed:
    at any time one is sound."""
    for step in (15, 20):
        damaged(files_of(trained / f"stage1/checkpoints/{step}/train")[-1], "flipped")
    run(
        image_folder,
        trained,
        *STAGE,
        "--config.stage1.training.keep_newest=1",
        broken="killed_before_commit",
        status=-9,
    )
    assert steps(trained) == [15]  # saved again before 10 was deleted; the save of 20 was killed
    run(image_folder, trained, *STAGE)
    assert_equal(state(trained), state(finished))
    fault(10, 1, "the sound one was kept and resumed from, the end is bit-equal")
