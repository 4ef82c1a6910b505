"""Published stages of other sizes than the config's, imported one after the other."""

import dataclasses

import pytest

from rdm_jax.config import Config, Stage, parse
from rdm_jax.config.saved import read_saved
from rdm_jax.diffusion.processes import RelayProcess
from rdm_jax.interop.import_export import fit_resolutions
from rdm_jax.run import run
from rdm_jax.runtime.errors import InputError
from tests.support.torch_stages import CLASSES, config_for, settings_for, tensors_of, values_of
from tests.support.torch_standins import write_pkl


def import_stage(folder, config: Config, number: int, size: int) -> Config:
    """Imports a file of a stage of that size into folder/run, with the config as it is, and returns
    what is saved."""
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
def test_two_stages_are_imported_in_any_order(tmp_path, order):
    """The config has 4x4 -> 8x8, the files have 8x8 -> 16x16."""
    config = config_for(tmp_path)
    for number in order:
        saved = import_stage(tmp_path, config, number, 8 * number)
        assert [stage.resolution for stage in saved.stages] == [(8, 8), (16, 16)]


def test_a_stage_that_does_not_fit_the_one_imported_before_is_refused(tmp_path):
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
def test_resolutions_that_go_with_one_stages(number, kept, sizes):
    """Factors 2 and 4; the stage that is imported has 8x8, the others have 99x99, which go with
    nothing."""
    stages = (
        Stage((99, 99)),
        Stage((99, 99), process=RelayProcess(patch=2)),
        Stage((99, 99), process=RelayProcess(patch=4)),
    )
    config = Config(stages=stages).with_stage(number, resolution=(8, 8))
    fitted = fit_resolutions(config, number, kept)
    assert [stage.resolution for stage in fitted.stages] == [(size, size) for size in sizes]
