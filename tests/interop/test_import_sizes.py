"""Imports of published stages with other resolutions than the config's."""

import dataclasses

import pytest

from rdm_jax.config import Config, Stage, parse
from rdm_jax.config.saved import read_saved
from rdm_jax.diffusion.processes import RelayProcess
from rdm_jax.interop.import_export import fit_resolutions
from rdm_jax.modes import run
from rdm_jax.runtime.errors import InputError
from tests.support.published_files import write_pkl
from tests.support.torch_stages import CLASSES, config_for, settings_for, tensors_of, values_of


def import_stage(folder, config: Config, number: int, size: int) -> Config:
    """Imports a file of a stage of that size into folder/run; returns the saved config."""
    stage = dataclasses.replace(config.stages[number - 1], resolution=(size, size))
    write_pkl(folder / "x.pkl", *settings_for(stage), tensors_of(stage, CLASSES, 0))
    run(
        values_of(config),
        str(folder / "run"),
        mode="import",
        stage=number,
        weights=str(folder / "x.pkl"),
    )
    return parse(read_saved(folder / "run/config.json"))


@pytest.mark.parametrize("order", [(1, 2), (2, 1)])
def test_import_in_any_order(tmp_path, order):
    """The config has 4x4 -> 8x8, the files have 8x8 -> 16x16."""
    config = config_for(tmp_path)
    for number in order:
        saved = import_stage(tmp_path, config, number, 8 * number)
        assert [stage.resolution for stage in saved.stages] == [(8, 8), (16, 16)]


def test_import_refuses_a_stage_of_another_size(tmp_path):
    config = config_for(tmp_path)
    import_stage(tmp_path, config, 1, 4)
    with pytest.raises(InputError, match=r"config.stage2.resolution=\(16, 16\).*8, 8"):
        import_stage(tmp_path, config, 2, 16)


@pytest.mark.parametrize(
    ("number", "kept", "sizes"),
    [
        (1, [], [8, 16, 64]),
        (1, [2], [8, 99, 99]),
        (3, [], [1, 2, 8]),
        (2, [], [4, 8, 32]),
        (2, [1, 3], [99, 8, 99]),
    ],
)
def test_fit_resolutions(number, kept, sizes):
    """Factors 2 and 4; the imported stage has 8x8, the others 99x99, which match nothing."""
    stages = [
        Stage((99, 99)),
        Stage((99, 99), process=RelayProcess(patch=2)),
        Stage((99, 99), process=RelayProcess(patch=4)),
    ]
    config = Config(stages=tuple(stages)).with_stage(number, resolution=(8, 8))
    fitted = fit_resolutions(config, number, kept)
    assert [stage.resolution for stage in fitted.stages] == [(size, size) for size in sizes]
