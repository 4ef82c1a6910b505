"""The folders of a stage's checkpoints: which exist, which are intact, and their `about`."""

import errno
import math
import time
from pathlib import Path
from typing import Any

from rdm_jax.checkpoints.checksums import damage, is_half_deleted
from rdm_jax.config.changes import Change, incompatible_changes
from rdm_jax.config.saved import about_now
from rdm_jax.runtime import distributed, mounts
from rdm_jax.runtime.console import log
from rdm_jax.runtime.errors import InputError, reason
from rdm_jax.runtime.files import parse_json
from rdm_jax.runtime.mounts import AnyPath

SECONDS_TO_APPEAR = 120  # that a network file system may take to show a new folder
RETRAIN = "Train again in another workdir."
COMMITTED = "commit_success.txt"  # Orbax writes it into a folder of a bucket at the end


def read_about(folder: AnyPath, fix: str = RETRAIN, *, sound: bool = False) -> dict[str, Any]:
    """Reads a checkpoint's item 'about': everything but its arrays.

    Args:
      fix: what to do if it is damaged, for the message.
      sound: it has been compared with its checksums already.

    Raises:
      InputError: it is damaged (only small files are read), or written by a newer version of this
        package.
      OSError: it cannot be read, as its store is away.
    """
    found = "" if sound else damage(folder, thorough=False)
    try:
        with mounts.talking_to(folder):
            about = parse_json((folder / "about" / "metadata").read_text())
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError) as error:
        found = found or str(error)
    if found:
        raise InputError(f"checkpoint {folder} is damaged ({found})", fix)
    return about_now(about, f"checkpoint {folder}")


def changed_since(about: dict[str, Any], now: dict[str, Any], name: str) -> list[Change]:
    """Returns the incompatible changes between two checkpoints of the stage called `name`.

    Args:
      about: of the earlier one; older versions do not name their images.
      now: of the later one.
    """
    known = about.keys() & now.keys()

    def as_config(values: dict[str, Any]) -> dict[str, Any]:
        return {
            **{key: values[key] for key in ("seed", "classes") if key in known},
            name: values["stage"],
            "data": {"images": values["images"]} if "images" in known else {},
        }

    return incompatible_changes(as_config(about), as_config(now))


def rank(about: dict[str, Any]) -> float:
    """Sort key for `best` (lower is better): the validation loss.

    Infinity if it is not finite, or unknown as for imported parameters.
    """
    loss = about.get("validation_loss")
    return math.inf if loss is None else loss


def absolute(folder: AnyPath) -> AnyPath:
    """Returns the absolute path of a folder."""
    return folder.resolve() if isinstance(folder, Path) else folder


def is_committed(folder: AnyPath) -> bool:
    """Whether a step's folder is complete: elsewhere than in a bucket it has its name only then."""
    return isinstance(folder, Path) or (folder / COMMITTED).exists()


def is_whole(folder: AnyPath) -> bool:
    """Whether a step's folder holds a training state, not only EMA parameters."""
    with mounts.talking_to(folder):
        return (folder / "train").exists()


def set_damaged_aside(directory: AnyPath) -> int | None:
    """Moves damaged checkpoints to `<directory>_damaged` if another one is intact.

    In a bucket, what was half deleted is deleted.

    Of the newest intact one all files are read; of those before it, large files are only measured.

    Returns:
      The newest intact step; None if there is no checkpoint.

    Raises:
      InputError: none is intact, or one in a bucket has other content; nothing was moved.
      OSError: a file cannot be read; nothing was moved.
    """
    damaged: dict[AnyPath, str] = {}
    sound: list[AnyPath] = []
    for folder in _newest_first(step_folders(directory)):
        found = damage(folder, thorough=not sound)
        if found:
            damaged[folder] = found
        else:
            sound.append(folder)
    for folder, found in damaged.items():
        if not sound:
            fix = RETRAIN if (folder / "ema").exists() else "Move it away."  # a snapshot
            raise InputError(
                f"checkpoint {folder} is damaged ({found}), and there is no other", fix
            )
        if not isinstance(folder, Path) and not is_half_deleted(folder):
            raise InputError(f"checkpoint {folder} is damaged ({found})", "Move it away.")
        log.warning(
            "checkpoint %s is damaged (%s): %s; the newest is now step %s",
            folder,
            found,
            _moved_aside(directory, folder),
            sound[0].name,
        )
    return int(sound[0].name) if sound else None


def _moved_aside(directory: AnyPath, folder: AnyPath) -> str:
    """Moves or deletes a damaged checkpoint. Returns what was done."""
    if not isinstance(folder, Path):
        mounts.remove_folder(folder)
        return "deleted"
    aside = directory.with_name(f"{directory.name}_damaged") / f"{folder.name}-{time.time_ns()}"
    aside.parent.mkdir(exist_ok=True)
    folder.rename(aside)
    return f"moved to {aside}"


def step_folders(directory: AnyPath) -> list[AnyPath]:
    """Returns the folders of a stage's complete checkpoints, also if it has no directory yet."""
    with mounts.talking_to(directory):
        children = [child for child in directory.glob("*") if child.name.isdecimal()]
        return [child for child in children if is_committed(child)]


def unfinished(directory: AnyPath, step: int | None = None) -> list[AnyPath]:
    """Returns the folders of unfinished saves, or those of one step.

    In a bucket a folder has its final name from the start.
    """
    if isinstance(directory, Path):
        # One pattern serves all steps, as Python caches every pattern that it compiles.
        found = list(directory.glob("*.orbax-checkpoint-tmp*"))
    else:
        with mounts.talking_to(directory):
            numbered = [child for child in directory.glob("*") if child.name.isdecimal()]
            found = [child for child in numbered if not is_committed(child)]
    return [child for child in found if step is None or child.name.split(".")[0] == str(step)]


def being_saved(directory: AnyPath, step: int) -> AnyPath:
    """Returns the folder of the save of a step that has begun.

    Raises:
      OSError: after two minutes a network file system still does not list it.
    """
    for _ in range(SECONDS_TO_APPEAR):
        if found := unfinished(directory, step):
            (partial,) = found
            return partial
        time.sleep(1)
    raise FileNotFoundError(errno.ENOENT, "the folder of the save is not listed", str(directory))


def unreadable(directory: AnyPath, error: Exception) -> InputError:
    """What to raise if Orbax cannot open the checkpoints: names the first one that is damaged."""
    problem = f"a checkpoint in {directory} cannot be read ({reason(error)})"
    for folder in sorted(step_folders(directory)):
        found = damage(folder, thorough=False)
        if found:
            problem = f"checkpoint {folder} is damaged ({found})"
            break
    return InputError(problem, "Move the damaged step's folder away.")


def is_trained(directory: AnyPath) -> bool:
    """Whether one of a stage's checkpoints holds a training state, not only EMA parameters."""
    return any(map(is_whole, step_folders(directory)))


def newest_trained(directory: AnyPath) -> tuple[AnyPath, dict[str, Any]] | None:
    """Returns the newest training state without visible damage and its `about`, or None."""
    for folder in _newest_first(step_folders(directory)):
        if is_whole(folder) and not damage(folder, thorough=False):
            return folder, read_about(folder, sound=True)
    return None


def find(
    checkpoint: str, stage_directory: AnyPath, field: str = "checkpoint"
) -> tuple[AnyPath, int]:
    """Returns the folder of checkpoints and the step that a config's `checkpoint` names.

    All processes must call it together: process 0 looks, as others may see a new folder later.

    Args:
      checkpoint: 'newest', 'best', the number of a step, or the path of a step's folder.
      stage_directory: where the run's own stage keeps its checkpoints.
      field: of the config that has `checkpoint`, for the message.

    Raises:
      InputError: there is no such checkpoint.
    """
    path = mounts.any_path(checkpoint)
    own = checkpoint in ("newest", "best") or checkpoint.isdecimal()
    step = -1
    with distributed.raise_together():
        if distributed.is_primary():
            step = _find(checkpoint, stage_directory, field) if own else _step_of(path, field)
    return stage_directory if own else path.parent, distributed.from_primary(step)


def _newest_first(folders: list[AnyPath]) -> list[AnyPath]:
    return sorted(folders, key=lambda folder: int(folder.name), reverse=True)


def _step_of(folder: AnyPath, field: str) -> int:
    """Returns the step whose checkpoint a folder is."""
    with mounts.talking_to(folder):
        if folder.name.isdecimal() and folder.is_dir():
            return int(folder.name)
    raise InputError(
        f"{field}={str(folder)!r} is not a checkpoint",
        "Use the folder of a step, such as runs/digits/stage1/checkpoints/700.",
    )


def _find(checkpoint: str, directory: AnyPath, field: str) -> int:
    steps = sorted(int(folder.name) for folder in step_folders(directory))
    if not steps:
        raise InputError(
            f"there is no checkpoint in {directory}", "Train this stage first (--mode=train)."
        )
    if checkpoint == "newest":
        return steps[-1]
    if checkpoint == "best":
        about = {step: read_about(directory / str(step)) for step in steps}
        known = about[steps[-1]].get("validated_on")
        comparable = [step for step in about if about[step].get("validated_on", known) == known]
        return min(comparable, key=lambda step: rank(about[step]))
    if int(checkpoint) not in steps:
        raise InputError(
            f"{field}={checkpoint!r} is not in {directory}",
            f"Use one of {', '.join(map(str, steps))}.",
        )
    return int(checkpoint)
