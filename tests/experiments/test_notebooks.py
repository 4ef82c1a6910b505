"""The notebooks, from top to bottom in small, and what their first cells would do to a runtime."""

import ast
import base64
import importlib.metadata
import io
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from PIL import Image

from rdm_jax.checkpoints import store
from rdm_jax.training import metric_writer
from tests.support.commands import environment
from tests.support.paths import ROOT
from tests.support.pictures import are_samples, shows_a_curve, shows_images

FOLDER = ROOT / "experiments" / "notebooks"
NAMES = ("relay_diffusion_colab", "inside_the_relay", "from_python")

NETWORK = {
    "channels": 8,
    "channel_mult": (1,),
    "blocks": 1,
    "attention_levels": (),
    "head_channels": 8,
    "dropout": 0.0,
}
TRAINING = {
    "images": 64,
    "batch_size": 16,
    "warmup": 16,
    "checkpoint_every": 32,
    "preview_every": 0,
    "evaluate_every": 0,
}
TRAINING |= {"log_every": 16, "validation": 16}
# What Colab's TPU runtime comes with (August 2026), as far as it matters.
COLAB = {
    "jax": "0.7.2",
    "jaxlib": "0.7.2",
    "libtpu": "0.0.21",
    "flax": "0.11.2",
    "numpy": "2.1.3",
    "optax": "0.2.8",
}
COLAB |= {
    "orbax-checkpoint": "0.12.4",
    "grain": "0.2.18",
    "tensorflow_datasets": "4.9.10",
    "chex": "0.1.90",
    "pillow": "9.0",
}


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def cell_of(notebook: nbformat.NotebookNode, name: str) -> nbformat.NotebookNode:
    return next(cell for cell in notebook.cells if cell.id == name)


def tiny(workdir: Path, **more) -> dict[str, object]:
    """Changes to a config of two stages."""
    parts = {"network": NETWORK, "training": TRAINING, "sampler": {"steps": 8}}
    changes = {
        f"{stage}.{part}.{k}": v
        for stage in ("stage1", "stage2")
        for part in parts
        for k, v in parts[part].items()
    }
    sampling = {"sampling.seeds": "0-9", "sampling.batch_size": 8}
    return (
        changes | sampling | {"data.directory": str(workdir), "evaluation.features": "none"} | more
    )


def execute(name: str, **values) -> dict[str, tuple[str, list[np.ndarray]]]:
    """Runs all cells, with other values in the first of code; what each printed, and the pictures
    that it showed."""
    notebook = read(name)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    assert first.metadata["tags"] == ["parameters"]
    defaults = {
        line.targets[0].id: ast.literal_eval(line.value) for line in ast.parse(first.source).body
    }
    assert values.keys() <= defaults.keys()
    first.source = "\n".join(f"{key} = {value!r}" for key, value in (defaults | values).items())
    # From the checkout, as that is where the project is found; all that is written has its place in
    # the values.
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(FOLDER)}}).execute(
        env=environment()
    )
    return {
        cell.id: (printed(cell), shown(cell)) for cell in notebook.cells if cell.cell_type == "code"
    }


def printed(cell: nbformat.NotebookNode) -> str:
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def shown(cell: nbformat.NotebookNode) -> list[np.ndarray]:
    encoded = [
        output.data["image/png"] for output in cell.outputs if "image/png" in output.get("data", {})
    ]
    pictures = [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(picture)))) for picture in encoded
    ]
    assert all(shows_images(picture) or shows_a_curve(picture) for picture in pictures)
    return pictures


def count_pictures(cells) -> dict[str, int]:
    return {name: len(pictures) for name, (_, pictures) in cells.items() if pictures}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The notebook for Colab, executed, and the folder of its runs."""
    folder = tmp_path_factory.mktemp("notebook")
    random = np.random.default_rng(0)
    (folder / "emoji").mkdir()
    for i in range(16):
        pixels = random.integers(0, 256, (64, 64, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "emoji" / f"{0x1F600 + i:x}.png")
    values = {
        "WORKDIR": str(folder / "runs"),
        "DRIVE": True,  # does nothing where there is no Colab
        "DIGITS_CHANGES": tiny(folder / "data/digits"),
        "PAUSE_AT": 32,
        "EMOJI_CHANGES": tiny(
            folder / "data/emoji", **{"data.source": f"emoji:{folder / 'emoji'}"}
        ),
        "EMOJI": "emoji_small:tiny",
    }
    return execute("relay_diffusion_colab", **values), folder / "runs"


@pytest.mark.long
def test_colab_leaves_the_runtime_as_it_is(trained):
    cells, _ = trained
    assert cells["install"][0] == "nothing is missing, pip was not called\n"
    assert f"jax {jax.__version__} on 1 device(s)" in cells["imports"][0]


@pytest.mark.long
def test_colab_trains_and_samples_both_sets(trained):
    cells, runs = trained
    sizes = {"digits": (8, 32, 1), "emoji_small_tiny": (16, 64, 3)}
    for name, (small, large, channels) in sizes.items():
        samples = np.load(runs / name / "samples/samples.npz")
        assert samples["stage1"].shape == (10, small, small, channels)
        assert samples["images"].shape == (10, large, large, channels) and are_samples(
            samples["images"]
        )
        for stage in ("stage1", "stage2"):
            assert (
                store.Checkpoints(runs / name / stage / "checkpoints", read_only=True).steps()[-1]
                == 4
            )
        for picture in ("contact_sheet.png", "samples/grid.png", "stage2/loss.png"):
            assert (runs / name / picture).is_file(), picture
    assert np.load(runs / "digits/threes/samples.npz")["labels"].tolist() == [3] * 8


@pytest.mark.long
def test_colab_goes_on_from_what_is_on_the_disk(trained):
    cells, runs = trained
    assert (
        "stage1: trained" in cells["train-part"][0]
        and "stage2: trained" not in cells["train-part"][0]
    )
    assert (
        "stage1: resuming from 32 images" in cells["train-rest"][0]
        and "stage2: trained" in cells["train-rest"][0]
    )
    lines = [
        line for line in metric_writer.read(runs / "digits/stage1/metrics.jsonl") if "loss" in line
    ]
    assert [line["images"] for line in lines] == [16, 32, 48, 64]


@pytest.mark.long
def test_colab_shows_its_pictures(trained):
    cells, _ = trained
    pictures = {
        "digits-prepare": 1,
        "blur": 1,
        "noise": 1,
        "digits-curves": 2,
        "digits-grid": 1,
        "sample": 1,
    }
    assert count_pictures(cells) == pictures | {
        "emoji-prepare": 1,
        "emoji-curves": 2,
        "emoji-grid": 1,
    }


@pytest.mark.second
def test_inside_the_relay():
    cells = execute("inside_the_relay", SIZE=64, DRAWS=32, STEPS=30)
    pictures = ("imports", "snr", "block", "blur", "forward", "clock", "sampler", "handover")
    assert count_pictures(cells) == dict.fromkeys(pictures, 1)
    gains = [float(line.split("dB")[0].split()[-1]) for line in cells["snr"][0].splitlines()]
    np.testing.assert_allclose(gains, [0, 12, 10.7, 0], atol=0.5)  # 10 log10 of 1, 16, 16 / 1.36, 1
    assert float(cells["blur"][0].split()[-1]) < 1e-6
    assert [float(word) for word in cells["sampler"][0].split(":")[1].split()] == [0, 0, 0]
    assert all(
        share in cells["handover"][0] for share in ("7.8%", "37.7%")
    )  # as published: ImageNet, CelebA-HQ


@pytest.mark.long
def test_from_python(tmp_path):
    stage = {"network": NETWORK, "training": TRAINING, "sampler": {"steps": 8}}
    changes = {"stage1": stage, "stage2": stage, "data": {"directory": str(tmp_path / "data")}}
    changes |= {"evaluation": {"features": "none"}, "sampling": {"seeds": "0-9", "batch_size": 10}}
    runs = {"RUN": str(tmp_path / "run"), "TRAINED": str(tmp_path / "trained")}
    cells = execute("from_python", **runs, IMAGES=64, CHANGES=changes)
    pictures = ("sample", "classes", "small", "stage", "inpaint", "variation")
    assert count_pictures(cells) == dict.fromkeys(pictures, 1)
    assert "(10, 8, 8, 1) (10, 32, 32, 1) uint8" in cells["sample"][0]
    assert '"images": 64' in cells["train"][0]


@pytest.mark.parametrize("name", NAMES)
def test_notebook_is_kept_without_outputs(name):
    notebook = read(name)
    nbformat.validate(notebook)
    assert (
        notebook.metadata.keys() <= {"kernelspec", "language_info"}
        and notebook.metadata.kernelspec.name == "python3"
    )
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)
    for cell in notebook.cells:
        assert cell.metadata.keys() <= {"tags"}
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None


def test_installing_on_colab_keeps_its_jax(tmp_path, monkeypatch):
    """The project is fetched, and pip is asked for what is missing or too old, within what must
    stay."""
    one, *others = (cell_of(read(name), "install").source for name in NAMES)
    assert set(others) == {one}
    calls = []

    def called(command, check):
        calls.append(command)
        if command[0] == "git":
            (Path(command[-1]) / "rdm_jax").mkdir(parents=True)
            (Path(command[-1]) / "rdm_jax" / "main.py").touch()
            (Path(command[-1]) / "requirements.txt").write_text(
                (ROOT / "requirements.txt").read_text()
            )

    distributions = [SimpleNamespace(name=name, version=version) for name, version in COLAB.items()]
    monkeypatch.setattr(
        importlib.metadata,
        "distributions",
        lambda: [*distributions, SimpleNamespace(name="jax", version="0.4")],
    )
    monkeypatch.setattr(subprocess, "run", called)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "2")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AssertionError, match="REPOSITORY"):
        exec(one, {"REPOSITORY": ""})
    exec(one, {"REPOSITORY": "https://example.org/project.git"})
    fetched, installed = calls
    assert fetched[:2] == ["git", "clone"] and "https://example.org/project.git" in fetched
    asked = {line.partition(">=")[0] for line in installed[installed.index("-c") + 2 :]}
    assert {"ml_collections", "jaxtyping", "pillow"} <= asked and not asked & {
        "jax",
        "flax",
        "numpy",
        "tensorflow-datasets",
    }
    kept = Path(installed[installed.index("-c") + 1]).read_text().split()
    assert sorted(kept) == [
        "flax==0.11.2",
        "jax==0.7.2",
        "jaxlib==0.7.2",
        "libtpu==0.0.21",
        "numpy==2.1.3",
    ]
    assert Path.cwd() == tmp_path / "relay_diffusion" and sys.path[0] == str(Path.cwd())
