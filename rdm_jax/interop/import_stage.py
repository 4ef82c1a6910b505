"""The mode 'import': published weights become a stage of a workdir."""

from pathlib import Path

import jax

from rdm_jax.config import Config, validate
from rdm_jax.config.rules import refuse_latents
from rdm_jax.interop import formats
from rdm_jax.interop.import_export import (
    check_no_checkpoints,
    fit_resolutions,
    open_weights,
    read_parameters,
    save_imported,
    stage_of,
)
from rdm_jax.runtime.console import log
from rdm_jax.runtime.signals import StopOnSignal
from rdm_jax.workdir import Workdir


def import_stage(
    config: Config, number: int, path: Path, workdir: Workdir, key: str | None = None
) -> None:
    """Imports weights into a stage, with a config.json that fits them and earlier imports.

    Args:
      config: of the run; the weights overrule the fields of `formats.determined`.
      number: of the stage, from 1.
      path: of the file: .pkl, .pt, .pth or safetensors.
      workdir: of the run; locked meanwhile.
      key: of the network in the file; None for its usual EMA.

    Raises:
      InputError: the file cannot be used, or the workdir has another config or checkpoints.
      Interrupted: a signal came.
    """
    refuse_latents(config, "the import of weights")
    with open_weights(path, key) as weights, workdir.locked(), StopOnSignal() as stop:
        check_no_checkpoints(workdir.path, number)
        before = _with_imported(config, workdir)
        fitting, classes = stage_of(weights, before, number)
        if fitting.stage(number).resolution != before.stage(number).resolution:
            fitting = fit_resolutions(fitting, number, workdir.stages_with_checkpoints(config))
        validate.check_config(fitting, evaluates=False)
        workdir.check_same_config(fitting, trains=True)
        parameters = read_parameters(weights, fitting, number, classes, path)
        stop.check()  # nothing has been written yet
        workdir.write_config(fitting)
        save_imported(weights, fitting, number, classes, parameters, path, workdir.path)
    log.info(
        "import: %s parameters, %d classes -> stage%d of %s",
        f"{sum(leaf.size for leaf in jax.tree.leaves(parameters)):,}",
        classes,
        number,
        workdir.path,
    )
    if fitting != config:
        log.info("import: use these weights with --config %s", workdir.path)


def _with_imported(config: Config, workdir: Workdir) -> Config:
    """Returns the config with what weights imported into the workdir before have determined."""
    imported = workdir.read_config()
    if imported is None:
        return config
    for number in workdir.stages_with_checkpoints(config):
        if number <= len(imported.stages):
            stage = imported.stage(number)
            kept = {field: getattr(stage, field) for field in formats.determined(stage)}
            config = config.with_stage(number, **kept)
    return config
