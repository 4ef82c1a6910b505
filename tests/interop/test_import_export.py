"""Published weights in, images out, and back; with stand-ins in the published formats."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from PIL import Image
from safetensors.numpy import load_file, save_file

from rdm_jax.checkpoints.store import Checkpoints
from rdm_jax.config import Stage, parse
from rdm_jax.config.saved import read_saved
from rdm_jax.data.classes import Classes
from rdm_jax.diffusion import preconditioning
from rdm_jax.diffusion.processes import RelayProcess
from rdm_jax.diffusion.samplers import Heun
from rdm_jax.interop import pytorch_names
from rdm_jax.models.adm import ADM
from rdm_jax.models.conditions import Nothing
from rdm_jax.models.song import Song
from rdm_jax.modes import run
from rdm_jax.runtime.errors import InputError
from rdm_jax.sampling.low_images import LowImages
from tests.support.configs import write_images
from tests.support.pictures import are_samples
from tests.support.published_files import write_pkl
from tests.support.torch_stages import (
    CLASSES,
    NCSN,
    NETWORK,
    config_for,
    settings_for,
    tensors_of,
    values_of,
)


def restored(workdir, stage: Stage, number: int, classes: int = CLASSES):
    checkpoints = Checkpoints(workdir / f"stage{number}" / "checkpoints", read_only=True)
    ema, about = checkpoints.restore_ema(checkpoints.steps()[-1], stage.build(3, classes).abstract)
    checkpoints.close()
    return ema, about


@pytest.fixture(scope="module")
def sampled(imported):
    """Samples with guidance, churn, exponent 100 and truncation."""
    folder, config, _ = imported
    run(values_of(config), str(folder / "run"), mode="sample")
    return dict(np.load(folder / "run/samples/samples.npz"))


def test_import_keeps_every_tensor(imported):
    folder, config, tensors = imported
    for number, stage in enumerate(config.stages, 1):
        ema, about = restored(folder / "run", stage, number)
        for keys, leaf in jax.tree_util.tree_flatten_with_path(ema)[0]:
            name = pytorch_names.original_name(
                tuple(key.key for key in keys), stage.network, stage.resolution[0]
            )
            assert leaf.dtype == jnp.float32
            np.testing.assert_array_equal(
                leaf,
                pytorch_names.to_ours(tensors[number - 1][name]).astype(np.float32),
                err_msg=name,
            )
        assert about["classes"] == ["0", "1", "2"]
        assert about["imported"]["settings"]["model_channels"] == 8
    assert parse(read_saved(folder / "run/config.json")) == config


@pytest.mark.second
def test_imported_weights_are_sampled_without_data(imported, sampled):
    folder, config, _ = imported
    assert sampled["images"].shape == (12, 8, 8, 3) and sampled["stage1"].shape == (12, 4, 4, 3)
    assert sampled["labels"].tolist() == [0, 1, 2] * 4
    assert are_samples(sampled["images"])
    made_with = json.loads((folder / "run/samples/samples.json").read_text())
    assert made_with["sampling"]["postprocess"] == "none"
    assert [loaded["imported"]["file"] for loaded in made_with["checkpoints"]] == [
        "one.pkl",
        "two.pt",
    ]
    assert Image.open(folder / "run/samples/grid.png").width > 0


def test_import_keeps_settings_of_the_first_file(imported, tmp_path):
    """Two imports with one config, which differs from both files."""
    folder, config, tensors = imported
    for number, name in ((1, "one.pkl"), (2, "two.pkl")):
        class_name, settings = settings_for(config.stages[number - 1])
        write_pkl(
            tmp_path / name,
            class_name,
            {**settings, "dropout": 0.1 + number / 10},
            tensors[number - 1],
        )
        run(
            values_of(config),
            str(tmp_path / "run"),
            mode="import",
            stage=number,
            weights=str(tmp_path / name),
        )
    saved = parse(read_saved(tmp_path / "run/config.json"))
    assert [stage.network.dropout for stage in saved.stages] == pytest.approx([0.2, 0.3])


@pytest.mark.second
def test_sde_sampler_and_postprocessing_are_options(imported, sampled):
    folder, config, _ = imported
    first, second = config.stages
    stages = (
        dataclasses.replace(first, sampler=Heun(steps=4, eta=0.05)),
        dataclasses.replace(second, guidance=1.0),
    )
    sampling = dataclasses.replace(config.sampling, name="sde", postprocess="rdm_celebahq")
    run(
        values_of(dataclasses.replace(config, stages=stages, sampling=sampling)),
        str(folder / "run"),
        mode="sample",
    )
    made = np.load(folder / "run/sde/samples.npz")
    assert np.any(made["stage1"] != sampled["stage1"]) and np.any(
        made["images"] != sampled["images"]
    )
    assert (
        json.loads((folder / "run/sde/samples.json").read_text())["sampling"]["postprocess"]
        == "rdm_celebahq"
    )


@pytest.mark.second
def test_stage_2_continues_from_a_folder(imported, sampled):
    """From stage 1's own images, rounded to 8 bits: the samples of the whole relay."""
    folder, config, _ = imported
    for seed, (image, label) in enumerate(zip(sampled["stage1"], sampled["labels"], strict=True)):
        path = folder / "low" / f"{seed:02d}_{label}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(path)
    sampling = dataclasses.replace(config.sampling, name="low", low=f"folder:{folder / 'low'}")
    run(
        values_of(dataclasses.replace(config, sampling=sampling)),
        str(folder / "run"),
        mode="sample",
    )
    made = np.load(folder / "run/low/samples.npz")
    np.testing.assert_array_equal(made["stage1"], sampled["stage1"])
    difference = np.abs(made["images"].astype(int) - sampled["images"])
    # The upsampled image differs by at most half of an 8-bit level, below the noise; a random network
    # propagates that.
    assert np.mean(difference) < 0.25 * np.mean(
        np.abs(sampled["images"].astype(int) - np.roll(sampled["images"], 1, 0))
    )


def test_low_images_of_another_size_are_refused(imported, tmp_path):
    folder, config, _ = imported
    write_images(tmp_path / "low", count=2, size=6)
    sampling = dataclasses.replace(
        config.sampling, name="refused", low=f"folder:{tmp_path / 'low'}"
    )
    with pytest.raises(InputError, match=r"has images of 6 x 6 .*Use images of 4 x 4"):
        run(
            values_of(dataclasses.replace(config, sampling=sampling)),
            str(folder / "run"),
            mode="sample",
        )


def low_images(config, folder, names, colour="black") -> LowImages:
    for name in names:
        (folder / "low" / name).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), colour).save(folder / "low" / name / "x.png")
    sampling = dataclasses.replace(config.sampling, low=f"folder:{folder / 'low'}")
    return LowImages(dataclasses.replace(config, sampling=sampling))


def test_low_images_have_classes(tmp_path):
    config, seeds = config_for(tmp_path), np.arange(4)
    imported, named = Classes(("0", "1", "2"), by_number=True), Classes(("0", "1", "2"))
    by_name = low_images(config, tmp_path / "by_name", ["2", "0"])
    assert (
        by_name.labels(seeds, imported).tolist()
        == by_name.labels(seeds, named).tolist()
        == [0, 2, 0, 2]
    )
    by_order = low_images(config, tmp_path / "by_order", ["n02", "n01", "n03"])
    assert by_order.labels(seeds, imported).tolist() == [
        0,
        1,
        2,
        0,
    ]  # of imported weights numbers are all that is known
    assert low_images(config, tmp_path / "flat", ["."]).labels(seeds, imported) is None
    with pytest.raises(
        InputError,
        match=r"classes n01, n02, n03 \(3\), and the network knows 0, 1, 2 \(3\)\. Use images whose classes",
    ):
        by_order.labels(seeds, named)
    with pytest.raises(
        InputError,
        match=r"classes a, b \(2\), and the network knows 0, 1, 2 \(3\), known by index only",
    ):
        low_images(config, tmp_path / "others", ["a", "b"]).labels(seeds, imported)


def test_samples_depend_on_low_images(tmp_path):
    config, seeds = config_for(tmp_path), np.arange(4)
    first, again = (low_images(config, tmp_path, ["a", "b"]).digest(seeds) for _ in range(2))
    assert first == again != low_images(config, tmp_path, ["a", "b"], "white").digest(seeds)


@pytest.mark.second
def test_export_round_trip(imported, sampled, tmp_path):
    folder, config, tensors = imported
    again = tmp_path / "again"
    for number in (1, 2):
        path = tmp_path / f"{number}.safetensors"
        run(values_of(config), str(folder / "run"), mode="export", stage=number, weights=str(path))
        exported = load_file(path)
        theirs = tensors[number - 1]
        assert exported.keys() == theirs.keys()  # the resampling filters too
        for name, value in exported.items():
            assert value.dtype == np.float32
            np.testing.assert_array_equal(value, theirs[name].astype(np.float32), err_msg=name)
        run(values_of(config), str(again), mode="import", stage=number, weights=str(path))
        ours, _ = restored(folder / "run", config.stages[number - 1], number)
        jax.tree.map(
            np.testing.assert_array_equal,
            restored(again, config.stages[number - 1], number)[0],
            ours,
        )
    assert json.loads((again / "config.json").read_text()) == json.loads(
        (folder / "run/config.json").read_text()
    )


@pytest.mark.second
def test_training_resumes_from_imported_weights(imported, tmp_path):
    """Fine-tuning in the workdir of an import, and transfer to other classes by `start_from`.

    The learning rate is too small to change parameters visibly.
    """
    folder, config, tensors = imported
    write_images(folder / "images")
    small = dataclasses.replace(
        config.stages[0].training, images=8, learning_rate=1e-12, label_dropout=0.5
    )
    start = str(folder / "run/stage1/checkpoints/0")
    transfer = dataclasses.replace(small, start_from=start)
    stages = tuple(
        dataclasses.replace(stage, training=transfer, guidance=1.0) for stage in config.stages
    )
    run(
        values_of(dataclasses.replace(config, stages=stages)),
        str(tmp_path / "transfer"),
        mode="train",
        stage=1,
    )
    trained, about = restored(tmp_path / "transfer", config.stages[0], 1, classes=2)
    given, _ = restored(folder / "run", config.stages[0], 1)
    assert about["classes"] == ["a", "b"]
    assert trained["map_label"]["kernel"].shape == (2, 32)
    for name in given.keys() - {"map_label"}:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-9), trained[name], given[name]
        )

    one_class_more = tmp_path / "images"
    write_images(one_class_more)
    (one_class_more / "c").mkdir()
    Image.new("RGB", (8, 8)).save(one_class_more / "c" / "x.png")
    fine = tmp_path / "fine"
    write_pkl(tmp_path / "one.pkl", *settings_for(config.stages[0]), tensors[0])
    data = dataclasses.replace(
        config.data, source=f"folder:{one_class_more}", directory=str(tmp_path / "prepared")
    )
    tuned = dataclasses.replace(
        config,
        data=data,
        stages=tuple(dataclasses.replace(stage, training=small) for stage in config.stages),
    )
    run(values_of(tuned), str(fine), mode="import", stage=1, weights=str(tmp_path / "one.pkl"))
    run(values_of(tuned), str(fine), mode="train", stage=1)
    trained, about = restored(fine, config.stages[0], 1)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-9), trained, given)
    assert about["started_from"]["imported"]["file"] == "one.pkl"
    assert (fine / "stage1/checkpoints/0").is_dir()  # what was imported stays


@pytest.mark.parametrize(
    ("network", "precondition"),
    [
        (NETWORK, preconditioning.EDMPreconditioning(sigma_data=0.7)),
        (
            ADM(64, (1, 2), 2, attention_levels=(1,), augment_labels=9, dropout=0.2),
            preconditioning.IDDPMPreconditioning(times=100),
        ),
        (NCSN, preconditioning.VEPreconditioning(sigma_min=0.01)),
        (Song(16, (2, 2), 1, attention_levels=(0,)), preconditioning.VPPreconditioning(times=500)),
    ],
    ids=["edm", "iddpm", "ve", "vp"],
)
def test_settings_round_trip(network, precondition):
    stage = Stage(resolution=(16, 16), network=network, precondition=precondition)
    class_name, settings = pytorch_names.settings_of(stage, 3, 7)
    found = pytorch_names.describe(class_name, json.loads(json.dumps(settings)), Stage())
    assert found == pytorch_names.Described(stage, 3, 7)
    unconditional = dataclasses.replace(stage, condition=Nothing())
    assert pytorch_names.settings_of(unconditional, 3, 7)[1]["label_dim"] == 0


@pytest.mark.second
def test_import_changes_the_config(tmp_path, capsys):
    """DDPM++ / NCSN++ weights replace the network and the resolution of an ADM config."""
    config = config_for(tmp_path)
    stage = dataclasses.replace(
        config.stages[0],
        network=NCSN,
        precondition=preconditioning.VEPreconditioning(),
        resolution=(8, 8),
    )
    write_pkl(tmp_path / "ncsn.pkl", *settings_for(stage, 0), tensors_of(stage, 0, 0))
    one_stage = dataclasses.replace(config, stages=config.stages[:1])
    sampler = Heun(steps=3, sigma_min=0.02)
    one_stage = dataclasses.replace(
        one_stage, stages=(dataclasses.replace(one_stage.stages[0], sampler=sampler),)
    )
    run(
        values_of(one_stage),
        str(tmp_path / "run"),
        mode="import",
        stage=1,
        weights=str(tmp_path / "ncsn.pkl"),
    )
    saved = parse(read_saved(tmp_path / "run/config.json"))
    assert saved.stages[0] == dataclasses.replace(stage, sampler=sampler)
    run(values_of(saved), str(tmp_path / "run"), mode="sample")
    assert are_samples(np.load(tmp_path / "run/samples/samples.npz")["images"])


def test_safetensors_without_metadata_use_the_config(imported, tmp_path):
    _, config, tensors = imported
    save_file(
        {k: np.ascontiguousarray(v) for k, v in tensors[0].items()}, tmp_path / "x.safetensors"
    )
    with safetensors.safe_open(tmp_path / "x.safetensors", framework="np") as file:
        assert not file.metadata()
    run(
        values_of(config),
        str(tmp_path / "run"),
        mode="import",
        stage=1,
        weights=str(tmp_path / "x.safetensors"),
    )
    ema, about = restored(tmp_path / "run", config.stages[0], 1)
    np.testing.assert_array_equal(ema["out_norm"]["bias"], tensors[0]["model.out_norm.bias"])
    assert about["classes"] == ["0", "1", "2"]


def test_describe_keeps_the_process(imported):
    _, config, _ = imported
    assert isinstance(config.stages[1].process, RelayProcess)
    described = pytorch_names.describe(*settings_for(config.stages[1]), config.stages[1])
    assert described.stage == config.stages[1]
