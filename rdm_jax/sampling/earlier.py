"""What a folder of samples holds already: it is added to, moved aside or refused, and never
deleted."""

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
PICTURE = re.compile(r"\d{10}\.png")


@dataclasses.dataclass(frozen=True)
class Earlier:
    """Samples of the same settings that are in a folder.

    Attributes:
      folder: where.
      made_with: samples.json; None where there are none.
      seeds: that samples.json names.
      npz_seeds: of the images in a whole samples.npz, int64; where pictures are asked for, it is
        not looked at.
      has_npz: whether there is one.
      damaged: whether there is one that is not whole.
      more: whether it has arrays that sampling did not put there.
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
        """Those that are there, and those that are asked for."""
        return tuple(dict.fromkeys([*self.npz_seeds.tolist(), *self.seeds, *asked]))

    def wanted(self, asked: tuple[int, ...]) -> tuple[int, ...]:
        """Those that the folder should have in the end: all that it had, where its file is
        damaged."""
        return self.all_seeds(asked) if self.damaged else asked

    def present(self, seeds: Int[np.ndarray, " n"], files: str) -> Bool[np.ndarray, " n"]:
        """Whether the image of each seed is there, whole, in files of this kind."""
        if files == "npz":
            return np.isin(seeds, self.npz_seeds)
        return np.asarray(
            [is_whole_png(self.folder / "images" / png_name(seed)) for seed in seeds], bool
        )


def check_settings(config: Config, first: int, workdir: Path) -> None:
    """Refuses a folder of samples of other settings before any work is done.

    Args:
      first: number of the first stage that is going to be run.

    Raises:
      InputError: it holds samples of other settings, or some that nobody knows what they were made
        with.
    """
    folder = Workdir(workdir).samples(config)
    before = _read(folder)
    if before:
        ours = settings(with_seeds(config, _seeds(before)), first)
        _refuse(folder, differences({key: before[key] for key in ours}, ours))


def find(relay: RelayPipeline, folder: Path) -> Earlier:
    """What is in a folder and is to be added to. Samples of earlier checkpoints of the same run are
    moved aside.

    Raises:
      InputError: it holds samples of other settings or other checkpoints, or some that nobody knows
        what they were made with.
    """
    before = _read(folder)
    if not before:
        return Earlier(folder)
    ours = describe(with_seeds(relay.config, _seeds(before)), relay)
    if not same_settings(before, ours):
        if not _went_on(relay, before, ours):
            _refuse(folder, differences(before, ours))
        pictures = [f"images/{name}" for name in _pictures(folder)]
        grids = sorted(path.name for path in folder.glob("grid*.png"))
        kept = move_aside(folder, [*pictures, "samples.npz", *grids, SAMPLES])
        steps = ", ".join(str(loaded["step"]) for loaded in before["checkpoints"])
        log.info("samples: those of the earlier checkpoints (steps %s) are kept in %s", steps, kept)
        return Earlier(folder)
    if relay.config.sampling.files == "png" or not (folder / "samples.npz").exists():
        _check_labels(relay, folder, _labels_of_pictures(folder))
        return Earlier(folder, before, _seeds(before))
    arrays = _read_arrays(folder / "samples.npz", relay)
    if arrays is None:
        log.warning("samples: %s is damaged; its images are made again", folder / "samples.npz")
        return Earlier(folder, before, _seeds(before), damaged=True)
    seeds, labels, more = arrays
    _check_labels(relay, folder, dict(zip(seeds.tolist(), labels.tolist(), strict=True)))
    return Earlier(folder, before, _seeds(before), seeds, has_npz=True, more=more)


def _read_arrays(path: Path, relay: RelayPipeline) -> tuple[np.ndarray, np.ndarray, bool] | None:
    """The seeds and labels in a samples.npz, and whether it has arrays that are not ours; None
    where it is not whole."""
    names = {*relay.earlier, "images", "labels", "seeds"}
    try:
        with Npz(path) as file:
            seeds, labels = file.read("seeds").astype(np.int64), file.read("labels")
            counts = {file.arrays[name][0][:1] for name in names}
            if counts != {(len(seeds),)} or not is_whole_npz(path, file.arrays):
                return None
            return seeds, labels, bool(file.arrays.keys() - names - {"class_names"})
    except (InputError, KeyError):
        return None


def _read(folder: Path) -> dict[str, Any] | None:
    """What samples.json says of the samples in a folder; None where there are no samples."""
    samples = (folder / "samples.npz").exists() or bool(_pictures(folder))
    if not samples and not (folder / SAMPLES).exists():
        return None
    try:
        made_with = parse_json((folder / SAMPLES).read_text())
        if not {"seed", "stages", "checkpoints"} <= made_with.keys() or not _seeds(made_with):
            raise ValueError("fields are missing")
        made_with["sampling"]["seeds"] = one_spelling(
            made_with["sampling"]["seeds"]
        )  # earlier versions kept the user's
        return made_with if samples else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = f"{SAMPLES} does not say what they were made with ({getattr(error, 'strerror', None) or error})"
        raise InputError(
            f"{folder} holds samples, and {why}; another --config.sampling.name would do."
        ) from error


def _pictures(folder: Path) -> list[str]:
    """The names of the pictures, and of their labels file."""
    names = (
        sorted(path.name for path in (folder / "images").glob("*"))
        if (folder / "images").is_dir()
        else []
    )
    return [name for name in names if name == LABELS or PICTURE.fullmatch(name)]


def _labels_of_pictures(folder: Path) -> dict[int, int]:
    """The class numbers of pictures by their seeds; none where their labels file is not there, or
    damaged."""
    try:
        pairs = parse_json((folder / "images" / LABELS).read_bytes())["labels"] or []
        return {int(Path(name).stem): int(label) for name, label in pairs}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _check_labels(relay: RelayPipeline, folder: Path, labels: dict[int, int]) -> None:
    """Refuses images of other classes than the settings mean now: an earlier version took a number
    for another class."""
    ours = relay.labels(np.asarray([*labels], np.int64)) if labels else []
    if list(ours) != [*labels.values()]:
        meant = f"config.sampling.labels={relay.config.sampling.labels!r}"
        raise InputError(
            f"{folder} holds samples of other classes than {meant} means; another --config.sampling.name would do."
        )


def _seeds(made_with: dict[str, Any]) -> tuple[int, ...]:
    return parse_numbers(made_with["sampling"]["seeds"], "sampling.seeds")


def _went_on(relay: RelayPipeline, before: dict[str, Any], ours: dict[str, Any]) -> bool:
    """Whether nothing is new but the newest or best checkpoints of the run itself."""
    same_stages = len(before["checkpoints"]) == len(ours["checkpoints"])
    if not same_stages or not same_settings({**before, "checkpoints": ours["checkpoints"]}, ours):
        return False
    stages = relay.config.stages[relay.first - 1 :]
    pairs = zip(stages, before["checkpoints"], ours["checkpoints"], strict=True)
    return all(
        old == new or (stage.checkpoint in ("newest", "best") and "folder" not in old)
        for stage, old, new in pairs
    )


def _refuse(folder: Path, changes: list[str]) -> None:
    if changes:
        listed = f"{', '.join(changes[:3])}{', ...' if len(changes) > 3 else ''}"
        raise InputError(
            f"{folder} holds samples of other settings ({listed}); another --config.sampling.name would do."
        )
