"""Retrieval by caption: its values, its chance level, and its place in an evaluation."""

import dataclasses

import numpy as np
import pytest

from rdm_jax.data.image_sets import ImageSet
from rdm_jax.evaluation.evaluator import Evaluator
from rdm_jax.evaluation.generated import StageStream
from rdm_jax.evaluation.retrieval import retrieval
from rdm_jax.render.tables import result_table
from rdm_jax.runtime.signals import StopOnSignal
from rdm_jax.sampling.pipeline import RelayPipeline
from rdm_jax.sampling.stage_preview import StagePreview
from tests.support import captioned_runs
from tests.support.captioned_runs import captioned, write_run
from tests.support.small_evaluation import SPACE


def test_retrieval_by_hand():
    real = np.asarray([[0.0, 0], [1, 0], [2, 0], [3, 0], [4, 0], [5, 0], [6, 0]], np.float32)
    named = ["a", "b", "c", "d", "e", "a", ""]
    made = np.asarray([[0.1, 1], [0.9, 5], [3.2, 0], [6, 0], [9, 9]], np.float32)
    found, notes = retrieval(real, named, made, ["A", "d", "b", "", "unknown"])
    # Nearest first: 0 1 2 3 4; 1 0 2 3 4; 3 4 2 5 1.
    assert found["retrieval_1"] == pytest.approx(1 / 3) and found["retrieval_5"] == 1
    assert found["retrieval_1_chance"] == pytest.approx((2 / 7 + 1 / 7 + 1 / 7) / 3)
    two_of_seven = 1 - (5 * 4 * 3 * 2 * 1) / (7 * 6 * 5 * 4 * 3)
    assert found["retrieval_5_chance"] == pytest.approx((two_of_seven + 5 / 7 + 5 / 7) / 3)
    assert notes == ["retrieval: 3 of 5 images have a caption of the reference"]
    assert retrieval(real, named, made, ["x"] * 5) == (
        {},
        ["retrieval: 0 of 5 images have a caption of the reference"],
    )


def test_chance_is_what_random_features_reach():
    random = np.random.default_rng(0)
    real, made = random.standard_normal((2, 2000, 8)).astype(np.float32)
    named = [str(i) for i in random.integers(0, 40, 4000)]
    found, notes = retrieval(real, named[:2000], made, named[2000:])
    assert notes == []
    for k in (1, 5):
        chance = found[f"retrieval_{k}_chance"]
        assert abs(found[f"retrieval_{k}"] - chance) < 4 * (chance * (1 - chance) / 2000) ** 0.5
        assert chance == pytest.approx(1 - (1 - 1 / 40) ** k, rel=0.05)
    assert retrieval(real, named[:2000], real + 1e-4, named[:2000])[0]["retrieval_1"] == 1


def numbered(first: int, count: int) -> ImageSet:
    return captioned([f"image {first + i}" for i in range(count)])


def test_evaluation_reports_retrieval(monkeypatch, tmp_path):
    """Beside the distances, with the chance level, and marked where prompts are held out."""
    sets = numbered(0, 12), numbered(100, 8)
    captioned_runs.open_fake(monkeypatch)
    config = captioned_runs.config_of(prompts="image 3; image 7; image 100", seeds="0-8")
    values = {"features": "classifier", "images": "samples, held_out", "batch_size": 8}
    evaluation = dataclasses.replace(config.evaluation, **values)
    data = dataclasses.replace(config.data, held_out=8)
    config = dataclasses.replace(config, evaluation=evaluation, data=data)
    known = tuple(f"image {i}" for i in range(12))
    workdir = write_run(tmp_path, config, training=known, held_out=("image 100",))
    relay = RelayPipeline(config, workdir)
    evaluator = Evaluator(config, *sets, workdir, StopOnSignal(), SPACE)
    samples, held_out = (evaluator.run(relay)["results"][name] for name in ("samples", "held_out"))
    assert 0 <= samples["metrics"]["retrieval_1"] <= samples["metrics"]["retrieval_5"] <= 1
    assert samples["metrics"]["retrieval_1_chance"] == pytest.approx(1 / 12)
    assert samples["metrics"]["retrieval_5_chance"] == pytest.approx(5 / 12)
    assert "retrieval: 6 of 9 images have a caption of the reference" in samples["notes"]
    assert "3 of 9 images have held-out prompts" in samples["notes"]
    assert "retrieval_1" not in held_out["metrics"]
    assert "retrieval: 0 of 8 images have a caption of the reference" in held_out["notes"]
    assert "retrieval 1 chance" in result_table({"samples": samples})
    assert {"samples.png", "held_out.png"} <= {path.name for path in workdir.glob("*/*.png")}


def test_retrieval_of_the_reference_itself(tmp_path):
    """Real images find themselves, and so do their copies in a file."""
    sets = numbered(0, 12), numbered(0, 12)
    file = tmp_path / "made.npz"
    names = np.asarray([f"image {i}" for i in range(12)])
    np.savez(file, images=sets[0].batch(range(12))["image"], prompts=names)
    config = captioned_runs.config_of()
    values = {"features": "classifier", "images": f"held_out, npz:{file}", "batch_size": 8}
    evaluation = dataclasses.replace(config.evaluation, **values)
    data = dataclasses.replace(config.data, held_out=8)
    config = dataclasses.replace(config, evaluation=evaluation, data=data)
    for kept in (12, 8):  # in one order or another, all or some of them
        few = dataclasses.replace(evaluation, kept=kept, name=f"of_{kept}")
        changed = dataclasses.replace(config, evaluation=few)
        evaluator = Evaluator(changed, *sets, tmp_path, StopOnSignal(), SPACE)
        results = evaluator.run(None)["results"]
        for name in ("held_out", f"npz:{file}"):
            metrics = results[name]["metrics"]
            assert metrics["retrieval_1"] == metrics["retrieval_5"] == 1
            assert metrics["retrieval_1_chance"] == pytest.approx(1 / kept)


def test_evaluation_in_training_has_captions():
    """Those of the real images that the stage is given."""
    config, real = captioned_runs.config_of(), numbered(0, 8)
    params = {"w": np.zeros(1, np.float32)}
    stream = StageStream(config, 1, StagePreview(config, 1, real), params, 0)
    captions = stream.captions(np.arange(stream.count))
    assert len(captions) == 500 and sorted(captions[:8]) == real.caption(range(8))
