"""Fault 8: full disks, directories that disappear or become read-only."""

import pytest

from rdm_jax.training import metric_writer
from tests.support import commands
from tests.support.checkpoints import steps
from tests.support.commands import STAGE, error_line, mounted, run, start, wait_for


@pytest.mark.second
def test_8_full_disk(image_folder, tmp_path, fault):
    """A small disk is filled while training saves on it. Its content is copied, because it
    disappears with the script."""
    disk = tmp_path / "disk"
    disk.mkdir()
    train = " ".join(
        commands.command(
            image_folder, disk / "run", *STAGE, "--config.stage1.training.images=1600000"
        )
    )
    begun = f"while [ ! -d {disk}/run/stage1/checkpoints/5 ]; do sleep 0.05; done"
    fill = f"cat /dev/zero > {disk}/zeros 2> {tmp_path}/full"
    left = f"rm {disk}/zeros; cp -r {disk}/run {tmp_path}/run"
    small = f"mount -t tmpfs -o size=20M none {disk}"
    done = mounted(small, f"{train} & {begun}; {fill}; wait $!; status=$?; {left}; exit $status")
    assert done.returncode == 2 and "No space left" in error_line(done.stderr, alone=False), (
        done.stdout
    )  # TensorStore speaks too
    assert steps(tmp_path / "run")
    run(image_folder, tmp_path / "run", *STAGE)  # where there is space again
    assert steps(tmp_path / "run")[-1] == 20 and not list(
        (tmp_path / "run/stage1/checkpoints").glob("*tmp*")
    )
    fault(
        8,
        1,
        "a full disk is reported, with status 2; older checkpoints are sound, nothing partial is listed, training resumes",
    )


@pytest.mark.long
def test_8_full_disk_for_a_while(image_folder, tmp_path, fault):
    """Training continues without what it cannot write, as configured, and writes again once there
    is space."""
    disk, log = tmp_path / "disk", tmp_path / "log"
    disk.mkdir()
    flags = (
        "--config.stage1.training.images=16000",
        "--config.stage1.training.checkpoint_every=400",
    )
    flags += ("--config.stage1.training.max_failed_saves=1000000",)
    train = " ".join(commands.command(image_folder, disk / "run", *STAGE, *flags))
    script = [
        f"{train} > {log} 2> {tmp_path}/stderr & while [ ! -d {disk}/run/stage1/checkpoints/50 ]; do sleep 0.05; done",
        f"cat /dev/zero > {disk}/zeros 2> {tmp_path}/full",
        f"while ! grep -q 'checkpoint .* cannot be written' {log}; do kill -0 $! || exit 9; sleep 0.05; done",
        f"while ! grep -q 'metrics.jsonl cannot be written' {log}; do kill -0 $! || exit 9; sleep 0.05; done",
        f"rm {disk}/zeros; wait $!; status=$?; cp -r {disk}/run {tmp_path}/run; exit $status",
    ]
    done = mounted(f"mount -t tmpfs -o size=20M none {disk}", "\n".join(script))
    assert done.returncode == 0, (
        done.returncode,
        log.read_text(),
        (tmp_path / "stderr").read_text(),
    )
    assert steps(tmp_path / "run")[-1] == 2000
    seen = [
        line["step"]
        for line in metric_writer.read(tmp_path / "run/stage1/metrics.jsonl")
        if "loss" in line
    ]
    assert seen == list(range(2, 2001, 2))  # lines wait, and none is lost
    fault(
        8,
        1,
        "a disk that is full for a while: logged, tolerated as configured; no line of the metrics is lost",
    )


@pytest.mark.long  # tests/training has the same within a process
@pytest.mark.parametrize("in_the_way", [False, True])
def test_8_directory_disappears(image_folder, tmp_path, fault, in_the_way):
    workdir = tmp_path / "run"
    # Between two saves: one that is beginning would recreate the directory, which the next one
    # would notice.
    flags = (
        "--config.stage1.training.images=160000",
        "--config.stage1.training.checkpoint_every=1600",
    )
    process = start(image_folder, workdir, *STAGE, *flags)
    assert wait_for(lambda: steps(workdir, sound=False), process), process.communicate()
    (workdir / "stage1").rename(tmp_path / "elsewhere")
    if in_the_way:
        (workdir / "stage1").write_text("in the way")
    _, stderr = process.communicate(timeout=60)
    assert (
        process.returncode == 2
        and "stage1" in error_line(stderr)
        and "cannot be" in error_line(stderr)
    ), stderr
    assert not (workdir / "stage1/checkpoints").exists()  # or nobody would notice
    fault(8, 1, "a directory that disappears ends the run, with status 2")


@pytest.mark.long
def test_8_directory_becomes_read_only(image_folder, tmp_path, fault):
    """The directory is mounted over itself, read-only, while training saves in it."""
    saved, elsewhere = tmp_path / "run/stage1/checkpoints", tmp_path / "elsewhere"
    elsewhere.mkdir()
    flags = (
        "--config.stage1.training.images=1600000",
        "--config.stage1.training.max_failed_saves=1",
    )
    train = " ".join(commands.command(image_folder, tmp_path / "run", *STAGE, *flags))
    begun = f"while [ ! -d {saved}/5 ]; do sleep 0.05; done"
    # Elsewhere first: where a file is being written, a mount cannot become read-only.
    mount = f"mount --bind {saved} {elsewhere} && mount -o remount,ro,bind {elsewhere} && mount --bind {elsewhere} {saved}"
    done = mounted("true", f"{train} & {begun}; {mount}; wait $!")
    assert done.returncode == 2 and "Read-only file system" in error_line(
        done.stderr, alone=False
    ), (
        done.stdout,
        done.stderr,
    )
    assert "Read-only file system; training continues" in done.stdout and steps(tmp_path / "run")
    run(image_folder, tmp_path / "run", *STAGE)
    assert steps(tmp_path / "run")[-1] >= 20
    fault(
        8,
        1,
        "a directory that becomes read-only is logged, tolerated once as configured, and then ends the run with status 2",
    )
