"""Fault 18: the environment of a run."""

import os
import shutil
import subprocess

import pytest

from tests.faults.tiers import one_of_many
from tests.support import commands
from tests.support.checkpoints import assert_equal, state
from tests.support.commands import STAGE, error_line, mounted, run
from tests.support.paths import ROOT


def shell(
    images, workdir, how: str, *flags: str, **environment: str
) -> subprocess.CompletedProcess:
    """Runs a shell line in which {} stands for the command."""
    command = " ".join(commands.command(images, workdir, *STAGE, *flags))
    kwargs = {
        "env": commands.environment(**environment),
        "cwd": ROOT,
        "capture_output": True,
        "text": True,
        "timeout": 300,
    }
    return subprocess.run(["bash", "-c", how.replace("{}", command)], **kwargs)


SPACES = "HOME and TMPDIR with spaces"
UNAFFECTED = {
    "stdout closed": "{} >&-",
    "stdout and stderr closed": "{} >&- 2>&-",
    "a reader that goes away": "{ {}; echo $? > STATUS; } | head -1 > /dev/null; exit $(cat STATUS)",
    "a full disk for the log": "{} > /dev/full",
    "locale C": "LC_ALL=C LANG=C {}",
    "full disks for the log and for errors": "{} > /dev/full 2> /dev/full",
    "no home directory": "env -u HOME {}",
    "a home directory that cannot be made": "HOME=/proc/nowhere {}",
    "no network": "unshare -rn {}",
    SPACES: "mkdir -p 'SPACES/a b' && HOME='SPACES/a b' TMPDIR='SPACES/a b' {}",
}


@pytest.mark.parametrize("kind", one_of_many(UNAFFECTED, "stdout closed", pytest.mark.second))
def test_18_training_is_unaffected(image_folder, finished, tmp_path, fault, kind):
    how = (
        UNAFFECTED[kind]
        .replace("STATUS", str(tmp_path / "status"))
        .replace("SPACES", str(tmp_path))
    )
    if (
        kind == "no network"
        and subprocess.run(["unshare", "-rn", "true"], capture_output=True).returncode
    ):
        pytest.skip("no network can be made here")
    # Where a home is the matter, what is compiled is kept where a user's would be, and not where
    # the tests have it.
    done = shell(
        image_folder,
        tmp_path / "run",
        how,
        **({"JAX_COMPILATION_CACHE_DIR": ""} if "home" in kind.lower() else {}),
    )
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert_equal(state(tmp_path / "run"), state(finished))
    assert kind != SPACES or list((tmp_path / "a b/.cache/rdm_jax/compiled").iterdir())
    fault(18, 1, f"{kind}: training is unaffected")


@pytest.mark.long
def test_18_read_only_source_tree(image_folder, finished, tmp_path, fault):
    mount = f"mount --bind {ROOT} {ROOT} && mount -o remount,ro,bind {ROOT}"
    train = " ".join(commands.command(image_folder, tmp_path / "run", *STAGE))
    done = mounted(mount, f"cd {ROOT} && ! touch here && {train}")
    assert done.returncode == 0, done.stderr
    assert_equal(state(tmp_path / "run"), state(finished))
    fault(18, 1, "a read-only source tree: training is unaffected")


@pytest.mark.long
def test_18_clock_set_back_between_saves(image_folder, finished, tmp_path, fault):
    run(image_folder, tmp_path / "run", *STAGE, broken="clock_goes_back")
    assert "already trained on 160 images" in run(image_folder, tmp_path / "run", *STAGE)[0]
    assert_equal(state(tmp_path / "run"), state(finished))
    fault(18, 1, "a clock set back between two saves: training is unaffected")


@pytest.mark.long
def test_18_clock_set_back_before_resuming(image_folder, finished, tmp_path, fault):
    """The files of the newest checkpoint, and all others written with it, have the oldest times."""
    shutil.copytree(finished, tmp_path / "run")
    for path in [
        *(tmp_path / "run/stage1/checkpoints/20").rglob("*"),
        tmp_path / "run/stage1/metrics.jsonl",
    ]:
        os.utime(path, (10**9, 10**9))
    assert "already trained on 160 images" in run(image_folder, tmp_path / "run", *STAGE)[0]
    fault(18, 1, "a clock that was set back: the newest checkpoint is the one of the last step")


@pytest.mark.second  # tests/test_refusals.py has the same within a process
def test_18_unwritable_workdir(image_folder, tmp_path, fault):
    (tmp_path / "file").write_text("in the way")
    assert "cannot be written" in error_line(
        run(image_folder, tmp_path / "file/run", *STAGE, status=2)[1]
    )
    fault(18, 1, "a workdir that cannot be written is refused")
