"""Evaluation as a user runs it: what is measured, how it is stopped and resumed."""

import copy
import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rdm_jax.checkpoints import store
from rdm_jax.data.image_sets import ImageSet
from rdm_jax.evaluation import gathering
from rdm_jax.evaluation.evaluator import read_result
from rdm_jax.evaluation.generated import StageStream
from rdm_jax.modes import run
from rdm_jax.runtime.errors import InputError, Interrupted
from rdm_jax.runtime.signals import StopOnSignal
from rdm_jax.sampling.pipeline import RelayPipeline
from rdm_jax.sampling.stage_preview import StagePreview
from tests.support.image_files import write_folder, write_npz
from tests.support.pictures import shows_images
from tests.support.small_evaluation import SIZE, SPACE, config_of, measured, parts_of


@pytest.mark.second
def test_command(source, workdir, tmp_path, capsys, caplog):
    """`--mode evaluate` writes its files, and a second call only logs that they exist."""
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
            "high_frequency_ratio",
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


def test_distance_of_a_set_to_itself_is_zero(source, relay, tmp_path):
    config = config_of(source, images="held_out", reference="held_out")
    (row,) = measured(config, relay, tmp_path)["results"].values()
    assert abs(row["metrics"]["frechet_distance"]) < 1e-6
    assert row["metrics"]["precision"] == row["metrics"]["recall"] == 1


def measurements(result):
    return {key: result[key] for key in ("results", "made_with")}


@pytest.mark.second
def test_evaluation_stopped_and_resumed_is_bit_equal(source, relay, tmp_path, monkeypatch):
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
    assert measurements(continued) == measurements(straight)
    assert made == [list(range(8)), list(range(8, 16)), list(range(16, 20))]  # none was made twice


def test_evaluation_killed_and_resumed_is_bit_equal(source, relay, tmp_path, monkeypatch):
    """As by kill -9: only what was saved on the way exists."""
    config = config_of(source, images="stage1, samples")
    straight = measured(config, relay, tmp_path / "straight")
    monkeypatch.setattr(gathering, "SAVE_SECONDS", 0.0)
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
    assert measurements(measured(config, relay, tmp_path / "killed")) == measurements(straight)


def test_samples_do_not_depend_on_other_sets(source, relay, tmp_path):
    together = measured(config_of(source), relay, tmp_path / "together")["results"]["samples"]
    alone = measured(config_of(source, images="samples"), relay, tmp_path / "alone")["results"][
        "samples"
    ]
    assert alone == together


def test_folder_and_npz_give_equal_metrics(source, relay, tmp_path):
    write_npz(tmp_path / "made.npz")
    write_folder(tmp_path / "made")
    config = config_of(source, images=f"npz:{tmp_path}/made.npz, folder:{tmp_path}/made")
    one, other = measured(config, relay, tmp_path)["results"].values()
    assert one["images"] == other["images"] == 20
    for name in ("frechet_distance", "precision", "recall", "kid", "kid_standard_error"):
        np.testing.assert_allclose(one["metrics"][name], other["metrics"][name], rtol=1e-5)
    shown = sorted(path.name for path in (tmp_path / "evaluation").glob("*.png"))
    assert len(shown) == 2 and all(name.isascii() and "/" not in name for name in shown)


def test_reference_statistics_are_reused(source, relay, tmp_path, caplog):
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


def test_adm_reference_uses_its_images(source, relay, tmp_path):
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


@pytest.mark.second
def test_evaluation_during_training(source, tmp_path, monkeypatch):
    """Stopped within an evaluation, after the checkpoint: the same command finishes it."""
    config = config_of(source, seeds_in_training="0-11")
    training = dataclasses.replace(
        config.stages[0].training, images=32, evaluate_every=32, preview_every=0
    )
    config = dataclasses.replace(
        config, stages=(dataclasses.replace(config.stages[0], training=training), config.stages[1])
    )
    save = gathering._save

    def interrupted(tallies, path):
        save(tallies, path)
        if "stage1" in tallies:
            raise Interrupted(15)

    with monkeypatch.context() as dies:
        dies.setattr(gathering, "_save", interrupted)
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


def test_changed_images_are_measured_again(source, relay, tmp_path):
    """Other images in a file of the same size do not get the old metrics."""
    write_npz(tmp_path / "made.npz")
    config = config_of(source, images=f"npz:{tmp_path}/made.npz")
    before = measured(config, relay, tmp_path)["results"]
    with np.load(tmp_path / "made.npz") as file:
        pixels = file["arr_0"].copy()
    pixels[-1] = 0
    np.savez(tmp_path / "made.npz", arr_0=pixels)
    after = measured(config, relay, tmp_path)["results"]
    assert before.keys() == after.keys() and before != after


def test_stage_stream_about_identifies_the_images(source):
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


def test_gathered_damaged_file_is_gathered_again(source, relay, tmp_path, monkeypatch, caplog):
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

            dies.setattr(gathering, "_save", truncated)
            with pytest.raises(Interrupted):
                measured(config, relay, folder)
        assert measurements(measured(config, relay, folder)) == measurements(straight)
    assert caplog.text.count("restarts, as") == 2


def test_held_out_images_have_every_class():
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


def test_networks_without_finite_images_are_refused(source, relay, tmp_path):
    broken = copy.copy(relay)
    broken._stages = [
        (sampler, jax.tree.map(lambda x: x * jnp.nan, params)) for sampler, params in relay._stages
    ]
    with pytest.raises(InputError, match="not finite numbers"):
        measured(config_of(source), broken, tmp_path)
