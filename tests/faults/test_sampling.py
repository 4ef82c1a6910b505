"""Fault 17: killed while sampling and evaluating."""

import json
import re
import shutil
import signal

import numpy as np
import pytest

from tests.support.commands import run, start, wait_for

SAMPLE = ("--mode=sample", "--config.sampling.seeds=0-199", "--config.data.held_out=8")
EVALUATE = (
    "--mode=evaluate",
    "--config.evaluation.features=classifier",
    "--config.evaluation.images=samples",
)
EVALUATE += ("--config.evaluation.seeds=0-199", "--config.data.held_out=8")
SECONDS = 1200  # a classifier is trained first, which takes minutes as tests compile, and where others run beside it


@pytest.fixture(scope="module")
def trained(image_folder, tmp_path_factory):
    """A run with both stages trained and 8 images held out."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    run(image_folder, workdir, "--mode=train", "--config.data.held_out=8")
    return workdir


@pytest.fixture
def workdir(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def halve(path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def images_of(folder) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.suffix in (".png", ".npz")
    }


WAYS = [("npz", 8, 1), ("png", 8, 1), ("npz", 20, 4), ("png", 6, 2)]


@pytest.mark.long
@pytest.mark.parametrize(("files", "batch", "devices"), WAYS)
def test_17_kill_while_sampling(image_folder, workdir, fault, files, batch, devices):
    """Killed twice with some parts written. A truncated part and a truncated result are sampled
    again."""
    flags = (*SAMPLE, f"--config.sampling.files={files}", f"--config.sampling.batch_size={batch}")

    def again(name):
        return run(image_folder, workdir, *flags, f"--config.sampling.name={name}", devices=devices)

    def parts():
        return sorted((workdir / "killed").glob(".parts-*/0*.npz"))

    again("whole")
    kept = {}
    for count in (2, 6):
        process = start(
            image_folder, workdir, *flags, "--config.sampling.name=killed", devices=devices
        )
        assert wait_for(lambda count=count: len(parts()) >= count, process), process.communicate()
        process.send_signal(signal.SIGKILL)
        process.communicate()
        before, kept = kept, {path.name: path.stat().st_mtime_ns for path in parts()}
        assert before.items() <= kept.items()  # they were not made again
    halve(parts()[0])
    again("killed")
    assert images_of(workdir / "killed") == images_of(workdir / "whole")
    halve(workdir / "killed" / ("samples.npz" if files == "npz" else "images/0000000007.png"))
    again("killed")
    assert images_of(workdir / "killed") == images_of(workdir / "whole")
    what = "killed twice, half a part, half a result: resumed or sampled again, byte-equal"
    fault(17, 4, f"{files}, batches of {batch}, devices {devices}: {what}")


@pytest.mark.long
def test_17_samples_on_other_devices(image_folder, workdir, fault):
    for devices in (1, 4):
        run(image_folder, workdir, *SAMPLE, f"--config.sampling.name=on_{devices}", devices=devices)
    one, four = (
        np.load(workdir / name / "samples.npz")["images"].astype(int) for name in ("on_1", "on_4")
    )
    assert np.abs(one - four).max() <= 1  # other programs, other roundings
    fault(17, 1, "on 4 devices the same images, up to one level of uint8")


@pytest.mark.long
@pytest.mark.parametrize(("batch", "devices"), [(8, 1), (20, 4)])
def test_17_kill_while_evaluating(image_folder, workdir, fault, batch, devices):
    batches = (*EVALUATE, f"--config.sampling.batch_size={batch}")
    run(
        image_folder,
        workdir,
        *batches,
        "--config.evaluation.name=whole",
        devices=devices,
        timeout=SECONDS,
    )
    flags = (*batches, "--config.evaluation.name=killed")
    process = start(image_folder, workdir, *flags, devices=devices, broken="gathered_often")
    assert wait_for(
        lambda: any((workdir / "killed").glob(".gathered*.npz")), process, timeout=SECONDS
    ), process.communicate()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    stdout, _ = run(image_folder, workdir, *flags, devices=devices, timeout=SECONDS)
    assert re.search(r"resuming after [0-9]+ of 200 images", stdout)
    found = [
        json.loads((workdir / name / "evaluation.json").read_text())["results"]["samples"]
        for name in ("whole", "killed")
    ]
    assert (
        found[0]["metrics"] == found[1]["metrics"]
        and found[0]["images"] == found[1]["images"] == 200
    )
    where = f"batches of {batch}, devices {devices}"
    fault(17, 1, f"killed while evaluating, {where}, resumed: the figures are bit-equal")


@pytest.mark.long
def test_17_missing_images(image_folder, workdir, fault):
    flags = (*EVALUATE, "--config.evaluation.name=short")
    _, stderr = run(
        image_folder, workdir, *flags, broken="a_batch_is_lost", status=1, timeout=SECONDS
    )
    assert re.search(r"[0-9]+ of [0-9]+ images have been seen", stderr)
    assert not list((workdir / "short").rglob("*.json"))
    fault(17, 1, "a batch of images is lost: no figures, status 1")
