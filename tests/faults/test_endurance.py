"""Fault 19: a long run."""

import pytest

from rdm_jax.training import metric_writer
from tests.support.commands import STAGE, run

STEPS, EARLY = 100_000, 5_000


@pytest.mark.long
def test_19_hundred_thousand_steps(image_folder, tmp_path, fault):
    """Compares memory, threads and open files after 5,000 steps with those at the end, 95 saves
    later.

    tensorstore (0.1.71 to 0.1.86) does not free what it converts to JSON: about 1,750 Python
    objects per save of this network.
    """
    each = {"images": 8 * STEPS, "checkpoint_every": 8 * 1000, "log_every": 800}
    flags = [f"--config.stage1.training.{name}={value}" for name, value in each.items()]
    run(image_folder, tmp_path, *STAGE, *flags, broken="measured", timeout=2 * 3600)
    recorded = {
        line["step"]: line for line in metric_writer.read(tmp_path / "stage1/recorded_by_0")
    }
    grown = {
        name: recorded[STEPS][name] - recorded[EARLY][name]
        for name in ("memory", "threads", "files")
    }
    assert (
        len(recorded) == 100
        and grown["memory"] < 50 * 2**20
        and grown["threads"] <= 2
        and grown["files"] <= 4
    ), recorded
    memory = f"memory in use {grown['memory'] / 2**20:+.1f} MiB"
    fault(
        19,
        1,
        f"{STEPS:,} steps: {memory}, threads {grown['threads']:+}, files {grown['files']:+} since step {EARLY:,}",
    )
