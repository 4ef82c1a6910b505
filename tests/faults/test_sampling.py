"""Fault 17: killed while images are made and measured."""

import json
import shutil
import signal

import numpy as np
import pytest

from tests.faults.commands import run, start, wait_for

MANY = ("--config.sampling.seeds=0-199", "--config.sampling.batch_size=8")
EVALUATE = ("--mode=evaluate", "--config.evaluation.features=classifier", "--config.evaluation.images=samples")
EVALUATE += ("--config.evaluation.seeds=0-199", "--config.sampling.batch_size=8", "--config.data.held_out=8")


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory):
    """A run of both stages that has sampled nothing; 8 images were held out."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    run(images, workdir, "--mode=train", "--config.data.held_out=8")
    return workdir


@pytest.fixture
def workdir(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def sample(images, workdir, name: str, *flags: str, **kwargs):
    flags = ("--mode=sample", "--config.data.held_out=8", f"--config.sampling.name={name}", *MANY, *flags)
    return run(images, workdir, *flags, **kwargs)


def halve(path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def images_of(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.suffix in (".png", ".npz")}


@pytest.mark.parametrize("files", ["npz", pytest.param("png", marks=pytest.mark.long)])
def test_17_killed_while_sampling(images, workdir, fault, files):
    """Twice, when some parts are written; a part, and a file of the result, that are cut in half are made again."""
    flags = ("--mode=sample", "--config.data.held_out=8", *MANY, f"--config.sampling.files={files}")
    run(images, workdir, *flags, "--config.sampling.name=whole")
    for count in (3, 9):
        process = start(images, workdir, *flags, "--config.sampling.name=killed")
        parts = lambda: sorted((workdir / "killed").glob(".parts-*/0*.npz"))  # noqa: E731
        assert wait_for(lambda count=count, parts=parts: len(parts()) >= count, process), process.communicate()
        process.send_signal(signal.SIGKILL)
        process.communicate()
    halve(parts()[0])
    run(images, workdir, *flags, "--config.sampling.name=killed")
    assert images_of(workdir / "killed") == images_of(workdir / "whole")
    halve(workdir / "killed" / ("samples.npz" if files == "npz" else "images/0000000007.png"))
    run(images, workdir, *flags, "--config.sampling.name=killed")
    assert images_of(workdir / "killed") == images_of(workdir / "whole")
    fault(17, 4, f"{files}: killed twice, half a part, half a result: continued or made again, byte-equal")


@pytest.mark.long
def test_17_on_other_devices(images, workdir, fault):
    sample(images, workdir, "one")
    sample(images, workdir, "four", devices=4)
    one, four = (np.load(workdir / name / "samples.npz") for name in ("one", "four"))
    assert np.abs(one["images"].astype(int) - four["images"].astype(int)).max() <= 1  # other programs, other roundings
    fault(17, 1, "on 4 devices the same images, up to one level of uint8")


@pytest.mark.long
def test_17_killed_while_evaluating(images, workdir, fault):
    whole = (*EVALUATE, "--config.evaluation.name=whole")
    run(images, workdir, *whole)
    flags = (*EVALUATE, "--config.evaluation.name=killed")
    process = start(images, workdir, *flags)
    assert wait_for(lambda: any((workdir / "killed").rglob(".gathered*")), process), process.communicate()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    run(images, workdir, *flags)
    found = [json.loads((workdir / name / "evaluation.json").read_text())["results"]["samples"] for name in ("whole", "killed")]
    assert found[0]["metrics"] == found[1]["metrics"] and found[0]["images"] == found[1]["images"] == 200
    fault(17, 1, "killed while evaluating, continued: the figures are equal to the last bit")
