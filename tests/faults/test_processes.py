"""Fault 20: one of two processes is killed."""

import signal
import time

import pytest

from tests.support.checkpoints import steps
from tests.support.commands import STAGE, logged, start_two, wait_for

SECONDS = 180  # jax polls the others every ten, and gives up after a hundred


@pytest.mark.long
@pytest.mark.parametrize("killed", [0, 1])
def test_20_kill_one_process_of_two(image_folder, tmp_path, fault, killed):
    """Either the second process, or the first, which writes the checkpoints and coordinates the
    others."""
    workdir = tmp_path / "run"
    pair = start_two(image_folder, workdir, *STAGE, "--config.stage1.training.images=160000")

    def ready():
        return len(steps(workdir, sound=False)) > 1 and logged(workdir, 96)()

    assert wait_for(ready, pair[0], timeout=240), pair[0].communicate()
    pair[killed].send_signal(signal.SIGKILL)
    began = time.monotonic()
    stdout, stderr = pair[1 - killed].communicate(timeout=SECONDS)
    pair[killed].communicate()
    took = time.monotonic() - began
    # Or jax, which looks every ten seconds, has seen it first, and ends the process.
    said = any(
        words in stderr
        for words in ("error: another process of this run has ended", "another task died")
    )
    assert pair[1 - killed].returncode != 0 and said, (pair[1 - killed].returncode, stdout, stderr)
    newest = steps(workdir)[-1]
    images_then = 8 * (newest + 10)
    pair = start_two(
        image_folder, workdir, *STAGE, f"--config.stage1.training.images={images_then}"
    )
    said = [process.communicate(timeout=300) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], said
    assert (
        f"resuming from {8 * newest:,} images" in said[0][0] and steps(workdir)[-1] == newest + 10
    )
    fault(
        20,
        1,
        f"the other ended after {took:.0f} s with a message; both resumed from the last committed step",
    )
