"""The modes of a run, and which flags go with them."""

from collections.abc import Sequence

from rdm_jax.config import Config
from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.files import local_path
from rdm_jax.runtime.mounts import is_url

MODES = (
    *("all", "prepare", "train", "sample", "evaluate", "report", "import", "export"),
    "autoencoder",
)
ONE_PROCESS = ("report", "import", "export", "autoencoder")
OF_ONE_STAGE = ("import", "export")


def check_flags(
    config: Config,
    mode: str,
    stage: int | None,
    weights: str | None,
    update: bool,
    weights_key: str | None = None,
) -> None:
    """Raises InputError for an unknown mode, and for flags that do not go together."""
    if mode not in MODES:
        raise InputError(f"--mode={mode} is not known", f"Use {' or '.join(MODES)}.")
    numbers = f"1 to {len(config.stages)}"
    one_stage = mode in OF_ONE_STAGE
    if stage is not None and mode not in ("train", *OF_ONE_STAGE):
        raise InputError(
            f"--stage={stage} does not go with --mode={mode}",
            "Use it with --mode=train, import or export.",
        )
    if stage is not None and not 0 < stage <= len(config.stages):
        raise InputError(
            f"--stage={stage} with --mode={mode} is not a stage of the config", f"Use {numbers}."
        )
    if one_stage != bool(weights):
        raise InputError(
            f"--weights={weights} does not go with --mode={mode}",
            "Pass the path of a file, or without --stage of a folder."
            if one_stage
            else "Use it with --mode=import or export.",
        )
    if weights_key is not None and (mode != "import" or stage is None):
        raise InputError(
            f"--weights_key={weights_key} does not go with --mode={mode}",
            "Use it with --mode=import and --stage.",
        )
    if update and mode != "prepare":
        raise InputError(f"--update does not go with --mode={mode}", "Use it with --mode=prepare.")


def check_paths(config: Config) -> None:
    """Raises InputError for URLs of other stores among the checkpoints that a config names."""
    for stage in config.stages:
        for field, path in {
            "checkpoint": stage.checkpoint,
            "training.start_from": stage.training.start_from,
        }.items():
            if not is_url(path):
                local_path(path, f"config.{stage.name}.{field}")


def needs_run(config: Config, mode: str, evaluations: Sequence[str], *, generates: bool) -> bool:
    """Whether a mode works on an existing run in the workdir.

    Args:
      evaluations: files that a report is of.
      generates: whether the evaluation measures generated images.
    """
    if mode == "report":
        return not evaluations
    if any("/" in stage.checkpoint for stage in config.stages):  # checkpoints of another run
        return False
    return mode in ("sample", "export") or (mode == "evaluate" and generates)
