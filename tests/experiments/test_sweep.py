"""The sweep over averages and guidance: its cells are evaluations, and it resumes."""

import json
import re

import pytest

from rdm_jax.config import Evaluation
from rdm_jax.modes import run
from tests.support.commands import python
from tests.support.configs import tiny_config, write_images

ARGUMENTS = ("--stage=2", "--averages=ema,0.1,0.08", "--guidance=1,2", "--images=8")


def sweep(workdir, *arguments: str):
    return python("-m", "experiments.sweep", f"--workdir={workdir}", *arguments)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("swept")
    write_images(folder / "images")
    config = tiny_config(
        folder / "images", images=64, preview_every=0, averages=(0.05, 0.1), snapshot_every=8
    )
    for number in (1, 2):
        run(config, folder / "run", mode="train", stage=number)
    return folder / "run"


@pytest.mark.long
def test_sweep_measures_every_cell_once(trained):
    done = sweep(trained, "--features=classifier", *ARGUMENTS)
    assert done.returncode == 0, done.stderr
    root = trained / "sweep"
    cells = json.loads((root / "sweep.json").read_text())["cells"]
    assert [(cell["average"], cell["guidance"]) for cell in cells] == [
        (average, guidance) for average in ("ema", "0.1", "0.08") for guidance in (1.0, 2.0)
    ]
    found = {path.parent.name: path for path in root.glob("*/evaluation.json")}
    assert len(found) == 6
    for cell in cells:
        name = f"stage2_average_{cell['average']}_guidance_{cell['guidance']:g}"
        result = json.loads(found[name].read_text())
        assert result["results"]["samples"]["metrics"] == cell["metrics"]
        stages = result["made_with"]["images"][0]["stages"]
        width = cell["average"] if cell["average"] == "ema" else float(cell["average"])
        assert stages["stage1"]["average"] == "ema" and stages["stage2"]["average"] == width
    assert len({cell["metrics"]["frechet_distance"] for cell in cells}) == 6
    assert (root / "sweep.png").stat().st_size > 1000
    table = (root / "sweep.md").read_text()
    assert table in done.stdout and len(re.findall(r"^\| (?:ema|0)", table, re.MULTILINE)) == 6

    # The same command again, and one with a further average.
    times = {name: path.stat().st_mtime_ns for name, path in found.items()}
    done = sweep(trained, "--features=classifier", *ARGUMENTS, "--averages=raw,ema")
    assert done.returncode == 0, done.stderr
    found |= {path.parent.name: path for path in root.glob("*/evaluation.json")}
    assert len(found) == 8
    assert {name: found[name].stat().st_mtime_ns for name in times} == times


@pytest.mark.long
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--averages=ema,0.01",), "config.stage2.average='0.01' cannot be reconstructed"),
        (("--averages=mean",), "config.stage2.average='mean' cannot be used"),
        (("--guidance=1,high",), "--guidance='high' is not a number"),
        (("--stage=3",), "--stage=3 is not a stage"),
        (("--images=3",), "--images=3 cannot be measured"),
    ],
)
def test_sweep_refuses_before_any_work(trained, arguments, said):
    done = sweep(trained, "--features=classifier", *arguments)
    assert done.returncode == 2 and f"error: {said}" in done.stderr, done.stderr
    done = sweep(trained)
    assert Evaluation().features == "none" and "Pass --features=" in done.stderr
    assert sweep(trained / "nowhere").returncode == 2
