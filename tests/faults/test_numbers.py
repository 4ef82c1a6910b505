"""Fault 12: losses and gradients that are not finite."""

import re

import numpy as np
import pytest
from PIL import Image

from rdm_jax.data.image_sets import open_prepared
from rdm_jax.data.images import ImageSpec
from rdm_jax.data.pipeline import train_iterator
from rdm_jax.data.prepare import prepare
from rdm_jax.training import metric_writer
from tests.support.checkpoints import state
from tests.support.commands import STAGE, error_line, run, start_two
from tests.support.configs import write_images

LINES = (
    "--config.stage1.training.log_every=8",
    "--config.stage1.training.checkpoint_every=8",
    "--config.stage1.training.keep_newest=40",
)
LINES += ("--config.stage1.training.validation=1",)


def folder_with_white(folder, white: int):
    """A folder of images, the last `white` of which are white."""
    write_images(folder)
    for path in sorted(folder.glob("*/*.png"))[-white:]:
        Image.new("RGB", (12, 8), "white").save(path)
    return folder


@pytest.fixture(scope="module")
def one_white(tmp_path_factory):
    """A folder of 24 images (three batches per epoch), one of them white; and for each of 20
    batches whether it contains that image."""
    folder = folder_with_white(tmp_path_factory.mktemp("white") / "images", 1)
    images = open_prepared(prepare(f"folder:{folder}", f"{folder}_prepared", ImageSpec(8, 12)))
    batches = train_iterator(images, batch_size=8, seed=1)  # of stage 1 of seed 0
    return folder, [bool((next(batches)["image"] == 255).all((1, 2, 3)).any()) for _ in range(20)]


def skipped(workdir) -> list[bool]:
    return [
        bool(line["skipped"])
        for line in metric_writer.read(workdir / "stage1/metrics.jsonl")
        if "skipped" in line
    ]


def check_untouched(workdir, struck: list[bool]) -> None:
    """A bad step changes the counters only, any other changes the parameters, and everything is
    finite."""
    before = state(workdir, 1)
    for step, hit in enumerate(struck[1:], 2):
        after = state(workdir, step)
        changed = {
            name for name, value in after.items() if value.tobytes() != before[name].tobytes()
        }
        counters = {
            name
            for name in changed
            if any(word in name for word in ("'step'", "'skipped'", "'skipped_in_a_row'"))
        }
        assert (changed == counters) == hit, (step, hit, sorted(changed - counters)[:3])
        assert all(np.isfinite(value).all() for value in after.values())
        before = after
    assert int(before["train['skipped']"]) == sum(struck)


CASES = [
    ("white_is_nan", ()),
    ("white_is_inf", ("--config.stage1.network.dtype=bfloat16",)),
    ("white_has_no_gradient", ()),
]


@pytest.mark.long  # tests/training/test_step.py has the same within a process
@pytest.mark.parametrize(("broken", "flags"), CASES, ids=str)
def test_12_bad_image(one_white, tmp_path, fault, broken, flags):
    images, struck = one_white
    assert 5 < sum(struck) < 10
    run(images, tmp_path / "run", *STAGE, *LINES, *flags, broken=broken)
    assert skipped(tmp_path / "run") == struck
    check_untouched(tmp_path / "run", struck)
    fault(
        12,
        sum(struck),
        f"{broken} {' '.join(flags)}: skipped and counted; parameters, moments and EMA unchanged",
    )


@pytest.mark.long
def test_12_bad_image_on_one_host(one_white, tmp_path, fault):
    images, struck = one_white
    pair = start_two(images, tmp_path / "run", *STAGE, *LINES, broken="white_is_nan_in_one_host")
    said_by = [process.communicate(timeout=300) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], said_by
    assert skipped(tmp_path / "run") == struck
    check_untouched(tmp_path / "run", struck)
    one, other = (
        (tmp_path / f"run/stage1/recorded_by_{process}").read_text().splitlines()
        for process in range(2)
    )
    assert one == other and len(one) == len(
        struck
    )  # parameters, moments, EMA and counters, as each host has them
    fault(
        12, sum(struck), "on one host of two: skipped on both, which hold the same after every step"
    )


@pytest.mark.long  # tests/test_main.py has a run that diverges
@pytest.mark.parametrize("pictures", [False, True])
def test_12_bad_steps_in_a_row_end_run(tmp_path, fault, pictures):
    """With previews: one is drawn while the last steps are still being computed, before those are
    known to be bad."""
    images = folder_with_white(tmp_path / "images", 24)
    flags = (
        "--config.stage1.training.max_skipped=4",
        "--config.stage1.training.checkpoint_every=1600",
    )
    flags += ("--config.stage1.training.preview_every=32",) if pictures else ()
    _, stderr = run(images, tmp_path / "run", *STAGE, *flags, broken="white_is_nan", status=1)
    found = int(re.search(r"([0-9]+) steps in a row", error_line(stderr))[1])
    assert (
        4 <= found <= 6
    )  # what a step has found is read a step or two later, so that the device need not wait
    saved = state(tmp_path / "run", found)
    assert (
        all(np.isfinite(value).all() for value in saved.values())
        and int(saved["train['skipped']"]) == found
    )
    fault(
        12,
        1,
        "as many in a row as configured end the run, with status 1 and the last good state saved",
    )
