"""The average of a stage's parameters that its config chooses, read from checkpoints.

'ema' and 'raw' are items of a checkpoint, and so are the averages of `training.averages`. One of
another width is the sum of the snapshots of these, with the weights that `profiles.fit` gives.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from rdm_jax.checkpoints import folders, profiles, store
from rdm_jax.config import Stage
from rdm_jax.runtime import distributed
from rdm_jax.runtime.console import log
from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.mounts import AnyPath

NEGLIGIBLE = 1e-7  # weights that float32 parameters do not notice
TRIED = [number / 200 for number in range(1, 57)]  # widths, to say which can be reconstructed


def snapshots_of(directory: AnyPath) -> AnyPath:
    """The folder of snapshots that belongs to a folder of checkpoints."""
    return directory.with_name("snapshots")


class Part(NamedTuple):
    """A tree of parameters in a checkpoint or a snapshot.

    Attributes:
      directory: of the checkpoints or snapshots.
      step: of the one that has it.
      item, name: where it is: the tree of this name in the item; with no name, the item itself.
      weight: in the sum of all parts.
    """

    directory: AnyPath
    step: int
    item: str
    name: str
    weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class Chosen:
    """The parameters of a stage that its config chooses.

    Attributes:
      parts: add up to the parameters.
      about: of the checkpoint.
      missed: share of the profile that a reconstruction misses (`profiles.Fit`).
    """

    parts: tuple[Part, ...]
    about: dict[str, Any]
    missed: float = 0.0

    @property
    def snapshots(self) -> list[int]:
        """The steps whose averages add up to this one; none if it was kept itself."""
        return [] if self._is_kept else sorted({part.step for part in self.parts})

    @property
    def _is_kept(self) -> bool:
        return [part.weight for part in self.parts] == [1.0]

    def read(self, abstract: Any) -> Any:
        """Reads the parameters, with the shapes, dtypes and shardings of `abstract`.

        A sum is made in float64 on the host, one part at a time.

        Raises:
          InputError: a checkpoint or a snapshot is damaged, or of another network.
        """
        trees = self._trees(abstract)
        if self._is_kept:
            return next(trees)
        log.info(
            "average: reconstructed from %d averages of %d steps, %.2g %% of the profile missing",
            len(self.parts),
            len(self.snapshots),
            100 * self.missed,
        )
        total = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float64), abstract)
        for part, tree in zip(self.parts, trees, strict=True):
            for sum_, leaf in zip(jax.tree.leaves(total), jax.tree.leaves(tree), strict=True):
                sum_ += part.weight * np.asarray(leaf.addressable_data(0), np.float64)
        return jax.tree.map(_placed, total, abstract)

    def _trees(self, abstract: Any) -> Iterator[Any]:
        for directory, parts in itertools.groupby(self.parts, lambda part: part.directory):
            with contextlib.closing(store.Checkpoints(directory, read_only=True)) as checkpoints:
                for part in parts:
                    if part.name:
                        yield checkpoints.restore_part(part.step, part.item, part.name, abstract)
                    else:
                        yield checkpoints.restore_ema(part.step, abstract)[0]


def _placed(value: np.ndarray, like: Any) -> jax.Array:
    narrow = value.astype(like.dtype)
    return jax.make_array_from_callback(like.shape, like.sharding, lambda index: narrow[index])


def choose(stage: Stage, directory: AnyPath, step: int) -> Chosen:
    """The parameters of a checkpoint that the stage's `average` means. No array is read.

    All processes must call it together.

    Args:
      stage: of the config.
      directory, step: of the checkpoint.

    Raises:
      InputError: the checkpoint is damaged, or does not have that average.
    """
    folder = directory / str(step)
    with contextlib.closing(store.Checkpoints(directory, read_only=True)) as checkpoints:
        about = checkpoints.about(step)
    if stage.average == "ema":
        return Chosen((Part(directory, step, "ema", ""),), about)
    field = f"config.{stage.name}.average={stage.average!r}"
    if not folders.is_whole(folder):
        raise InputError(
            f"{field} cannot be used: checkpoint {folder} has EMA parameters alone", "Use 'ema'."
        )
    if stage.width is None:
        return Chosen((Part(directory, step, "train", "params"),), about)
    kept = profiles.average_names(about["stage"]["training"]["averages"])
    if not kept:
        raise InputError(
            f"{field} cannot be used: checkpoint {folder} was trained without averages",
            "Use 'ema' or 'raw', or train with training.averages, such as (0.05, 0.1).",
        )
    own = [Part(directory, step, "averages", name) for name in kept]
    for part, width in zip(own, kept.values(), strict=True):
        if width == stage.width:
            return Chosen((part,), about)
    return _reconstructed(stage.width, own, about, field)


def _reconstructed(width: float, own: list[Part], about: dict[str, Any], field: str) -> Chosen:
    """The parameters that are the average of a width at the time of a checkpoint.

    Args:
      width: of the wanted average.
      own: the averages of that checkpoint.
      about: of the checkpoint.
      field: for the message.
    """
    time, snapshots = float(about["images_seen"]), snapshots_of(own[0].directory)
    parts, times = list(own), [time] * len(own)
    for folder in sorted(folders.step_folders(snapshots), key=lambda folder: int(folder.name)):
        found = folders.read_about(folder, "Move it away; the others may be enough.")
        seen = float(found["images_seen"])
        if seen < time:
            parts += [Part(snapshots, int(folder.name), part.item, part.name) for part in own]
            times += [seen] * len(own)
    distributed.check_same(f"the list of snapshots in {snapshots}", str(times))
    widths = about["stage"]["training"]["averages"]
    kept = widths * (len(parts) // len(widths))
    fit = profiles.fit(times, kept, time, width)
    if fit.missed > profiles.MISSED:
        raise _out_of_reach(times, kept, time, fit.missed, f"{field} cannot be reconstructed")
    used = [
        part._replace(weight=float(weight))
        for part, weight in zip(parts, fit.weights, strict=True)
        if abs(weight) > NEGLIGIBLE
    ]
    return Chosen(tuple(used), about, fit.missed)


def check_planned(stage: Stage) -> None:
    """Refuses an average to sample with that the stage's training will not leave.

    Raises:
      InputError: there are no averages, or too few snapshots for that width.
    """
    training, width, field = stage.training, stage.width, f"config.{stage.name}.average"
    if width is None or width in training.averages:
        return
    if not training.averages:
        raise InputError(
            f"{field}={stage.average!r} cannot be used: training.averages is empty",
            f"Use 'ema' or 'raw', or training.averages=({width:g},).",
        )
    end, every = float(training.steps * training.batch_size), training.snapshot_every
    at = [*map(float, range(every, int(end), every)), end]
    times = [time for time in at for _ in training.averages]
    kept = list(training.averages) * len(at)
    missed = profiles.fit(times, kept, end, width).missed
    if missed > profiles.MISSED:
        problem = f"{field}={stage.average!r} cannot be reconstructed after this training"
        raise _out_of_reach(times, kept, end, missed, problem)


def _out_of_reach(
    times: list[float], widths: list[float], time: float, missed: float, problem: str
) -> InputError:
    """The error for a width that the snapshots do not reach."""
    names = ", ".join(f"{width:g}" for width in sorted(set(widths)))
    count = len(set(times))
    tried = sorted({*TRIED, *widths})
    reached = [profiles.fit(times, widths, time, w).missed <= profiles.MISSED for w in tried]
    runs = [
        [width for width, _ in run]
        for is_reached, run in itertools.groupby(zip(tried, reached, strict=True), lambda x: x[1])
        if is_reached
    ]
    use = " or ".join(f"{run[0]:g}" + (f" to {run[-1]:g}" if run[1:] else "") for run in runs)
    return InputError(
        f"{problem}: averages of the widths {names} at {count} times miss {missed:.0%} of its "
        f"profile, more than {profiles.MISSED:.0%}",
        f"Use a width of {use}, or 'ema' or 'raw'.",
    )
