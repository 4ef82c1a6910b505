"""Runs of earlier versions (tests/golden) are resumed, sampled, evaluated and exported by this
one."""

import json
import logging
import tarfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from rdm_jax.checkpoints import folders
from rdm_jax.config import parse
from rdm_jax.config.saved import VERSION, read_saved
from rdm_jax.evaluation.evaluator import RESULT
from rdm_jax.evaluation.result_files import same_made_with
from rdm_jax.modes import run
from rdm_jax.training import metric_writer

GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.tar.gz"))


@pytest.fixture(params=GOLDEN, ids=lambda path: path.name.partition(".")[0])
def golden(request, tmp_path, monkeypatch, caplog):
    """The folder of a run of an earlier version, which is the current one."""
    with tarfile.open(request.param) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO, "rdm_jax")
    return tmp_path


def again(**changes) -> None:
    """The run's own command with other values of some fields, by their dotted paths."""
    options = {key: changes.pop(key) for key in ("mode", "stage", "weights") if key in changes}
    values = parse(read_saved(Path("run/config.json"))).to_config_dict()
    values.update_from_flattened_dict(
        {name.replace("__", "."): value for name, value in changes.items()}
    )
    run(values, "run", **options)


def files(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path): (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*.*")
        if path.is_file()
    }


@pytest.mark.second
def test_golden_run_is_known_and_resumed(golden, caplog):
    """All that was done is left alone; then training goes on as the earlier version's own did."""
    before = {
        name: files(golden / "run" / name)
        for name in ("samples", "evaluation", "stage1/checkpoints")
    }
    again()
    for said in (
        "stage1: already trained",
        "stage2: already trained",
        "12 images are already in",
        "evaluation: already in",
    ):
        assert said in caplog.text, said
    assert {name: files(golden / "run" / name) for name in before} == before
    again(mode="prepare")
    assert "was prepared before" in caplog.text and "match their hashes" in caplog.text
    again(mode="train", stage2__training__images=160)
    assert "stage2: resuming from 80 images" in caplog.text
    assert folders.read_about(golden / "run/stage2/checkpoints/20")["version"] == VERSION
    ours, theirs = (
        {
            (line["step"], name): line[name]
            for line in metric_writer.read(path)
            for name in ("loss", "validation_loss")
            if name in line
        }
        for path in (golden / "run/stage2/metrics.jsonl", golden / "resumed_metrics.jsonl")
    )
    assert ours.keys() == theirs.keys() and (20, "validation_loss") in ours
    # Other devices add in another order; the data, the noise and the parameters are the same.
    np.testing.assert_allclose(
        [ours[key] for key in ours], [theirs[key] for key in ours], rtol=1e-4
    )
    assert json.loads((golden / "run/config.json").read_text())["version"] == VERSION


@pytest.mark.second
def test_golden_run_is_sampled_evaluated_and_exported(golden):
    again(mode="sample", sampling__name="again")
    ours, theirs = (np.load(golden / "run" / name / "samples.npz") for name in ("again", "samples"))
    for name in ("stage1", "images"):
        assert (
            np.abs(ours[name].astype(int) - theirs[name].astype(int)).max() <= 1
        )  # of 255: devices differ in the last bit
    assert ours["labels"].tolist() == theirs["labels"].tolist()
    again(mode="evaluate", evaluation__name="evaluated_again")
    ours, theirs = (
        json.loads((golden / "run" / name / RESULT).read_text())
        for name in ("evaluated_again", "evaluation")
    )
    # The recorded run is of a version that had fewer settings.
    assert same_made_with(theirs["made_with"], ours["made_with"])
    for name, row in theirs["results"].items():
        found = ours["results"][name]["metrics"]
        # The recorded run is of a version that did not measure grain.
        assert found.keys() == row["metrics"].keys() | {"high_frequency_ratio"}
        np.testing.assert_allclose(
            [found[key] for key in row["metrics"]],
            [row["metrics"][key] for key in row["metrics"]],
            rtol=0.01,
            atol=1e-3,
        )
    again(mode="export", stage=1, weights="exported.safetensors")
    exported, expected = (
        load_file(golden / "exported.safetensors"),
        load_file(golden / "stage1.safetensors"),
    )
    assert exported.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(exported[name], expected[name], err_msg=name)
