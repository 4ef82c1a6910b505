"""What sampling leaves in a folder: seeds are added, nothing is deleted."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from rdm_jax.data.classes import Classes
from rdm_jax.modes import run
from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.signals import StopOnSignal
from rdm_jax.sampling import write_samples
from rdm_jax.sampling.earlier import check_settings
from rdm_jax.sampling.low_images import LowImages
from rdm_jax.sampling.made_with import same_settings
from tests.support.fake_pipeline import FakeRelay
from tests.support.sampled import DATASET, config_of, contents, made_with, sample, seeds_of


@pytest.mark.parametrize("files", ["npz", "png"])
def test_samples_get_further_seeds(tmp_path, files):
    folder, mine = tmp_path / "samples", ("mine.txt", "images/mine.txt")
    assert sample(tmp_path, files=files, seeds="0-3") == [0, 1, 2, 3]
    (folder / "images").mkdir(exist_ok=True)
    for name in mine:
        (folder / name).write_text("mine")
    before = contents(folder)
    assert sample(tmp_path, files=files, seeds="2-5,9") == [4, 5, 9]
    after, new = contents(folder), {"samples.json", "samples.npz" if files == "npz" else DATASET}
    assert all(after[name] == before[name] for name in before.keys() - new)
    assert {"grid.png", "grid-2.png"} <= after.keys() and made_with(folder)["sampling"][
        "seeds"
    ] == "0-5,9"
    if files == "npz":
        assert seeds_of(folder) == [0, 1, 2, 3, 4, 5, 9]
    else:
        labels = json.loads(after[DATASET])
        assert labels["class_names"] == ["a", "b"]
        assert labels["labels"] == [
            [f"{seed:010d}.png", seed % 2] for seed in (0, 1, 2, 3, 4, 5, 9)
        ]
    for seeds in ("0-3", "2-5,9", "9"):
        assert sample(tmp_path, files=files, seeds=seeds) == []
    assert contents(folder) == after


def test_samples_folder_holds_npz_and_png(tmp_path):
    folder = tmp_path / "samples"
    assert sample(tmp_path, files="npz", seeds="0-3") == [0, 1, 2, 3]
    assert sample(tmp_path, files="png", seeds="0-3") == [0, 1, 2, 3]
    assert sample(tmp_path, files="png", seeds="4") == [4]
    assert seeds_of(folder) == [0, 1, 2, 3] and len(list((folder / "images").glob("*.png"))) == 5
    assert sorted(path.name for path in folder.glob("grid*")) == ["grid-2.png", "grid.png"]


def test_seeds_count_once(tmp_path, caplog):
    caplog.set_level("INFO", logger="rdm_jax")
    sample(tmp_path, files="png", seeds="0-5,5-9")
    assert caplog.text.count("repeats 1 numbers; each counts once (10 in all)") == 1
    assert len(json.loads((tmp_path / "samples" / DATASET).read_text())["labels"]) == 10
    assert made_with(tmp_path / "samples")["sampling"]["seeds"] == "0-9"


@pytest.mark.parametrize(
    ("before", "after"),
    [("0 - 3, 7", "0-3,7"), ("0,1,2,3", "0-3"), ("0-3", "3,0-2"), ("[0, 1]", "0-1")],
)
def test_seeds_may_be_spelt_differently(tmp_path, before, after):
    sample(tmp_path, seeds=before)
    kept = contents(tmp_path / "samples")
    check_settings(config_of(seeds=after), 1, tmp_path)
    assert sample(tmp_path, seeds=after) == [] and contents(tmp_path / "samples") == kept


@pytest.mark.parametrize("spelt", ["0-5,5-9", pytest.param("0,1-9", marks=pytest.mark.second)])
def test_samples_json_of_earlier_spelling_is_known(tmp_path, spelt):
    sample(tmp_path, seeds="0-9")
    known = made_with(tmp_path / "samples")
    known["sampling"]["seeds"] = spelt
    (tmp_path / "samples/samples.json").write_text(json.dumps(known))
    check_settings(config_of(seeds=spelt), 1, tmp_path)
    assert sample(tmp_path, seeds=spelt) == [] and sample(tmp_path, seeds="10") == [10]
    # An evaluation counted the image of a seed that was named twice twice.
    assert same_settings(known, {**known, "sampling": {**known["sampling"], "seeds": "0-9"}}) == (
        spelt == "0,1-9"
    )


@pytest.mark.parametrize(
    "case",
    ["labels", "seed of the run", "guidance", "no samples.json", "a checkpoint of another run"],
)
def test_samples_of_other_settings_are_refused(tmp_path, case):
    folder, config = tmp_path / "samples", config_of(labels="0")
    sample(tmp_path)
    steps, fake = (10, 20), None
    if case == "seed of the run":
        config = dataclasses.replace(config_of(), seed=1)
    elif case == "guidance":
        stages = (dataclasses.replace(config.stages[0], guidance=2.0), config.stages[1])
        config = dataclasses.replace(config_of(), stages=stages)
    elif case == "no samples.json":
        config = config_of()
        (folder / "samples.json").unlink()
    elif case == "a checkpoint of another run":
        stages = (dataclasses.replace(config.stages[0], checkpoint="other/10"), config.stages[1])
        config, steps = dataclasses.replace(config_of(), stages=stages), (30, 20)
    before, fake = contents(tmp_path), FakeRelay(config, steps=steps)
    says = (
        "samples.json does not give their settings"
        if case == "no samples.json"
        else "has samples of other settings"
    )
    with pytest.raises(InputError, match=rf"{says}.*Use another --config.sampling.name\.$"):
        write_samples.sample_to_files(fake, None, tmp_path, StopOnSignal())
    assert not fake.made and contents(tmp_path) == before
    if not case.startswith("a checkpoint"):  # before anything is trained
        with pytest.raises(InputError, match=says):
            check_settings(config, 1, tmp_path)
    check_settings(config_of(name="other"), 1, tmp_path)


def test_samples_of_other_settings_are_refused_before_training(tmp_path):
    sample(tmp_path)
    before = contents(tmp_path / "samples")
    with pytest.raises(
        InputError,
        match=r"sampling.labels was 'balanced' and is '0'.*Use another --config.sampling.name\.$",
    ):
        run(
            config_of(labels="0").to_config_dict(), str(tmp_path), mode="all"
        )  # nor has the data been looked for
    assert contents(tmp_path / "samples") == before and not list(tmp_path.glob("stage*"))


def test_low_images_must_stay_the_same(tmp_path):
    (tmp_path / "low").mkdir()

    def made(colour, seeds):
        for number in range(3):
            Image.new("RGB", (4, 4), (colour, number, 0)).save(tmp_path / f"low/{number}.png")
        fake = FakeRelay(config_of(low=f"folder:{tmp_path / 'low'}", seeds=seeds))
        fake.low, fake.first, fake.checkpoints = LowImages(fake.config), 2, [{"step": 20}]
        write_samples.sample_to_files(fake, None, tmp_path, StopOnSignal())
        return [seed for batch in fake.made for seed in batch[: len(set(batch))]]

    assert made(0, "0") == [0] and made(0, "0-2") == [1, 2] and made(0, "0") == []
    with pytest.raises(InputError, match="low_images was"):
        made(1, "5")


def test_samples_of_earlier_checkpoints_are_moved_aside(tmp_path, caplog):
    caplog.set_level("INFO", logger="rdm_jax")
    folder = tmp_path / "samples"
    for files in ("npz", "png"):
        sample(tmp_path, files=files, seeds="0-3")
    (folder / "images/mine.txt").write_text("mine")
    before = contents(folder)
    assert sample(tmp_path, seeds="2", steps=(10, 30)) == [2]
    kept = contents(tmp_path / "samples-earlier-1")
    assert kept == {name: content for name, content in before.items() if name != "images/mine.txt"}
    assert (
        "(steps 10, 20) are kept in" in caplog.text
        and (folder / "images/mine.txt").read_text() == "mine"
    )
    assert seeds_of(folder) == [2] and made_with(folder)["checkpoints"] == [
        {"step": 10},
        {"step": 30},
    ]
    sample(tmp_path, seeds="2", steps=(10, 40))
    assert seeds_of(tmp_path / "samples-earlier-2") == [2]


def test_pngs_of_a_killed_run_are_moved_aside(tmp_path, monkeypatch):
    """Whatever samples.json names: they are none of the new checkpoint's."""
    sample(tmp_path, files="png", seeds="0-3")
    with monkeypatch.context() as dies:
        dies.setattr(write_samples, "_write_labels", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            sample(tmp_path, files="png", seeds="4-5")
    assert sample(tmp_path, files="png", seeds="0-5", steps=(10, 30)) == [0, 1, 2, 3, 4, 5]
    assert len(list((tmp_path / "samples-earlier-1/images").glob("*.png"))) == 6


def test_damaged_samples_are_sampled_again(tmp_path):
    folder = tmp_path / "samples"
    sample(tmp_path, seeds="0-3")
    whole = contents(folder)["samples.npz"]
    (folder / "samples.npz").write_bytes(whole[:-50])
    assert sample(tmp_path, seeds="4") == [0, 1, 2, 3, 4] and seeds_of(folder) == [0, 1, 2, 3, 4]
    assert contents(tmp_path / "samples-earlier-1") == {"samples.npz": whole[:-50]}
    sample(tmp_path, files="png", seeds="0-3")
    (folder / "images/0000000002.png").write_bytes(b"")
    (folder / DATASET).unlink()
    assert sample(tmp_path, files="png", seeds="0-3") == [2]
    (folder / DATASET).unlink()
    assert sample(tmp_path, files="png", seeds="0-3") == []
    assert len(json.loads((folder / DATASET).read_text())["labels"]) == 4


@pytest.mark.parametrize("file", ["samples.json", "samples.npz", DATASET, "images/0000000001.png"])
def test_files_of_others_are_refused(tmp_path, file):
    (tmp_path / "samples/images").mkdir(parents=True)
    (tmp_path / "samples" / file).write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(
        InputError,
        match=r"samples.json does not give their settings .*\. Use another --config.sampling.name\.$",
    ) as refusal:
        sample(tmp_path)
    assert contents(tmp_path) == before and "\n" not in str(refusal.value)


@pytest.mark.parametrize("files", ["npz", "png"])
def test_samples_of_other_classes_are_refused(tmp_path, files):
    """An earlier version took labels=2 for the third folder."""
    sample(tmp_path, classes=Classes(("0", "1", "2", "3")), files=files, labels="2")
    before = contents(tmp_path)
    with pytest.raises(
        InputError, match="has samples of other classes than config.sampling.labels='2' gives"
    ):
        sample(
            tmp_path, classes=Classes(("0", "1", "10", "2")), files=files, labels="2", seeds="20"
        )
    assert contents(tmp_path) == before


@pytest.mark.parametrize("files", ["npz", pytest.param("png", marks=pytest.mark.second)])
def test_sampling_killed_while_writing_resumes(tmp_path, files, monkeypatch):
    def killed(*_, **__):
        raise SystemError("killed")

    for seeds, after in (("0-3", [0, 1, 2, 3]), ("2-5", [0, 1, 2, 3, 4, 5])):
        with monkeypatch.context() as dies:
            dies.setattr(write_samples, "_free_grid", killed)
            with pytest.raises(SystemError):
                sample(tmp_path, files=files, seeds=seeds)
        assert (
            sample(tmp_path, files=files, seeds=seeds) == []
        )  # the parts are there, or the images are
        assert made_with(tmp_path / "samples")["sampling"]["seeds"] == f"0-{after[-1]}"
        names = (
            seeds_of(tmp_path / "samples")
            if files == "npz"
            else [p.name for p in (tmp_path / "samples/images").glob("0*.png")]
        )
        assert len(names) == len(after)


@pytest.mark.parametrize("files", ["npz", pytest.param("png", marks=pytest.mark.second)])
def test_grid_that_is_missing_is_drawn_again(tmp_path, files):
    folder = tmp_path / "samples"
    sample(tmp_path, files=files, seeds="0-39")
    before = contents(folder)
    (folder / "grid.png").unlink()
    assert (
        sample(tmp_path, files=files, seeds="0-39") == [0, 1, 2, 3, 4, 5]
        and contents(folder) == before
    )
    (folder / "grid.png").write_bytes(b"")
    assert sample(tmp_path, files=files, seeds="38-41") == [38, 39, 40, 41]
    assert not (folder / "grid-2.png").exists() and len(before["grid.png"]) > 100


def test_npz_with_other_arrays_is_kept(tmp_path, caplog):
    caplog.set_level("INFO", logger="rdm_jax")
    folder = tmp_path / "samples"
    sample(tmp_path, seeds="0-3")
    with np.load(folder / "samples.npz") as file:
        np.savez(folder / "samples.npz", **file, mine=np.arange(3))
    before = contents(folder)
    assert sample(tmp_path, seeds="0-3") == [] and contents(folder) == before
    assert sample(tmp_path, seeds="4") == [4] and seeds_of(folder) == [0, 1, 2, 3, 4]
    assert contents(tmp_path / "samples-earlier-1") == {"samples.npz": before["samples.npz"]}
    assert f"is kept as {tmp_path}/samples-earlier-1/samples.npz" in caplog.text


def test_samples_of_an_earlier_version_are_known(tmp_path):
    """It wrote no class_names, and knew fewer fields."""
    folder = tmp_path / "samples"
    sample(tmp_path, seeds="0-3")
    with np.load(folder / "samples.npz") as file:
        old = {name: file[name] for name in file.files if name != "class_names"}
    np.savez_compressed(folder / "samples.npz", **old)
    before = contents(folder)
    assert sample(tmp_path, seeds="0-3") == [] and contents(folder) == before
    assert sample(tmp_path, seeds="5") == [5] and seeds_of(folder) == [0, 1, 2, 3, 5]
    known = made_with(folder)
    del known["sampling"]["postprocess"]
    assert same_settings(known, made_with(folder))
    known["sampling"]["labels"] = "0"
    assert not same_settings(known, made_with(folder))
