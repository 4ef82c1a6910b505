"""Fixtures of the tests of published and of untrusted files."""

import os
import posix

import numpy as np
import pytest

from rdm_jax.modes import run
from tests.support.jit_stages import small_file
from tests.support.published_files import write_pkl, write_pt
from tests.support.torch_stages import CLASSES, config_for, settings_for, tensors_of, values_of


@pytest.fixture(autouse=True)
def canary(tmp_path, monkeypatch):
    """The file that every payload tries to make; asserts that none did, or ran a command."""
    path, ran = tmp_path / "canary", []
    for module in (os, posix):
        monkeypatch.setattr(module, "system", ran.append)
    yield path
    assert not path.exists()
    assert not ran


@pytest.fixture(scope="session")
def small():
    """Arguments and tensors of a small JiT's training state."""
    return small_file()


@pytest.fixture(scope="session")
def imported(tmp_path_factory):
    """Imports two stages without data: stage 1 from a float32 .pkl, stage 2 from a float16 .pt.

    Returns:
      The folder of the files and of the workdir `run`, the config, and the tensors of each stage.
    """
    folder = tmp_path_factory.mktemp("interop")
    config = config_for(folder)
    first, second = config.stages
    tensors = [
        tensors_of(first, CLASSES, 0, np.float32),
        tensors_of(second, CLASSES, 1, np.float16),
    ]
    write_pkl(folder / "one.pkl", *settings_for(config.stages[0]), tensors[0])
    write_pt(folder / "two.pt", *settings_for(config.stages[1]), tensors[1])
    for number, name in ((1, "one.pkl"), (2, "two.pt")):
        run(
            values_of(config),
            str(folder / "run"),
            mode="import",
            stage=number,
            weights=str(folder / name),
        )
    return folder, config, tensors
