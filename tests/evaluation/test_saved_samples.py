"""Samples that a run has written are measured in place of sampling them again."""

import copy
import dataclasses
import json

import numpy as np
import pytest

from rdm_jax.data.classes import Classes
from rdm_jax.evaluation.generated import RelayStream
from rdm_jax.evaluation.result_files import read_result
from rdm_jax.modes import run
from rdm_jax.runtime.signals import StopOnSignal
from rdm_jax.sampling import saved_samples
from rdm_jax.sampling.pipeline import RelayPipeline
from rdm_jax.sampling.write_samples import sample_to_files
from tests.support.small_evaluation import config_of, measured

REUSED = "reusing the samples in"


def with_sampling(config, **sampling):
    return dataclasses.replace(config, sampling=dataclasses.replace(config.sampling, **sampling))


def written(config, relay, folder, **sampling):
    """The config and a pipeline of it whose samples are in a folder."""
    config = with_sampling(config, **sampling)
    relay = copy.copy(relay)
    relay.config = config
    sample_to_files(relay, None, folder, StopOnSignal())
    return config, relay


@pytest.fixture
def sampled(monkeypatch):
    """The seeds that `RelayPipeline.sample` gets."""
    seeds, sample = [], RelayPipeline.sample

    def counting(self, batch):
        seeds.extend(batch.tolist())
        return sample(self, batch)

    monkeypatch.setattr(RelayPipeline, "sample", counting)
    return seeds


@pytest.mark.parametrize(
    ("files", "images"),
    [
        pytest.param("npz", "stage1, samples", marks=pytest.mark.second),
        ("npz", "samples"),
        pytest.param("png", "samples", marks=pytest.mark.second),
    ],
)
def test_saved_samples_give_equal_metrics(source, relay, tmp_path, sampled, caplog, files, images):
    caplog.set_level("INFO", logger="rdm_jax")
    config, relay = written(
        config_of(source, images=images), relay, tmp_path / "saved", files=files, seeds="0-19"
    )
    reused = measured(config, relay, tmp_path / "saved")
    assert sampled == [] and caplog.text.count(REUSED) == 1
    generated = measured(config, relay, tmp_path / "generated")
    assert sampled == list(range(20)) and caplog.text.count(REUSED) == 1
    assert reused["results"] == generated["results"]
    assert reused["made_with"] == generated["made_with"]
    for name in images.split(", "):
        pictures = [tmp_path / part / f"evaluation/{name}.png" for part in ("saved", "generated")]
        assert pictures[0].read_bytes() == pictures[1].read_bytes()


@pytest.mark.parametrize(
    "seeds",
    [
        "0-19",
        pytest.param("12-19,0-11", marks=pytest.mark.second),
        pytest.param("0-40", marks=pytest.mark.second),
        "7,3,0-2,30",
    ],
)
def test_saved_samples_are_those_of_their_seeds(source, relay, tmp_path, sampled, seeds):
    """In whatever order they were written, and with seeds that are not measured."""
    config, relay = written(config_of(source), relay, tmp_path, seeds="10-19")
    config, relay = written(config, relay, tmp_path, seeds="0-40")
    config = dataclasses.replace(
        config, evaluation=dataclasses.replace(config.evaluation, seeds=seeds)
    )
    relay.config = config
    names = ("samples", "stage1", "stage1@native")
    streams = [
        RelayStream(relay, names, Classes(("a", "b")), saved)
        for saved in (tmp_path / "samples", None)
    ]
    assert streams[0].about == streams[1].about
    for first in range(0, streams[0].count, 8):
        count = min(8, streams[0].count - first)
        (reused, labels), (generated, same_labels) = (s.batch(first, count) for s in streams)
        np.testing.assert_array_equal(labels, same_labels)
        for name in names:
            assert reused[name].dtype == np.uint8
            np.testing.assert_array_equal(reused[name], generated[name])
    assert len(sampled) == streams[0].count  # by the second stream alone


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def other_checkpoint(path):
    made_with = json.loads(path.read_text())
    made_with["checkpoints"][0]["step"] = 7
    path.write_text(json.dumps(made_with))


def other_labels(path):
    with np.load(path) as file:
        arrays = dict(file)
    np.savez(path, **{**arrays, "labels": 1 - arrays["labels"]})


def other_size(path):
    with np.load(path) as file:
        arrays = dict(file)
    np.savez(path, **{**arrays, "images": arrays["images"][:, :4]})


GENERATED = {
    "seeds are missing": {"seeds": "0-18"},
    "other labels": {"labels": "0"},
    "other brightness": {"postprocess": "rdm_imagenet"},
    "no samples.json": {"damage": ("samples.json", lambda path: path.unlink())},
    "no JSON": {"damage": ("samples.json", lambda path: path.write_text("mine"))},
    "another checkpoint": {"damage": ("samples.json", other_checkpoint)},
    "no samples.npz": {"damage": ("samples.npz", lambda path: path.unlink())},
    "half an npz": {"damage": ("samples.npz", halve)},
    "a flipped bit": {"damage": ("samples.npz", flip)},
    "labels of other classes": {"damage": ("samples.npz", other_labels)},
    "images of another size": {"damage": ("samples.npz", other_size)},
    "no png": {"files": "png", "damage": ("images/0000000003.png", lambda path: path.unlink())},
    "half a png": {"files": "png", "damage": ("images/0000000003.png", halve)},
    "a png with a flipped bit": {"files": "png", "damage": ("images/0000000003.png", flip)},
    "no labels of pngs": {"files": "png", "damage": ("images/dataset.json", halve)},
    "pngs have no stage1": {"files": "png", "images": "stage1, samples"},
}


# A case of each kind of damage; the others are alike.
FIRST = ("seeds are missing", "another checkpoint", "half an npz")


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=() if case in FIRST else pytest.mark.second) for case in GENERATED],
)
def test_other_or_damaged_samples_are_not_measured(source, relay, tmp_path, sampled, caplog, case):
    caplog.set_level("INFO", logger="rdm_jax")
    sampling = {"seeds": "0-19", "files": "npz"} | GENERATED[case]
    name, damage = sampling.pop("damage", ("", None))
    config = config_of(source, images=sampling.pop("images", "samples"))
    written(config, relay, tmp_path, **sampling)
    if damage:
        damage(tmp_path / "samples" / name)
    config = with_sampling(config, files=sampling["files"])
    measured(config, relay, tmp_path)
    assert sampled == list(range(20)) and REUSED not in caplog.text


@pytest.mark.second
def test_command_samples_once(source, workdir, sampled, caplog):
    """`--mode sample`, then `--mode evaluate`: as `--mode all` does at its end."""
    caplog.set_level("INFO", logger="rdm_jax")
    config = config_of(source, images="stage1, samples", seeds="", name="evaluation-once")
    config = with_sampling(config, name="samples-once", seeds="0-19")
    for mode in ("sample", "evaluate"):
        run(config.to_config_dict(), str(workdir), mode=mode)
    assert sampled == [] and REUSED in caplog.text
    result = read_result(workdir / "evaluation-once/evaluation.json")
    assert [row["images"] for row in result["results"].values()] == [20, 20]


@pytest.mark.parametrize("others_find_them", [True, False])
def test_saved_samples_are_used_by_all_processes_or_none(
    source, relay, tmp_path, sampled, monkeypatch, others_find_them
):
    """A file system may show files late to another host."""
    config, relay = written(config_of(source), relay, tmp_path, seeds="0-19")
    relay.config = config
    stream = RelayStream(relay, ("samples",), Classes(("a", "b")), tmp_path / "samples")
    monkeypatch.setattr(
        saved_samples.distributed,
        "allgather",
        lambda found: np.stack([found, np.asarray(others_find_them)]),
    )
    stream.batch(0, 8)
    assert sampled == ([] if others_find_them else list(range(8)))
