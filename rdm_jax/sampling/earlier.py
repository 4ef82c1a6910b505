"""The samples that a folder holds already.

Samples are added to, moved aside or refused; they are never deleted.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from rdm_jax.config import Config
from rdm_jax.runtime.console import log
from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.files import is_whole_npz, is_whole_png, move_aside, parse_json
from rdm_jax.runtime.npz import Npz
from rdm_jax.runtime.ranges import parse_numbers
from rdm_jax.sampling.made_with import (
    describe,
    differences,
    one_spelling,
    same_settings,
    settings,
    with_seeds,
)
from rdm_jax.sampling.pipeline import RelayPipeline
from rdm_jax.sampling.sample_shards import LABELS, png_name
from rdm_jax.workdir import Workdir

SAMPLES = "samples.json"
NPZ = "samples.npz"
PNG_NAME = re.compile(r"\d{10}\.png")
OTHER_NAME = "Use another --config.sampling.name."


@dataclasses.dataclass(frozen=True)
class Earlier:
    """Samples with the same settings that exist in a folder.

    Attributes:
      folder: where they are.
      made_with: the content of samples.json; None if there are no samples.
      seeds: the seeds in samples.json.
      npz_seeds: the seeds of the images in an intact samples.npz, int64 (n,); empty if PNGs are
        configured.
      has_npz: whether samples.npz exists and is intact.
      damaged: whether samples.npz exists and is not intact.
      more: whether samples.npz has arrays that sampling did not write.
    """

    folder: Path
    made_with: dict[str, Any] | None = None
    seeds: tuple[int, ...] = ()
    npz_seeds: Int[np.ndarray, " n"] = dataclasses.field(
        default_factory=lambda: np.zeros(0, np.int64)
    )
    has_npz: bool = False
    damaged: bool = False
    more: bool = False

    def all_seeds(self, asked: tuple[int, ...]) -> tuple[int, ...]:
        """The existing seeds and the requested ones."""
        return tuple(dict.fromkeys([*self.npz_seeds.tolist(), *self.seeds, *asked]))

    def wanted(self, asked: tuple[int, ...]) -> tuple[int, ...]:
        """The seeds to have in the end: also all earlier ones if their file is damaged."""
        return self.all_seeds(asked) if self.damaged else asked

    def present(self, seeds: Int[np.ndarray, " n"], files: str) -> Bool[np.ndarray, " n"]:
        """Whether the image of each seed exists and is intact; `files` is 'npz' or 'png'."""
        if files == "npz":
            return np.isin(seeds, self.npz_seeds)
        return np.asarray(
            [is_whole_png(self.folder / "images" / png_name(seed)) for seed in seeds], bool
        )


def check_settings(config: Config, first: int, workdir: Path) -> None:
    """Refuses a folder with samples of other settings before any work is done.

    Args:
      config: of the run.
      first: number of the first stage that runs.
      workdir: of the run.

    Raises:
      InputError: the folder has samples of other or unknown settings.
    """
    folder = Workdir(workdir).samples(config)
    before = read_made_with(folder)
    if before:
        ours = settings(with_seeds(config, seeds_of(before)), first)
        _refuse(folder, differences({key: before[key] for key in ours}, ours))


def find(relay: RelayPipeline, folder: Path) -> Earlier:
    """Finds the samples in a folder that new ones are added to.

    Samples of earlier checkpoints of the same run are moved aside.

    Raises:
      InputError: the folder has samples of other settings or of another run's checkpoints, or their
        settings are unknown.
    """
    before = read_made_with(folder)
    if not before:
        return Earlier(folder)
    ours = describe(with_seeds(relay.config, seeds_of(before)), relay)
    if not same_settings(before, ours):
        if not _only_checkpoints_advanced(relay, before, ours):
            _refuse(folder, differences(before, ours))
        _move_aside(folder, before)
        return Earlier(folder)
    if relay.config.sampling.files == "png" or not (folder / NPZ).exists():
        _check_labels(relay, folder, read_png_labels(folder))
        return Earlier(folder, before, seeds_of(before))
    index = read_npz_index(folder / NPZ, relay)
    if index is None:
        log.warning("samples: %s is damaged; its images are sampled again", folder / NPZ)
        return Earlier(folder, before, seeds_of(before), damaged=True)
    seeds, labels, more = index
    _check_labels(relay, folder, dict(zip(seeds.tolist(), labels.tolist(), strict=True)))
    return Earlier(folder, before, seeds_of(before), seeds, has_npz=True, more=more)


def _move_aside(folder: Path, before: dict[str, Any]) -> None:
    pngs = [f"images/{name}" for name in _png_files(folder)]
    grids = sorted(path.name for path in folder.glob("grid*.png"))
    kept = move_aside(folder, [*pngs, NPZ, *grids, SAMPLES])
    steps = ", ".join(str(loaded["step"]) for loaded in before["checkpoints"])
    log.info("samples: those of the earlier checkpoints (steps %s) are kept in %s", steps, kept)


def read_npz_index(path: Path, relay: RelayPipeline) -> tuple[np.ndarray, np.ndarray, bool] | None:
    """Reads which images a samples.npz holds.

    Returns:
      Seeds, int64 (n,); labels (n,); whether it has arrays that sampling does not write. None if
      the file is damaged or incomplete.
    """
    names = {*relay.earlier, "images", "labels", "seeds", *(("prompts",) if relay.text else ())}
    try:
        with Npz(path) as file:
            seeds, labels = file.read("seeds").astype(np.int64), file.read("labels")
            counts = {file.arrays[name][0][:1] for name in names}
            if counts != {(len(seeds),)} or not is_whole_npz(path, file.arrays):
                return None
            return seeds, labels, bool(file.arrays.keys() - names - {"class_names"})
    except (InputError, KeyError):
        return None


def read_made_with(folder: Path) -> dict[str, Any] | None:
    """Reads the samples.json of the samples in a folder; None if there are no samples.

    Raises:
      InputError: there are samples, but samples.json is missing or damaged.
    """
    has_samples = (folder / NPZ).exists() or bool(_png_files(folder))
    if not has_samples and not (folder / SAMPLES).exists():
        return None
    try:
        made_with = parse_json((folder / SAMPLES).read_text())
        if not {"seed", "stages", "checkpoints"} <= made_with.keys() or not seeds_of(made_with):
            raise ValueError("fields are missing")
        # Earlier versions kept the user's spelling.
        made_with["sampling"]["seeds"] = one_spelling(made_with["sampling"]["seeds"])
        return made_with if has_samples else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = getattr(error, "strerror", None) or error
        raise InputError(
            f"{folder} has samples, but {SAMPLES} does not give their settings ({why})", OTHER_NAME
        ) from error


def _png_files(folder: Path) -> list[str]:
    """Names of the PNGs and of their labels file."""
    if not (folder / "images").is_dir():
        return []
    names = sorted(path.name for path in (folder / "images").glob("*"))
    return [name for name in names if name == LABELS or PNG_NAME.fullmatch(name)]


def read_png_labels(folder: Path) -> dict[int, int]:
    """Class indices of the PNGs by seed; empty if their labels file is missing or damaged."""
    try:
        pairs = parse_json((folder / "images" / LABELS).read_bytes())["labels"] or []
        return {int(Path(name).stem): int(label) for name, label in pairs}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _check_labels(relay: RelayPipeline, folder: Path, labels: dict[int, int]) -> None:
    """Refuses images of other classes than the settings give now.

    An earlier version read a number in `sampling.labels` as another class.
    """
    ours = relay.labels(np.asarray([*labels], np.int64)) if labels else []
    if list(ours) != [*labels.values()]:
        meant = f"config.sampling.labels={relay.config.sampling.labels!r}"
        raise InputError(f"{folder} has samples of other classes than {meant} gives", OTHER_NAME)


def seeds_of(made_with: dict[str, Any]) -> tuple[int, ...]:
    """The seeds that samples.json lists."""
    return parse_numbers(made_with["sampling"]["seeds"], "sampling.seeds")


def _only_checkpoints_advanced(
    relay: RelayPipeline, before: dict[str, Any], ours: dict[str, Any]
) -> bool:
    """Whether only the newest or best checkpoints of the run itself have changed."""
    same_stages = len(before["checkpoints"]) == len(ours["checkpoints"])
    if not same_stages or not same_settings({**before, "checkpoints": ours["checkpoints"]}, ours):
        return False
    stages = relay.config.stages[relay.first - 1 :]
    pairs = zip(stages, before["checkpoints"], ours["checkpoints"], strict=True)
    return all(
        old == new
        or (
            stage.checkpoint in ("newest", "best")
            and "folder" not in old
            and old.get("guides") == new.get("guides")
        )
        for stage, old, new in pairs
    )


def _refuse(folder: Path, changes: list[str]) -> None:
    if changes:
        listed = f"{', '.join(changes[:3])}{', ...' if len(changes) > 3 else ''}"
        raise InputError(f"{folder} has samples of other settings ({listed})", OTHER_NAME)
