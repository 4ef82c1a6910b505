"""The wheel, installed into a fresh environment: `rdm-jax --config digits` in an empty folder."""

import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest

from tests.support.paths import ROOT

TINY = [
    f"--config.stage{number}.training.{field}={value}"
    for number in (1, 2)
    for field, value in {
        "images": 640,
        "batch_size": 16,
        "warmup": 32,
        "checkpoint_every": 320,
        "preview_every": 0,
        "evaluate_every": 0,
        "log_every": 16,
    }.items()
]
TINY += ["--config.evaluation.features=none", "--config.sampling.seeds=0-3"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of this checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(ROOT)]
    subprocess.run(build, check=True, timeout=300)
    (path,) = folder.glob("rdm_jax-*.whl")
    return path


@pytest.fixture(scope="module")
def install(wheel, tmp_path_factory):
    """A function that installs the wheel with extras into one fresh environment, whose folder of
    commands it returns. Libraries have the versions that the tests run with."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder / "venv", with_pip=True)
    versions = {
        found.name: found.version
        for found in importlib.metadata.distributions()
        if found.name and found.name.lower() not in ("rdm_jax", "pip", "setuptools")
    }
    constraints = folder / "constraints.txt"
    constraints.write_text("\n".join(f"{name}=={version}" for name, version in versions.items()))
    commands = folder / "venv/bin"

    def install(extras: str) -> Path:
        pip = [commands / "python", "-m", "pip", "install", "-q", "-c", constraints]
        subprocess.run([*pip, f"{wheel}{extras}"], check=True, timeout=600)
        return commands

    return install


def environment() -> dict[str, str]:
    """Without what leads to the checkout."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {
        "JAX_PLATFORMS": "cpu"
    }


@pytest.mark.second
def test_wheel_has_the_configs_and_the_marker_of_types(wheel):
    names = subprocess.run(
        [sys.executable, "-m", "zipfile", "-l", wheel], capture_output=True, text=True, check=True
    ).stdout.split()
    configs = {path.name for path in (ROOT / "configs").glob("*.py")}
    assert {f"rdm_jax/configs/{name}" for name in configs} | {"rdm_jax/py.typed"} <= set(names)
    assert not [name for name in names if name.startswith(("configs/", "tests/", "experiments/"))]


@pytest.mark.second
def test_description_has_no_relative_links(wheel):
    read = "import sys, zipfile; z = zipfile.ZipFile(sys.argv[1]); "
    read += "print(z.read([n for n in z.namelist() if n.endswith('METADATA')][0]).decode())"
    text = subprocess.run(
        [sys.executable, "-c", read, wheel], capture_output=True, text=True, check=True
    ).stdout
    links = [part.partition(")")[0] for part in text.split("](")[1:]]
    assert links and all(link.startswith(("https://", "http://", "#")) for link in links)


@pytest.mark.second
def test_wheel_runs_from_an_empty_folder(wheel, tmp_path):
    library, empty = tmp_path / "library", tmp_path / "empty"
    empty.mkdir()
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", library, wheel]
    subprocess.run(pip, check=True, timeout=300)
    command = [library / "bin/rdm-jax", "--config", "digits", "--mode", "plan"]
    command += ["--classes", "10"]
    paths = environment() | {"PYTHONPATH": str(library)}
    run = subprocess.run(
        command, cwd=empty, env=paths, capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, run.stderr
    assert "stage2" in run.stdout


@pytest.mark.long
def test_digits_are_trained_and_sampled_from_an_empty_folder(install, tmp_path):
    commands = install("")
    command = [commands / "rdm-jax", "--config", "digits", "--workdir", "runs/digits", *TINY]
    options = {"cwd": tmp_path, "env": environment(), "text": True}

    # Without extras the first library that is needed is named.
    refused = subprocess.run(command, capture_output=True, timeout=120, **options)
    assert refused.returncode == 2
    assert refused.stderr.splitlines() == [
        "error: the package tensorflow_datasets is not installed. Run pip install 'rdm_jax[data]'."
    ]

    install("[all]")
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options
    ) as run:
        for line in run.stdout:
            if "stage1: " in line and "images/s" in line:
                run.send_signal(signal.SIGINT)
                break
        rest = run.stdout.read()
    assert run.returncode == 130, rest
    finished = subprocess.run(command, capture_output=True, timeout=300, **options)
    assert finished.returncode == 0, finished.stderr
    assert "all: done" in finished.stdout
    samples = np.load(tmp_path / "runs/digits/samples/samples.npz")
    assert samples["images"].shape == (4, 32, 32, 1) and samples["images"].dtype == np.uint8
    assert json.loads((tmp_path / "runs/digits/config.json").read_text())["data"]["channels"] == 1
