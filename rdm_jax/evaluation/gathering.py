"""Gathers the statistics of streams of images: over all processes, with saves on the way."""

import hashlib
import json
import time
from pathlib import Path
from typing import Any

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

# Outputs and images by the name of the set, and labels.
Measured = tuple[dict[str, dict[str, jax.Array]], dict[str, np.ndarray], np.ndarray]


class Gatherer:
    """Gathers the statistics of image streams in a feature space.

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

        Every process computes its share of the features and receives the rest.

        Args:
          stream: the images.
          folder: of the evaluation, in which what is gathered is saved.

        Returns:
          The statistics by the name of the set.

        Raises:
          Interrupted: a signal came; what is gathered is saved.
        """
        path = self.partial_path(stream, folder)
        accumulators = self._restored(stream, path)
        done = min(accumulator.done for accumulator in accumulators.values())
        distributed.check_same(f"what was gathered in {path}", str(done))
        timer, waiting = _SaveTimer(), []
        with progress(stream.count, f"measuring {', '.join(stream.names)}", done) as bar:
            while done < stream.count:
                batches, stopped = self._batches(stream, done)
                # One batch late, so that the devices work while the next one is read.
                _add(accumulators, waiting)
                waiting = batches
                for _, _, labels in batches:
                    done += len(labels)
                    bar.update(len(labels))
                if stopped or done == stream.count or timer.is_due():
                    _add(accumulators, waiting)
                    waiting = []
                    timer.save(accumulators, path)
                    if stopped:
                        raise self._stop.interruption
        distributed.wait_for_all("saved what was gathered")
        return accumulators

    def partial_path(self, stream: ImageStream, folder: Path) -> Path:
        """The file in which the statistics of a stream are saved while it is measured."""
        identity = json.dumps([stream.about, self._space.digest, self._kept], sort_keys=True)
        return folder / f".gathered-{hashlib.sha256(identity.encode()).hexdigest()[:12]}.npz"

    def _restored(self, stream: ImageStream, path: Path) -> dict[str, StatisticsAccumulator]:
        """What an earlier run has gathered, or nothing yet."""
        accumulators = self._accumulators(stream)
        if path.is_file():
            try:
                _restore(accumulators, path)
            except (InputError, KeyError, ValueError, TypeError) as error:
                log.info("evaluation: restarts, as %s cannot be read (%s)", path, error)
                return self._accumulators(stream)
        return accumulators

    def _accumulators(self, stream: ImageStream) -> dict[str, StatisticsAccumulator]:
        return {
            name: StatisticsAccumulator(
                name, self._space, stream.count, kept=self._kept, shown=stream.shown()
            )
            for name in stream.names
        }

    def _batches(self, stream: ImageStream, done: int) -> tuple[list[Measured], bool]:
        """The next batch of every process in turn, and whether to stop."""
        size = stream.batch_size
        firsts = [done + n * size for n in range(jax.process_count())]
        counts = [min(size, stream.count - first) for first in firsts if first < stream.count]
        # A process for which no batch is left repeats the last one.
        turn = min(jax.process_index(), len(counts) - 1)
        with distributed.raise_together():
            images, labels = stream.batch(firsts[turn], counts[turn])
            outputs = {name: self._outputs(images[name], size) for name in stream.names}
        if jax.process_count() == 1:
            return [(outputs, images, labels)], bool(self._stop.requested)
        padded = jax.tree.map(lambda x: np.resize(x, (size, *x.shape[1:])), (images, labels))
        *everywhere, stopped = distributed.allgather(
            (outputs, *padded, np.int32(bool(self._stop.requested)))
        )
        batches = []
        for n, count in enumerate(counts):
            outputs, images, labels = jax.tree.map(lambda x, n=n: x[n], tuple(everywhere))
            outputs = sharding.put_batch(outputs, sharding.local_mesh())
            images = {name: x[:count] for name, x in images.items()}
            batches.append((outputs, images, labels[:count]))
        return batches, bool(stopped.any())

    def _measured(self, params: Any, images: jax.Array) -> dict[str, jax.Array]:
        return self._space.apply(params, images) | {ENERGY: high_frequency_energy(images)}

    def _outputs(self, images: np.ndarray, batch_size: int) -> dict[str, jax.Array]:
        """The outputs for statistics; a short batch is padded, so that nothing is recompiled."""
        padded = images[np.arange(batch_size) % len(images)]
        return self._apply(self._params, sharding.put_batch(padded, sharding.local_mesh()))


class _SaveTimer:
    """Saves every `SAVE_SECONDS`, or more rarely if saves are slow."""

    def __init__(self):
        self._saved, self._pause = time.monotonic(), SAVE_SECONDS

    def is_due(self) -> bool:
        return time.monotonic() - self._saved > self._pause

    def save(self, accumulators: dict[str, StatisticsAccumulator], path: Path) -> None:
        began = time.monotonic()
        if distributed.is_primary():
            _save(accumulators, path)
            mounts.push()
        self._saved = time.monotonic()
        self._pause = max(SAVE_SECONDS, (self._saved - began) / SAVE_SHARE)


def _add(accumulators: dict[str, StatisticsAccumulator], batches: list[Measured]) -> None:
    for outputs, images, labels in batches:
        for name, accumulator in accumulators.items():
            accumulator.add(outputs[name], images[name], labels)


def _save(accumulators: dict[str, StatisticsAccumulator], path: Path) -> None:
    arrays = {
        f"{name}/{key}": value
        for name, accumulator in accumulators.items()
        for key, value in accumulator.state().items()
    }
    with atomic_write(path) as partial, partial.open("wb") as file:
        np.savez(file, **arrays)


def _restore(accumulators: dict[str, StatisticsAccumulator], path: Path) -> None:
    """Sets what a stopped run has gathered."""
    with Npz(path) as file:
        for name, accumulator in accumulators.items():
            prefix = f"{name}/"
            keys = [key for key in file.arrays if key.startswith(prefix)]
            accumulator.set_state({key.removeprefix(prefix): file.read(key) for key in keys})
    done, count = f"{accumulator.done:,}", f"{accumulator.count:,}"
    log.info("evaluation: resuming after %s of %s images", done, count)
