"""From images to numbers one can trust: every metric of every set, and what they were measured
with, as JSON and pictures."""

import dataclasses
import hashlib
import json
import platform
import time
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rdm_jax import __version__
from rdm_jax.config import Config, to_dict
from rdm_jax.config.validate_evaluation import is_generated, measured_sets
from rdm_jax.data.classes import Classes
from rdm_jax.data.image_sets import ImageSet
from rdm_jax.evaluation import inception
from rdm_jax.evaluation.classifier import classifier_space
from rdm_jax.evaluation.features import FeatureSpace
from rdm_jax.evaluation.generated import RelayStream, StageStream
from rdm_jax.evaluation.image_streams import ImageStream, open_stream
from rdm_jax.evaluation.references import Reference, open_references
from rdm_jax.evaluation.statistics import Statistics, StatisticsAccumulator, compare
from rdm_jax.evaluation.statistics_files import read_statistics, save_statistics
from rdm_jax.render import pictures
from rdm_jax.render.tables import PUBLISHED, result_table
from rdm_jax.runtime import distributed, sharding
from rdm_jax.runtime.console import log, progress
from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.files import atomic_write, move_aside, parse_json
from rdm_jax.runtime.npz import Npz
from rdm_jax.runtime.signals import StopOnSignal
from rdm_jax.sampling.made_with import as_written_now
from rdm_jax.sampling.pipeline import RelayPipeline
from rdm_jax.sampling.stage_preview import StagePreview

RESULT = "evaluation.json"
# What is gathered is saved so often, but for no more than a twentieth of the time.
SAVE_SECONDS = 60.0


def open_space(
    config: Config, sets: dict[str, ImageSet], workdir: Path, check_stop: Callable[[], None]
) -> FeatureSpace:
    """The features that the config asks for; a classifier that no path is given for is kept in the
    workdir."""
    values = config.evaluation
    given = Path(values.weights).expanduser() if values.weights else None
    if values.features == "inception":
        return inception.inception_space(given or inception.default_path())
    path = given or workdir / "classifier.safetensors"
    return classifier_space(
        sets["training"], sets.get("held_out"), path, train=given is None, check_stop=check_stop
    )


class Evaluator:
    """Measures sets of images against a reference; a stage's images of their own size
    ('stage1@native') against one of that size.

    Args:
      config: of the run; `evaluation` says what.
      images, held_out: of the last stage; None where the config does not need them (`needs_data`).
      workdir: of the run.
      stop: looked at after every batch; what is gathered is saved before `Interrupted` is raised.
      space: the features; None for those that the config asks for.

    Raises:
      InputError: the network that makes the features, or a set that is measured or compared with,
        is not there or cannot be used; nothing has been measured yet.
      Interrupted: the stop was asked for while the classifier was trained.
    """

    def __init__(
        self,
        config: Config,
        images: ImageSet | None,
        held_out: ImageSet | None,
        workdir: Path,
        stop: StopOnSignal,
        space: FeatureSpace | None = None,
    ):
        self._config, self._stop, self._folder = config, stop, workdir / config.evaluation.name
        self._sets = {
            name: part
            for name, part in (("training", images), ("held_out", held_out))
            if part is not None
        }
        # The classifier, which may be trained yet, is going to know the classes of what it is
        # trained on.
        known = (
            self._sets["training"].class_names if config.evaluation.features == "classifier" else ()
        )
        self._classes = Classes(space.class_names if space else known)
        given_sets = [spec for spec in measured_sets(config) if not is_generated(spec)]
        given = {spec: open_stream(spec, config, self._sets, self._classes) for spec in given_sets}
        self._space = space or distributed.primary_first(
            lambda: open_space(config, self._sets, workdir, stop.check)
        )
        self._given, self._references = given, open_references(config, self._sets, self._space)
        self._compared_with: dict[str, Statistics] = {}
        self._params = jax.device_put(
            self._space.params, sharding.replicated(sharding.local_mesh())
        )
        self._apply = jax.jit(self._space.apply)

    def run(self, relay: RelayPipeline | None) -> dict[str, Any]:
        """Measures all sets of `evaluation.images`, and leaves evaluation.json and a picture of
        each in the folder.

        Args:
          relay: what generates, for sets that are generated.

        Returns:
          What is in evaluation.json.

        Raises:
          InputError: images are not finite, or a file cannot be read any more.
          Interrupted: the stop was asked for; the same call goes on.
        """
        generated = tuple(spec for spec in measured_sets(self._config) if is_generated(spec))
        streams = [
            *self._given.values(),
            *([RelayStream(relay, generated, self._classes)] if generated else []),
        ]
        return self._measure(streams, self._folder)

    def run_stage(
        self, number: int, alone: StagePreview, params: Any, images_seen: int, folder: Path
    ) -> dict[str, float]:
        """Measures one stage during its training, unless that has been done, and leaves the same
        files as `run` in a folder.

        Returns:
          The metrics.
        """
        stream = StageStream(self._config, number, alone, params, images_seen)
        return self._measure([stream], folder)["results"][stream.names[0]]["metrics"]

    def _measure(self, streams: list[ImageStream], folder: Path) -> dict[str, Any]:
        made_with = {
            "features": {"name": self._space.name, "digest": self._space.digest},
            "kept": self._config.evaluation.kept,
            "reference": self._references[""].about,
            "images": [stream.about for stream in streams],
        }
        natives = {name for stream in streams for name in stream.names} & self._references.keys()
        if natives:
            made_with["native_references"] = {
                name: self._references[name].about for name in sorted(natives)
            }
        made_with = json.loads(json.dumps(made_with))
        result = read_result(folder / RESULT)
        done = bool(result) and _same(result["made_with"], made_with)
        distributed.check_same(
            f"what is in {folder} and measured", f"{done} {json.dumps(made_with, sort_keys=True)}"
        )
        if done:
            log.info("evaluation: already in %s\n%s", folder, result_table(result["results"]))
        else:
            if (folder / RESULT).exists() and distributed.is_primary():
                _keep_earlier(result, made_with, folder)
            result = {
                "results": self._results(streams, folder),
                "made_with": made_with,
                **_surroundings(self._config),
            }
            if distributed.is_primary():
                with atomic_write(folder / RESULT) as partial:
                    partial.write_text(json.dumps(result, indent=2, allow_nan=False))
            log.info("evaluation: -> %s\n%s", folder / RESULT, result_table(result["results"]))
        for stream in streams if distributed.is_primary() else ():
            self._partial(stream, folder).unlink(missing_ok=True)
        return result

    def _results(self, streams: list[ImageStream], folder: Path) -> dict[str, Any]:
        """Metrics of every set by its name, and its picture in the folder."""
        results = {}
        for stream in streams:
            for name, tally in self._gather(stream, folder).items():
                reference = self._reference(name if name in self._references else "")
                metrics, notes = compare(reference, tally.statistics(stream.about), self._space)
                results[name] = {
                    "images": tally.count,
                    "metrics": metrics,
                    "notes": [*notes, *stream.notes],
                }
                shown = np.stack([tally.pictures[n] for n in sorted(tally.pictures)])
                if distributed.is_primary():
                    pictures.save_picture(
                        pictures.plain_grid(shown, columns=10),
                        folder / picture_names(results)[name],
                    )
        return results

    def _reference(self, name: str) -> Statistics:
        """Of the reference of this name: read, or gathered and kept in the folder for the next
        time."""
        if name not in self._compared_with:
            self._compared_with[name] = self._read_or_gathered(self._references[name])
        return self._compared_with[name]

    def _read_or_gathered(self, reference: Reference) -> Statistics:
        stream, path, kept = reference.stream, self._folder / reference.file, None
        if stream is None:
            return reference.published
        try:
            kept = read_statistics(path, self._space) if path.is_file() else None
        except InputError as error:
            log.info("evaluation: the reference is measured again: %s", error)
        fits = kept is not None and kept.about["images"] == reference.about
        distributed.check_same(f"what is in {path}", str(fits))
        if fits:
            return kept
        (tally,) = self._gather(stream, self._folder).values()
        statistics = tally.statistics(reference.about)
        if reference.published:
            published = {
                "count": reference.published.count,
                "gaussians": reference.published.gaussians,
            }
            statistics = dataclasses.replace(statistics, **published)
        if distributed.is_primary():
            save_statistics(path, statistics, self._space)
            self._partial(stream, self._folder).unlink()
        return statistics

    def _gather(self, stream: ImageStream, folder: Path) -> dict[str, StatisticsAccumulator]:
        """Sees every image of a stream, from where an earlier run was stopped; every process its
        share, and is told the rest."""
        tallies, path = self._tallies(stream), self._partial(stream, folder)
        if path.is_file():
            try:
                _restore(tallies, path)
            except (InputError, KeyError, ValueError, TypeError) as error:
                log.info(
                    "evaluation: begins again, as what was gathered cannot be read (%s)", error
                )
                tallies = self._tallies(stream)
        done = min(tally.done for tally in tallies.values())
        distributed.check_same(f"what was gathered in {path}", str(done))
        saved, pause, waiting = time.monotonic(), SAVE_SECONDS, []

        def take() -> None:  # one batch late, so that the devices work while the next one is read
            for tally, *batch in waiting:
                tally.add(*batch)
            waiting.clear()

        with progress(stream.count, f"measuring {', '.join(stream.names)}", done) as bar:
            while done < stream.count:
                batches, stopped = self._batches(stream, done)
                take()
                for outputs, images, labels in batches:
                    waiting += [
                        (tallies[name], outputs[name], images[name], labels) for name in tallies
                    ]
                    done += len(labels)
                    bar.update(len(labels))
                if stopped or done == stream.count or time.monotonic() - saved > pause:
                    take()
                    began = time.monotonic()
                    if distributed.is_primary():
                        _save(tallies, path)
                    saved = time.monotonic()
                    pause = max(SAVE_SECONDS, 20 * (saved - began))
                    if stopped:
                        raise self._stop.interruption
        distributed.wait_for_all("saved what was gathered")
        return tallies

    def _batches(
        self, stream: ImageStream, done: int
    ) -> tuple[list[tuple[dict, dict, np.ndarray]], bool]:
        """The next batch of every process in turn: outputs and images by the name of the set,
        labels; and whether to stop."""
        size, firsts = (
            stream.batch_size,
            [done + n * stream.batch_size for n in range(jax.process_count())],
        )
        counts = [min(size, stream.count - first) for first in firsts if first < stream.count]
        turn = min(
            jax.process_index(), len(counts) - 1
        )  # where there is nothing left to do, the last one's is done again
        with distributed.raise_together():
            images, labels = stream.batch(firsts[turn], counts[turn])
            outputs = {name: self._outputs(images[name], size) for name in stream.names}
        if jax.process_count() == 1:
            return [(outputs, images, labels)], bool(self._stop.requested)
        filled = jax.tree.map(lambda x: np.resize(x, (size, *x.shape[1:])), (images, labels))
        *everywhere, stopped = distributed.allgather(
            (outputs, *filled, np.int32(bool(self._stop.requested)))
        )
        batches = []
        for n, count in enumerate(counts):
            outputs, images, labels = jax.tree.map(lambda x, n=n: x[n], tuple(everywhere))
            outputs = sharding.put_batch(outputs, sharding.local_mesh())
            batches.append(
                (outputs, {name: x[:count] for name, x in images.items()}, labels[:count])
            )
        return batches, bool(stopped.any())

    def _tallies(self, stream: ImageStream) -> dict[str, StatisticsAccumulator]:
        kwargs = {"kept": self._config.evaluation.kept, "shown": stream.shown()}
        return {
            name: StatisticsAccumulator(name, self._space, stream.count, **kwargs)
            for name in stream.names
        }

    def _partial(self, stream: ImageStream, folder: Path) -> Path:
        """Where what has been gathered of a stream is kept."""
        identity = json.dumps(
            [stream.about, self._space.digest, self._config.evaluation.kept], sort_keys=True
        )
        return folder / f".gathered-{hashlib.sha256(identity.encode()).hexdigest()[:12]}.npz"

    def _outputs(self, images: np.ndarray, batch_size: int) -> dict[str, jax.Array]:
        """What the feature space says of images; a short batch is filled up, so that nothing is
        compiled again."""
        padded = images[np.arange(batch_size) % len(images)]
        return self._apply(self._params, sharding.put_batch(padded, sharding.local_mesh()))


def generates(config: Config) -> bool:
    """Whether an evaluation measures what the stages make."""
    return any(map(is_generated, measured_sets(config)))


def needs_data(config: Config) -> bool:
    """Whether an evaluation needs the config's own images."""
    values = config.evaluation
    named = {*measured_sets(config), values.reference, values.native_reference}
    return values.features == "classifier" or not {"training", "held_out"}.isdisjoint(named)


def _same(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether two evaluations were made with the same; the old one may be of an earlier version of
    this project."""
    return {**old, "images": [as_written_now(about) for about in old.get("images", [])]} == new


def _keep_earlier(result: dict[str, Any] | None, made_with: dict[str, Any], folder: Path) -> None:
    """Moves the results that are in a folder, made with something else or damaged, out of the way
    of new ones."""
    names = list(picture_names(result["results"]).values()) if result else []
    if result and result["made_with"]["reference"] != made_with["reference"]:
        names += sorted(path.name for path in folder.glob("reference*.npz"))
    kept = move_aside(folder, [*names, RESULT])
    log.info(
        "evaluation: what %s has is of something else, or damaged, and is kept in %s",
        folder / RESULT,
        kept,
    )


def picture_names(names: Iterable[str]) -> dict[str, str]:
    """What the picture of each set is called: its name without what no file's should have, and no
    two alike."""
    found: dict[str, str] = {}
    for name in names:
        plain = "".join(c if c.isalnum() or c in "-_" else "_" for c in name)[-80:]
        found[name] = (
            f"{plain}-{len(found) + 1}.png" if f"{plain}.png" in found.values() else f"{plain}.png"
        )
    return found


def read_result(path: Path) -> dict[str, Any] | None:
    """What an evaluation has written; None where there is none, or only a damaged one."""
    try:
        result = parse_json(path.read_text())
        for row in result["results"].values():
            result_table({"": row})
        made_with, published = result["made_with"], result["published"]
        whole = isinstance(made_with["features"]["name"], str) and isinstance(
            made_with["reference"], dict
        )
        return (
            result
            if whole and {*PUBLISHED, "where"} <= published.keys() and result["versions"].items()
            else None
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _surroundings(config: Config) -> dict[str, Any]:
    libraries = {name: version(name) for name in ("jax", "flax", "numpy", "pillow")}
    versions = {"rdm_jax": __version__, "python": platform.python_version(), **libraries}
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    return {
        "published": to_dict(config)["evaluation"]["published"],
        "versions": versions,
        "devices": device,
    }


def _save(tallies: dict[str, StatisticsAccumulator], path: Path) -> None:
    arrays = {
        f"{name}/{key}": value
        for name, tally in tallies.items()
        for key, value in tally.state().items()
    }
    with atomic_write(path) as partial, partial.open("wb") as file:
        np.savez(file, **arrays)


def _restore(tallies: dict[str, StatisticsAccumulator], path: Path) -> None:
    """Sets what a stopped run has gathered."""
    with Npz(path) as file:
        for name, tally in tallies.items():
            tally.set_state(
                {
                    key.removeprefix(f"{name}/"): file.read(key)
                    for key in file.arrays
                    if key.startswith(f"{name}/")
                }
            )
    log.info("evaluation: going on from %s of %s images", f"{tally.done:,}", f"{tally.count:,}")
