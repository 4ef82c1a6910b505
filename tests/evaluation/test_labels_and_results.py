"""Which labels count in an evaluation, and what becomes of earlier results."""

import dataclasses

import numpy as np
import pytest

from rdm_jax.data.classes import Classes
from rdm_jax.evaluation.evaluator import read_result
from rdm_jax.evaluation.image_streams import SetStream, labels_by_name
from rdm_jax.evaluation.report import write_report
from rdm_jax.modes import run
from rdm_jax.runtime.errors import InputError
from tests.support.configs import write_images
from tests.support.small_evaluation import SPACE, config_of, measured, parts_of


def test_labels_match_by_class_name(source):
    ab = Classes(("a", "b"))
    assert labels_by_name("x", Classes(("b", "a")), ab).tolist() == [1, 0, -1]
    assert labels_by_name("x", Classes(("b",)), ab).tolist() == [1, -1] and labels_by_name(
        "x", Classes(), ab
    ).tolist() == [-1]
    assert labels_by_name("x", Classes(("0", "1"), by_number=True), ab).tolist() == [
        0,
        1,
        -1,
    ]  # of imported weights
    assert labels_by_name("x", ab, Classes()).tolist() == [-1, -1, -1]  # nothing counts labels
    for others in (
        Classes(("a", "c")),
        Classes(("0", "1")),
        Classes(("0", "1", "2"), by_number=True),
    ):
        with pytest.raises(
            InputError,
            match="config.evaluation: x has the classes .*, and the accuracy is that of a, b",
        ):
            labels_by_name("x", others, ab)
    images, _ = parts_of(
        config_of(source)
    )  # sorted by class; a score in splits of the order would say less of it
    stream = SetStream("training", images, 8, Classes(("b", "a")))
    labels = stream.batch(0, 40)[1]
    assert 5 < labels[:20].sum() < 15 and sorted(labels.tolist()) == sorted(
        1 - images.batch(np.arange(40))["label"]
    )


@pytest.mark.second
def test_earlier_results_are_kept(source, relay, tmp_path, caplog):
    """Those of another set or reference, and a file that is not an evaluation."""
    caplog.set_level("INFO", logger="rdm_jax")
    folder = tmp_path / "evaluation"

    def files(suffix):
        folder = tmp_path / f"evaluation{suffix}"
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    measured(config_of(source, images="held_out"), relay, tmp_path)
    (folder / "mine.txt").write_text("mine")
    first = files("")
    measured(config_of(source, images="training"), relay, tmp_path)
    assert files("-earlier-1") == {
        name: first[name] for name in ("evaluation.json", "held_out.png")
    }
    second = files("")
    assert {"mine.txt", "training.png"} < second.keys() and second["reference.npz"] == first[
        "reference.npz"
    ]
    measured(config_of(source, images="training", reference="held_out"), relay, tmp_path)
    assert files("-earlier-2") == {
        name: second[name] for name in ("evaluation.json", "training.png", "reference.npz")
    }
    (folder / "evaluation.json").write_text("mine")
    measured(config_of(source, images="training", reference="held_out"), relay, tmp_path)
    assert files("-earlier-3") == {"evaluation.json": b"mine"} and read_result(
        folder / "evaluation.json"
    )
    assert caplog.text.count("is kept in") == 3
    for paths, titles in (
        ([], 1),
        ([tmp_path / f"evaluation{n}/evaluation.json" for n in ("", "-earlier-1")], 2),
    ):
        write_report(tmp_path, paths)
        assert (tmp_path / "report/report.md").read_text().count("## evaluation") == titles


def test_seed_named_twice_is_one_image(source, relay, tmp_path, caplog):
    caplog.set_level("INFO", logger="rdm_jax")
    once = measured(config_of(source, images="samples", seeds="0-9"), relay, tmp_path / "once")[
        "results"
    ]
    twice = measured(
        config_of(source, images="samples", seeds="0-5,4-9"), relay, tmp_path / "twice"
    )["results"]
    assert once == twice and once["samples"]["images"] == 10
    assert "evaluation.seeds='0-5,4-9' repeats 2 numbers" in caplog.text


def test_one_image_is_sampled_without_evaluation(source, workdir, tmp_path):
    """It could not be measured, and is not going to be."""
    config = config_of(source, seeds="")
    sampling = dataclasses.replace(config.sampling, seeds="7", name="one-image")
    run(
        dataclasses.replace(config, sampling=sampling).to_config_dict(), str(workdir), mode="sample"
    )
    with np.load(workdir / "one-image/samples.npz") as file:
        assert file["seeds"].tolist() == [7] and file["class_names"][file["labels"]].tolist() == [
            "b"
        ]


def test_labels_of_other_classes_are_refused(source, relay, tmp_path):
    """Folders '0' and '1' are no classes 'a' and 'b'; without them the same images are measured."""
    write_images(tmp_path / "made", count=20)
    for number, name in enumerate("ab"):
        (tmp_path / "made" / name).rename(tmp_path / "made" / str(number))
    config = config_of(source, images=f"folder:{tmp_path}/made")
    named = dataclasses.replace(SPACE, class_names=("a", "b"))
    with pytest.raises(
        InputError,
        match=r"folder:.*made has the classes 0, 1 \(2\), and the accuracy is that of a, b \(2\)",
    ):
        measured(config, relay, tmp_path, named)
    assert measured(config, relay, tmp_path)["results"][f"folder:{tmp_path}/made"]["images"] == 20
