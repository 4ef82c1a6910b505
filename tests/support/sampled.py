"""Folders of samples, made by a pipeline whose images are their seeds."""

import dataclasses
import json

import numpy as np

from rdm_jax.data.classes import Classes
from rdm_jax.runtime.signals import StopOnSignal
from rdm_jax.sampling import write_samples
from tests.support.configs import tiny_config
from tests.support.fake_pipeline import FakeRelay

DATASET = "images/dataset.json"
AB = Classes(("a", "b"))


def config_of(**sampling):
    config = tiny_config("images")
    return dataclasses.replace(config, sampling=dataclasses.replace(config.sampling, **sampling))


def sample(workdir, *, classes=AB, steps=(10, 20), interrupted=False, **sampling):
    """The seeds whose images were made."""
    fake = FakeRelay(config_of(**sampling), classes, steps)
    stop = StopOnSignal()
    fake.after_each = lambda: setattr(stop, "requested", 15 if interrupted else None)
    write_samples.sample_to_files(fake, None, workdir, stop)
    return sorted({seed for batch in fake.made for seed in batch})


def seeds_of(folder) -> list[int]:
    with np.load(folder / "samples.npz") as file:
        assert file["images"].ravel().tolist() == file["seeds"].tolist() and len(
            file["stage1"]
        ) == len(file["seeds"])
        assert file["labels"].tolist() == (file["seeds"] % 2).tolist() and file[
            "class_names"
        ].tolist() == ["a", "b"]
        return file["seeds"].tolist()


def contents(folder) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def made_with(folder) -> dict:
    return json.loads((folder / "samples.json").read_text())
