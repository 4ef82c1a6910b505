"""The folders of a stage's checkpoints as they lie on the disk: which there are, which are sound,
what each says of itself."""

import math
import time
from pathlib import Path
from typing import Any

from rdm_jax.checkpoints.checksums import damage
from rdm_jax.config.saved import about_now
from rdm_jax.runtime import distributed
from rdm_jax.runtime.console import log
from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.files import parse_json

RETRAIN = "training again in another workdir"


def read_about(folder: Path, remedy: str = RETRAIN, *, sound: bool = False) -> dict[str, Any]:
    """What a checkpoint says of itself, without its arrays.

    Args:
      remedy: what would do where it is damaged.
      sound: it was compared with its checksums before, and is not again.

    Raises:
      InputError: it is damaged (small files alone are read), or a newer version of this package
        wrote it.
    """
    found = "" if sound else damage(folder, thorough=False)
    try:
        about = parse_json((folder / "about" / "metadata").read_text())
    except (OSError, ValueError) as error:
        found = found or str(error)
    if found:
        raise InputError(f"checkpoint {folder} is damaged ({found}); {remedy} would do.")
    return about_now(about, f"checkpoint {folder}")


def rank(about: dict[str, Any]) -> float:
    """By which the best is the least: the validation loss; of imported parameters, and where it is
    not finite, infinity."""
    loss = about.get("validation_loss")
    return math.inf if loss is None else loss


def is_whole(folder: Path) -> bool:
    """Whether a step's folder holds a training state, and not averaged parameters alone."""
    return (folder / "train").exists()


def set_damaged_aside(directory: Path) -> int | None:
    """Moves checkpoints that are not as they were written to `<directory>_damaged`, beside it,
    where others are sound.

    The newest sound one is read as a whole; of those before it, large files are measured only.

    Returns:
      Its step; None where there is no checkpoint.

    Raises:
      InputError: none is sound; nothing was moved.
    """
    wrong, sound = {}, []
    for folder in sorted(
        step_folders(directory), key=lambda folder: int(folder.name), reverse=True
    ):
        found = damage(folder, thorough=not sound)
        if found:
            wrong[folder] = found
        else:
            sound.append(folder)
    for folder, found in wrong.items():
        if not sound:
            raise InputError(
                f"checkpoint {folder} is damaged ({found}), and there is no other; training again in another workdir would do."
            )
        aside = directory.with_name(f"{directory.name}_damaged") / f"{folder.name}-{time.time_ns()}"
        aside.parent.mkdir(exist_ok=True)
        folder.rename(aside)
        log.warning(
            "checkpoint %s is damaged (%s): it is %s now, and step %s the newest",
            folder,
            found,
            aside,
            sound[0].name,
        )
    return int(sound[0].name) if sound else None


def step_folders(directory: Path) -> list[Path]:
    """The folders of a stage's complete checkpoints; none where the stage has no directory yet."""
    return [child for child in directory.glob("*") if child.name.isdecimal()]


def is_trained(directory: Path) -> bool:
    """Whether a stage's checkpoints hold a training state, and not imported parameters alone."""
    return any(map(is_whole, step_folders(directory)))


def newest_trained(directory: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest training state that is not seen to be damaged, and what it says of itself; None
    where there is none."""
    for folder in sorted(
        filter(is_whole, step_folders(directory)), key=lambda folder: int(folder.name), reverse=True
    ):
        if not damage(folder, thorough=False):
            return folder, read_about(folder, sound=True)
    return None


def find(checkpoint: str, stage_directory: Path) -> tuple[Path, int]:
    """The folder of checkpoints and the step that a config's `checkpoint` means.

    All processes must call it together: the first one looks, as others may see a new folder later.

    Args:
      checkpoint: 'newest', 'best', the number of a step, or the path of a step's folder.
      stage_directory: where the run's own stage keeps its checkpoints.

    Raises:
      InputError: there is no such checkpoint.
    """
    path = Path(checkpoint).expanduser()
    named = checkpoint in ("newest", "best") or checkpoint.isdecimal()
    with distributed.raise_together():
        step = (
            (_find(checkpoint, stage_directory) if named else _step_of(path))
            if distributed.is_primary()
            else -1
        )
    return stage_directory if named else path.parent, distributed.from_primary(step)


def _step_of(folder: Path) -> int:
    """The step whose checkpoint a folder is."""
    if folder.name.isdecimal() and folder.is_dir():
        return int(folder.name)
    raise InputError(
        f"checkpoint={str(folder)!r} is no checkpoint; 'newest', 'best', a step, or the folder of a step would do."
    )


def _find(checkpoint: str, directory: Path) -> int:
    steps = sorted(int(folder.name) for folder in step_folders(directory))
    if not steps:
        raise InputError(
            f"there is no checkpoint in {directory}; training this stage first would do (--mode train)."
        )
    if checkpoint == "newest":
        return steps[-1]
    if checkpoint == "best":
        about = {step: read_about(directory / str(step)) for step in steps}
        known = about[steps[-1]].get("validated_on")
        comparable = [step for step in about if about[step].get("validated_on", known) == known]
        return min(comparable, key=lambda step: rank(about[step]))
    if int(checkpoint) not in steps:
        known = ", ".join(map(str, steps))
        raise InputError(
            f"checkpoint={checkpoint!r} is not among those in {directory}; one of {known} would do."
        )
    return int(checkpoint)
