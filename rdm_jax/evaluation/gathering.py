"""Gathers the statistics of streams of images: over all processes, with saves on the way."""

import contextlib
import hashlib
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from rdm_jax.evaluation.features import FeatureSpace
from rdm_jax.evaluation.high_frequency import high_frequency_energy
from rdm_jax.evaluation.image_streams import ImageStream
from rdm_jax.evaluation.statistics import ENERGY, StatisticsAccumulator
from rdm_jax.runtime import distributed, mounts, sharding
from rdm_jax.runtime.console import log, progress
from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.files import atomic_write
from rdm_jax.runtime.npz import Npz
from rdm_jax.runtime.signals import StopOnSignal

SAVE_SECONDS = 60.0  # between saves of what is gathered
SAVE_SHARE = 1 / 20  # of the time that saves may take
SECONDS_TO_APPEAR = 120  # of a file on the network, until it is taken for lost
# What processes exchange after each batch: nothing (0), that process 0 wants to save, or that one
# of them has received a signal.
SAVE = 1
STOP = 2


class Measured(NamedTuple):
    """A batch of a process: the index of its first image, and by the set's name what follows."""

    first: int
    outputs: dict[str, dict[str, jax.Array]]
    images: dict[str, np.ndarray]
    labels: np.ndarray


class Gatherer:
    """Gathers the statistics of image streams in a feature space.

    Each process measures its share of the images and keeps the sums to itself until the end.

    Args:
      space: of the features.
      kept: number of features to keep per set.
      stop: checked after every batch.
    """

    def __init__(self, space: FeatureSpace, kept: int, stop: StopOnSignal):
        self._space, self._kept, self._stop = space, kept, stop
        replicated = sharding.replicated(sharding.local_mesh())
        self._params = jax.device_put(space.params, replicated)
        self._apply = jax.jit(self._measured)

    def gather(self, stream: ImageStream, folder: Path) -> dict[str, StatisticsAccumulator]:
        """Measures every image of a stream, resuming where an earlier run was stopped.

        Batches are dealt out to the processes in turn. What they gather is exchanged once, at the
        end; until then each saves its own.

        Args:
          stream: the images.
          folder: of the evaluation, in which what is gathered is saved.

        Returns:
          The statistics by the name of the set.

        Raises:
          Interrupted: a signal came; what is gathered is saved.
        """
        files = _Files(folder, self._identity(stream))
        stream.begin()
        accumulators, done = self._restored(stream, files)
        timer, waiting = _SaveTimer(), None
        with progress(stream.count, f"measuring {', '.join(stream.names)}", done) as bar:
            while done < stream.count:
                with distributed.raise_together("the other processes, which measure a batch"):
                    following = self._batch(stream, done)
                    # One batch late, so that the devices of a process that is alone work while the
                    # next one is read. Several wait for theirs twice: here at the end, and below.
                    _add(accumulators, waiting)
                waiting, before = following, done
                done = min(done + stream.batch_size * jax.process_count(), stream.count)
                bar.update(done - before)
                request = self._request(timer)
                if request or done == stream.count:
                    with timer.saving():
                        _save_all(accumulators, waiting, files, done)
                    waiting = None
                if request == STOP:
                    raise self._stop.interruption
        for accumulator in accumulators.values():
            accumulator.combine()
        distributed.wait_for_all("save what was gathered")
        return accumulators

    def remove_saved(self, stream: ImageStream, folder: Path) -> None:
        """Removes what was saved while a stream was measured."""
        _Files(folder, self._identity(stream)).remove()

    def _identity(self, stream: ImageStream) -> str:
        identity = json.dumps([stream.about, self._space.digest, self._kept], sort_keys=True)
        return hashlib.sha256(identity.encode()).hexdigest()[:12]

    def _restored(
        self, stream: ImageStream, files: "_Files"
    ) -> tuple[dict[str, StatisticsAccumulator], int]:
        """What an earlier run of any number of processes has gathered, and of how many images."""
        accumulators = self._accumulators(stream)
        done, parts = distributed.primary_alone("lists what was gathered", files.newest)
        failed = False
        with distributed.raise_together("the other processes, which read what was gathered"):
            for path in files.shares(done, parts):
                _await(path)
                try:
                    _restore(accumulators, path)
                except (InputError, KeyError, ValueError, TypeError) as error:
                    log.warning("evaluation: restarts, as %s cannot be read (%s)", path, error)
                    failed = True
        if distributed.in_any_process(failed):
            return self._accumulators(stream), 0
        if done:
            log.info("evaluation: resuming after %s of %s images", f"{done:,}", f"{stream.count:,}")
        return accumulators, done

    def _accumulators(self, stream: ImageStream) -> dict[str, StatisticsAccumulator]:
        return {
            name: StatisticsAccumulator(
                name, self._space, stream.count, kept=self._kept, shown=stream.shown()
            )
            for name in stream.names
        }

    def _batch(self, stream: ImageStream, done: int) -> Measured | None:
        """This process's batch of those that follow on `done` images; None if there is none."""
        size = stream.batch_size
        first = done + jax.process_index() * size
        if first >= stream.count:
            return None
        images, labels = stream.batch(first, min(size, stream.count - first))
        outputs = {name: self._outputs(images[name], size) for name in stream.names}
        return Measured(first, outputs, images, labels)

    def _request(self, timer: "_SaveTimer") -> int:
        """Returns STOP, SAVE or 0: what is to be done now, the same in all processes."""
        distributed.hear_preemption(self._stop)
        wanted = 0
        if self._stop.requested:
            wanted = STOP
        elif distributed.is_primary() and timer.is_due():
            wanted = SAVE
        return wanted if jax.process_count() == 1 else int(distributed.largest(wanted))

    def _measured(self, params: Any, images: jax.Array) -> dict[str, jax.Array]:
        return self._space.apply(params, images) | {ENERGY: high_frequency_energy(images)}

    def _outputs(self, images: np.ndarray, batch_size: int) -> dict[str, jax.Array]:
        """The outputs for statistics; a short batch is padded, so that nothing is recompiled."""
        padded = images[np.arange(batch_size) % len(images)]
        return self._apply(self._params, sharding.put_batch(padded, sharding.local_mesh()))


class _SaveTimer:
    """Tells when to save: every `SAVE_SECONDS`, or more rarely if saves are slow."""

    def __init__(self):
        self._saved, self._pause = time.monotonic(), SAVE_SECONDS

    def is_due(self) -> bool:
        return time.monotonic() - self._saved > self._pause

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Measures how long a save takes."""
        began = time.monotonic()
        yield
        self._saved = time.monotonic()
        self._pause = max(SAVE_SECONDS, (self._saved - began) / SAVE_SHARE)


class _Files:
    """The files of what is gathered of a stream: one per process, named by the images of all."""

    def __init__(self, folder: Path, identity: str):
        self._folder, self._prefix = folder, f".gathered-{identity}"

    def own(self, done: int) -> Path:
        """The file of this process when `done` images are measured."""
        return self._path(done, jax.process_index(), jax.process_count())

    def newest(self) -> tuple[int, int]:
        """Of the newest save that all its processes have ended: images and processes; or 0, 0."""
        names = {path.name for path in self._folder.glob(f"{self._prefix}-at-*.npz")}
        saves = {tuple(map(int, re.findall(r"\d+", name.rpartition("-at-")[2]))) for name in names}
        whole = [
            (done, parts)
            for done, _, parts in saves
            if all(self._path(done, part, parts).name in names for part in range(parts))
        ]
        return max(whole, default=(0, 0))

    def shares(self, done: int, parts: int) -> list[Path]:
        """This process's share of the files of a save by `parts` processes."""
        mine = range(jax.process_index(), parts, jax.process_count())
        return [self._path(done, part, parts) for part in mine]

    def remove(self, all_but: int | None = None) -> None:
        """Removes all files of what is gathered, once all processes have saved.

        Among them are files of other numbers of processes, as the newest of these could be damaged
        and be found again at each start, and those of earlier versions. Every process removes
        them: in a bucket it knows its own alone.

        Args:
          all_but: keep those of this many processes when so many images are measured.
        """
        parts = jax.process_count()
        kept = set() if all_but is None else {self._path(all_but, n, parts) for n in range(parts)}
        for path in set(self._folder.glob(f"{self._prefix}*.npz")) - kept:
            path.unlink(missing_ok=True)

    def _path(self, done: int, part: int, parts: int) -> Path:
        return self._folder / f"{self._prefix}-at-{done}-{part}-of-{parts}.npz"


def _add(accumulators: dict[str, StatisticsAccumulator], batch: Measured | None) -> None:
    if batch is None:
        return
    for name, accumulator in accumulators.items():
        accumulator.add(batch.first, batch.outputs[name], batch.images[name], batch.labels)


def _save_all(
    accumulators: dict[str, StatisticsAccumulator],
    waiting: Measured | None,
    files: _Files,
    done: int,
) -> None:
    """Adds the last batch, and saves in all processes; removes earlier saves."""
    with distributed.raise_together("the other processes, which save"):
        _add(accumulators, waiting)
        _save(accumulators, files.own(done))
        mounts.push()
    files.remove(all_but=done)


def _save(accumulators: dict[str, StatisticsAccumulator], path: Path) -> None:
    arrays = {
        f"{name}/{key}": value
        for name, accumulator in accumulators.items()
        for key, value in accumulator.state().items()
    }
    with atomic_write(path) as partial, partial.open("wb") as file:
        np.savez(file, **arrays)


def _await(path: Path) -> None:
    """Waits a while for a file that process 0 has seen, and another host has perhaps written."""
    for _ in range(SECONDS_TO_APPEAR):
        if path.exists():
            return
        mounts.pull()
        time.sleep(1)


def _restore(accumulators: dict[str, StatisticsAccumulator], path: Path) -> None:
    """Adds what a process of a stopped run has gathered."""
    with Npz(path) as file:
        for name, accumulator in accumulators.items():
            prefix = f"{name}/"
            keys = [key for key in file.arrays if key.startswith(prefix)]
            accumulator.add_state({key.removeprefix(prefix): file.read(key) for key in keys})
