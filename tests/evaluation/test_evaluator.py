"""Evaluation as a user runs it: what is measured against what, stopped and continued, and what is
refused."""

import copy
import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from rdm_jax.checkpoints import store
from rdm_jax.data.image_sets import ImageSet
from rdm_jax.evaluation import classifier, evaluator
from rdm_jax.evaluation.evaluator import read_result
from rdm_jax.evaluation.generated import StageStream
from rdm_jax.modes import run
from rdm_jax.runtime.errors import InputError, Interrupted
from rdm_jax.runtime.signals import StopOnSignal
from rdm_jax.sampling.pipeline import RelayPipeline
from rdm_jax.sampling.stage_preview import StagePreview
from tests.support.pictures import shows_images
from tests.support.small_evaluation import SIZE, SPACE, config_of, measured, parts_of


@pytest.fixture(autouse=True)
def quick_classifier(monkeypatch):
    monkeypatch.setattr(classifier, "IMAGES_SHOWN", 300)


def test_command(source, workdir, tmp_path, capsys, caplog):
    """Everything that `--mode evaluate` leaves behind, and that it does nothing again but say
    so."""
    caplog.set_level("INFO", logger="rdm_jax")
    config = config_of(source)
    run(config.to_config_dict(), str(workdir), mode="evaluate")
    result = read_result(workdir / "evaluation/evaluation.json")
    assert list(result["results"]) == ["held_out", "stage1", "samples"]
    for row in result["results"].values():
        assert row["images"] == 20
        names = {
            "frechet_distance",
            "classifier_score",
            "accuracy",
            "precision",
            "recall",
            "kid",
            "kid_standard_error",
        }
        assert row["metrics"].keys() == names and np.isfinite(list(row["metrics"].values())).all()
        assert any("no more than its 64 features" in note for note in row["notes"])
    generated = result["made_with"]["images"][1]
    assert (
        generated["sampling"]["seeds"] == "0-19" and generated["sampling"]["labels"] == "balanced"
    )
    assert (
        generated["sampling"]["postprocess"] == "none"
        and generated["stages"]["stage2"]["sampler"]["steps"] == 12
    )
    assert [each["step"] for each in generated["checkpoints"]] == [0, 0]
    reference = result["made_with"]["reference"]
    assert reference["set"] == "training" and reference["images"] == 40
    assert {"jax", "rdm_jax", "python"} <= result["versions"].keys() and "cpu" in result[
        "devices"
    ].lower()
    for picture in ("held_out", "stage1", "samples"):
        assert shows_images(workdir / f"evaluation/{picture}.png"), picture
    assert not list((workdir / "evaluation").glob(".gathered-*"))
    assert re.search(r"\| samples +\| 20 ", caplog.text)
    before = (workdir / "evaluation/evaluation.json").stat().st_mtime_ns
    run(config.to_config_dict(), str(workdir), mode="evaluate")
    assert (
        "already in" in caplog.text
        and (workdir / "evaluation/evaluation.json").stat().st_mtime_ns == before
    )


def test_floor_of_a_set_with_itself(source, relay, tmp_path):
    config = config_of(source, images="held_out", reference="held_out")
    (row,) = measured(config, relay, tmp_path)["results"].values()
    assert abs(row["metrics"]["frechet_distance"]) < 1e-6
    assert row["metrics"]["precision"] == row["metrics"]["recall"] == 1


def without_surroundings(result):
    return {key: result[key] for key in ("results", "made_with")}


def test_stopped_and_continued_is_equal_to_the_last_bit(source, relay, tmp_path, monkeypatch):
    config = config_of(source)
    straight = measured(config, relay, tmp_path / "straight")
    stop, sample, made = StopOnSignal(), RelayPipeline.sample, []

    def stopping(self, seeds):
        made.append(seeds.tolist())
        stop.requested = 15 if len(made) == 2 else None
        return sample(self, seeds)

    monkeypatch.setattr(RelayPipeline, "sample", stopping)
    with pytest.raises(Interrupted):
        measured(config, relay, tmp_path / "stopped", stop=stop)
    assert not (tmp_path / "stopped/evaluation/evaluation.json").exists()
    continued = measured(config, relay, tmp_path / "stopped")
    assert without_surroundings(continued) == without_surroundings(straight)
    assert made == [list(range(8)), list(range(8, 16)), list(range(16, 20))]  # none was made twice


def test_killed_and_continued_is_equal_to_the_last_bit(source, relay, tmp_path, monkeypatch):
    """As by kill -9: nothing is saved at the end, only what was saved on the way is there."""
    config = config_of(source, images="stage1, samples")
    straight = measured(config, relay, tmp_path / "straight")
    monkeypatch.setattr(evaluator, "SAVE_SECONDS", 0.0)
    sample = RelayPipeline.sample

    def dying(self, seeds):
        if 16 in seeds:
            raise SystemError("killed")
        return sample(self, seeds)

    with monkeypatch.context() as dies:
        dies.setattr(RelayPipeline, "sample", dying)
        with pytest.raises(SystemError):
            measured(config, relay, tmp_path / "killed")
    assert len(list((tmp_path / "killed/evaluation").glob(".gathered-*.npz"))) == 1
    assert without_surroundings(
        measured(config, relay, tmp_path / "killed")
    ) == without_surroundings(straight)


def test_generated_images_do_not_depend_on_what_else_is_measured(source, relay, tmp_path):
    together = measured(config_of(source), relay, tmp_path / "together")["results"]["samples"]
    alone = measured(config_of(source, images="samples"), relay, tmp_path / "alone")["results"][
        "samples"
    ]
    assert alone == together


def write_npz(path, count=20, shape=(8, 8, 3), dtype=np.uint8, name="arr_0"):
    random = np.random.default_rng(0)
    np.savez(path, **{name: random.integers(0, 256, (count, *shape), np.uint8).astype(dtype)})


def write_folder(path, count=20, size=8, mode="RGB"):
    path.mkdir()
    for i, image in enumerate(
        np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)
    ):
        Image.fromarray(image).convert(mode).save(path / f"{i:02d}.png")


def test_a_folder_and_an_npz_of_the_same_images_are_the_same(source, relay, tmp_path):
    write_npz(tmp_path / "made.npz")
    write_folder(tmp_path / "made")
    config = config_of(source, images=f"npz:{tmp_path}/made.npz, folder:{tmp_path}/made")
    one, other = measured(config, relay, tmp_path)["results"].values()
    assert one["images"] == other["images"] == 20
    for name in ("frechet_distance", "precision", "recall", "kid", "kid_standard_error"):
        np.testing.assert_allclose(one["metrics"][name], other["metrics"][name], rtol=1e-5)
    shown = sorted(path.name for path in (tmp_path / "evaluation").glob("*.png"))
    assert len(shown) == 2 and all(name.isascii() and "/" not in name for name in shown)


def test_statistics_are_used_again_and_by_others(source, relay, tmp_path, caplog):
    caplog.set_level("INFO", logger="rdm_jax")
    config = config_of(source, images="held_out")
    first = measured(config, relay, tmp_path)["results"]["held_out"]
    path = tmp_path / "evaluation/reference.npz"
    before = path.stat().st_mtime_ns
    assert (
        measured(dataclasses.replace(config, seed=1), relay, tmp_path)["results"]["held_out"]
        == first
    )
    given = config_of(source, images="held_out", reference=f"npz:{path}", name="again")
    assert measured(given, relay, tmp_path)["results"]["held_out"]["metrics"] == first["metrics"]
    assert path.stat().st_mtime_ns == before
    path.write_bytes(b"damaged")
    assert (
        measured(config_of(source, images="held_out, training"), relay, tmp_path)["results"][
            "held_out"
        ]
        == first
    )
    assert "measured again" in caplog.text


def test_images_beside_published_statistics_are_compared_with(source, relay, tmp_path):
    """ADM's reference files have statistics of a whole set, and some of its images."""
    random = np.random.default_rng(1)
    values = random.standard_normal((50, SIZE))
    pictures = random.integers(0, 256, (12, 8, 8, 3), np.uint8)
    np.savez(
        tmp_path / "adm.npz", arr_0=pictures, mu=values.mean(0), sigma=np.cov(values, rowvar=False)
    )
    space = dataclasses.replace(SPACE, name="inception")
    config = config_of(source, images="held_out", reference=f"npz:{tmp_path}/adm.npz")
    metrics = measured(config, relay, tmp_path, space)["results"]["held_out"]["metrics"]
    assert {"fid", "precision", "recall", "kid"} <= metrics.keys()


def test_a_stage_is_measured_during_training(source, tmp_path, monkeypatch):
    """Stopped within an evaluation, after the checkpoint: the same command finishes it."""
    config = config_of(source, seeds_in_training="0-11")
    training = dataclasses.replace(
        config.stages[0].training, images=32, evaluate_every=32, preview_every=0
    )
    config = dataclasses.replace(
        config, stages=(dataclasses.replace(config.stages[0], training=training), config.stages[1])
    )
    save = evaluator._save

    def interrupted(tallies, path):
        save(tallies, path)
        if "stage1" in tallies:
            raise Interrupted(15)

    with monkeypatch.context() as dies:
        dies.setattr(evaluator, "_save", interrupted)
        with pytest.raises(Interrupted):
            run(config.to_config_dict(), str(tmp_path), mode="train", stage=1)
    lines = tmp_path / "stage1/metrics.jsonl"
    assert "evaluation/accuracy" not in lines.read_text()
    result = tmp_path / "stage1/evaluations/0000000032/evaluation.json"
    assert (
        store.Checkpoints(tmp_path / "stage1/checkpoints", read_only=True).steps() == [4]
        and not result.exists()
    )
    run(config.to_config_dict(), str(tmp_path), mode="train", stage=1)
    assert read_result(result)["results"]["stage1"]["images"] == 12
    assert lines.read_text().count("evaluation/accuracy") == 1
    run(config.to_config_dict(), str(tmp_path), mode="report")
    page = (tmp_path / "report/report.md").read_text()
    assert (
        "Over training" in page and (tmp_path / "report/curves.png").is_file()
    )  # of one point: see test_report.py


def test_what_changes_is_measured_again(source, relay, tmp_path):
    """Other images in a file of the same size, other settings: old numbers are for neither,
    finished or half-way."""
    write_npz(tmp_path / "made.npz")
    config = config_of(source, images=f"npz:{tmp_path}/made.npz")
    before = measured(config, relay, tmp_path)["results"]
    with np.load(tmp_path / "made.npz") as file:
        pixels = file["arr_0"].copy()
    pixels[-1] = 0
    np.savez(tmp_path / "made.npz", arr_0=pixels)
    after = measured(config, relay, tmp_path)["results"]
    assert before.keys() == after.keys() and before != after


def test_another_network_or_sampler_is_another_stage_to_measure(source):
    config = config_of(source)
    other = dataclasses.replace(
        config.stages[0], sampler=dataclasses.replace(config.stages[0].sampler, steps=5)
    )
    images, held_out = parts_of(config)
    network = jax.jit(config.stages[0].build(3, 2).init)
    abouts = []
    for settings, key, real in ((config, 0, images), (config, 1, images), (config, 0, held_out)):
        for number in (1, 2):
            alone = StagePreview(settings, number, real)
            abouts.append(
                StageStream(settings, number, alone, network(jax.random.key(key)), 64).about
            )
    alone = StagePreview(dataclasses.replace(config, stages=(other, config.stages[1])), 1, images)
    abouts.append(StageStream(config, 1, alone, network(jax.random.key(0)), 64).about)
    alike = [(i, j) for i in range(len(abouts)) for j in range(i) if abouts[i] == abouts[j]]
    assert alike == [(4, 0)]  # stage 1 begins with no real images


def test_what_was_gathered_and_is_damaged_is_gathered_again(
    source, relay, tmp_path, monkeypatch, caplog
):
    caplog.set_level("INFO", logger="rdm_jax")
    config = config_of(source, images="held_out")
    straight = measured(config, relay, tmp_path / "straight")
    for content in (b"", b"PK"):
        folder = tmp_path / str(len(content))
        with monkeypatch.context() as dies:

            def truncated(tallies, path, content=content):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
                raise Interrupted(15)

            dies.setattr(evaluator, "_save", truncated)
            with pytest.raises(Interrupted):
                measured(config, relay, folder)
        assert without_surroundings(measured(config, relay, folder)) == without_surroundings(
            straight
        )
    assert caplog.text.count("begins again") == 2


def test_held_out_images_are_of_every_class():
    """Of a sorted set in equal parts, and of one whose classes take turns at random."""
    for labels in (np.arange(1000) // 100, np.arange(1000) % 10):
        images = ImageSet(
            [(np.zeros((1, 1, 1), np.uint8), label) for label in labels],
            (1, 1, 1),
            tuple("0123456789"),
        )
        rest, held = images.split(100)
        counts = np.bincount(held.batch(np.arange(100))["label"], minlength=10)
        assert counts.min() >= 3 and counts.sum() == 100 and len(rest) == 900
        indices = np.concatenate([rest._chosen, held._chosen])
        assert sorted(indices.tolist()) == list(range(1000))


REFUSED_BEFORE_TRAINING = {
    "reference": {"reference": "npz:/nowhere/x.npz"},
    "images": {"images": "folder:/nowhere"},
    "seeds": {"seeds": "0-2"},
    "seeds in training": {"seeds_in_training": "5"},
}


@pytest.mark.parametrize("case", REFUSED_BEFORE_TRAINING)
def test_refused_before_anything_is_trained(source, tmp_path, case):
    with pytest.raises(InputError, match="nowhere|seeds"):
        run(
            config_of(source, **REFUSED_BEFORE_TRAINING[case]).to_config_dict(),
            str(tmp_path),
            mode="all",
        )
    assert not list(tmp_path.glob("stage*"))


REFUSED = {
    "own size without a reference": (
        {"features": "inception", "images": "samples, stage1@native"},
        r"native_reference='' cannot be used; .*'npz:PATH', for 'stage1@native' in images, would do",
    ),
    "own size for a classifier": (
        {"native_reference": "training"},
        r"native_reference='training'.*the final size alone",
    ),
    "unknown reference of own size": (
        {"features": "inception", "native_reference": "x"},
        r"native_reference='x'.*'held_out'",
    ),
    "own size of the last stage": (
        {"features": "inception", "images": "stage2@native"},
        r"images='stage2@native'.*'stage1@nati",
    ),
    "nothing held out for it": (
        {"features": "inception", "held_out": 0, "native_reference": "held_out"},
        r"data.held_out=0 cannot",
    ),
    "no features": (
        {"features": "none"},
        r"features='none' with --mode=evaluate .*Use 'inception' or 'classifier'",
    ),
    "unknown features": ({"features": "dino"}, r"features='dino'"),
    "unknown set": ({"images": "samples, stage2"}, r"images='samples, stage2'.*'stage1'"),
    "unknown reference": ({"reference": "folder"}, r"reference='folder'"),
    "nothing held out": ({"held_out": 0, "images": "held_out"}, r"data.held_out=0"),
    "all held out": ({"held_out": 60}, r"data.held_out=60 leaves none of 60"),
    "too few images": ({"images": "npz:{tmp}/few.npz"}, r"few.npz has 3 images; 4 or more"),
    "no weights": (
        {"features": "inception", "weights": "/nowhere/x.pth"},
        r"no /nowhere/x.pth.*curl",
    ),
    "no classifier": ({"weights": "/nowhere/x"}, r"weights='/nowhere/x' is no file"),
    "npz that is not there": (
        {"images": "npz:/nowhere/x.npz"},
        r"/nowhere/x.npz cannot be used \(No such file",
    ),
    "npz of another size": (
        {"images": "npz:{tmp}/large.npz"},
        r"large.npz has images of shape \(20, 9, 8, 3\)",
    ),
    "grey npz": ({"images": "npz:{tmp}/grey.npz"}, r"grey.npz has images of shape \(20, 8, 8, 1\)"),
    "npz of other numbers": (
        {"images": "npz:{tmp}/float.npz"},
        r"float.npz has images of shape .*float32",
    ),
    "npz without images": (
        {"images": "npz:{tmp}/other.npz"},
        r"other.npz has no images, only stuff",
    ),
    "npz with objects": (
        {"images": "npz:{tmp}/objects.npz"},
        r"objects.npz cannot be used .*never loaded",
    ),
    "folder of another size": (
        {"images": "folder:{tmp}/large"},
        r"image '00.png' of folder:.*/large is of 9 x 9 \(height x width\); 8 x 8, as config.stages say, would do",
    ),
    "grey folder": ({"images": "folder:{tmp}/grey"}, r"the images of folder:.*grey are grey"),
    "one name for two": ({"name": "samples"}, r"evaluation.name='samples'"),
    "a name of the run's": ({"name": "report"}, r"evaluation.name='report'"),
    "a bucket to measure": (
        {"images": "samples, npz:gs://b/x.npz"},
        r"evaluation.images='gs://b/x.npz' is a URL",
    ),
    "a bucket to compare with": (
        {"reference": "npz:s3://b/x.npz"},
        r"evaluation.reference='s3://b/x.npz' is a URL",
    ),
    "weights in a bucket": ({"weights": "gs://b/x"}, r"evaluation.weights='gs://b/x' is a URL"),
    "no JSON list": ({"images": '["samples'}, r"evaluation.images=.* is not a JSON list"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_sentence(source, workdir, tmp_path, case):
    values, pattern = REFUSED[case]
    write_npz(tmp_path / "few.npz", count=3)
    write_npz(tmp_path / "large.npz", shape=(9, 8, 3))
    write_npz(tmp_path / "grey.npz", shape=(8, 8, 1))
    write_npz(tmp_path / "float.npz", dtype=np.float32)
    write_npz(tmp_path / "other.npz", name="stuff")
    np.savez(tmp_path / "objects.npz", arr_0=np.array([{}], object))
    write_folder(tmp_path / "large", size=9)
    write_folder(tmp_path / "grey", mode="L")
    values = {
        k: v.replace("{tmp}", str(tmp_path)) if isinstance(v, str) else v for k, v in values.items()
    }
    config = config_of(
        source,
        **{"images": "samples", "reference": "training", "name": case.replace(" ", "_")} | values,
    )
    with pytest.raises(InputError, match=pattern) as caught:
        run(config.to_config_dict(), str(workdir), mode="evaluate")
    assert "\n" not in str(caught.value) and re.search(r"would\s+do", str(caught.value))


def test_data_without_classes_has_no_classifier(tmp_path, workdir):
    write_folder(tmp_path / "plain")
    (tmp_path / "run").mkdir()
    with pytest.raises(InputError, match="features='classifier' needs classes"):
        run(
            config_of(tmp_path / "plain", held_out=5).to_config_dict(),
            str(workdir),
            mode="evaluate",
        )


def test_networks_that_make_no_numbers_are_refused(source, relay, tmp_path):
    broken = copy.copy(relay)
    broken._stages = [
        (sampler, jax.tree.map(lambda x: x * jnp.nan, params)) for sampler, params in relay._stages
    ]
    with pytest.raises(InputError, match="not finite numbers"):
        measured(config_of(source), broken, tmp_path)
