"""Measures sets of images: every metric of every set, with what they depend on, as JSON."""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rdm_jax.config import Config
from rdm_jax.config.validate_evaluation import is_generated, measured_sets
from rdm_jax.data.classes import Classes
from rdm_jax.data.image_sets import ImageSet
from rdm_jax.evaluation import efficientnet_weights, inception_weights
from rdm_jax.evaluation.classifier import check_trainable, classifier_space
from rdm_jax.evaluation.features import FeatureSpace
from rdm_jax.evaluation.gathering import Gatherer
from rdm_jax.evaluation.generated import RelayStream, StageStream
from rdm_jax.evaluation.image_streams import ImageStream, open_stream
from rdm_jax.evaluation.references import Reference, of_files, open_references
from rdm_jax.evaluation.result_files import (
    RESULT,
    environment,
    keep_earlier,
    picture_names,
    read_result,
    same_made_with,
)
from rdm_jax.evaluation.retrieval import retrieval
from rdm_jax.evaluation.statistics import (
    Statistics,
    StatisticsAccumulator,
    compare,
    kept_indices,
)
from rdm_jax.evaluation.statistics_files import read_statistics, save_statistics
from rdm_jax.render import pictures
from rdm_jax.render.tables import result_table
from rdm_jax.runtime import distributed
from rdm_jax.runtime.console import log
from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.files import atomic_write
from rdm_jax.runtime.signals import StopOnSignal
from rdm_jax.sampling.pipeline import RelayPipeline
from rdm_jax.sampling.stage_preview import StagePreview
from rdm_jax.workdir import Workdir


def open_space(
    config: Config, sets: dict[str, ImageSet], workdir: Path, check_stop: Callable[[], None]
) -> FeatureSpace:
    """The features that the config selects.

    A classifier without a configured path is trained once and kept in the workdir.

    Raises:
      InputError: the weights are missing or cannot be used.
      Interrupted: a signal came while the classifier was trained.
    """
    values = config.evaluation
    weights = Path(values.weights).expanduser() if values.weights else None
    if values.features == "inception":
        return inception_weights.inception_space(weights or inception_weights.default_path())
    if values.features == "efficientnet":
        return efficientnet_weights.efficientnet_space(
            weights or efficientnet_weights.default_path()
        )
    path = weights or Workdir(workdir).classifier
    return classifier_space(
        sets["training"], sets.get("held_out"), path, train=weights is None, check_stop=check_stop
    )


class Evaluator:
    """Measures sets of images against a reference.

    Images of a stage at its own resolution ('stage1@native') are compared with a reference of that
    resolution.

    Args:
      config: of the run; `evaluation` selects the sets, the reference and the features.
      images, held_out: of the last stage; None if the config does not need them (`needs_data`).
      workdir: of the run.
      stop: checked after every batch; what is gathered is saved before `Interrupted` is raised.
      space: the features; None for those that the config selects.

    Raises:
      InputError: the weights of the features, a set or a reference are missing or cannot be used.
        Nothing has been measured then.
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
        self._config = config
        self._folder = Workdir(workdir).evaluation(config)
        self._samples = Workdir(workdir).samples(config)
        sets = {"training": images, "held_out": held_out}
        self._sets = {name: part for name, part in sets.items() if part is not None}
        # A classifier, which may not be trained yet, knows the classes of its training set.
        of_classifier = config.evaluation.features == "classifier"
        known = self._sets["training"].class_names if of_classifier else ()
        self._classes = Classes(space.class_names if space else known)
        self._given = {
            spec: open_stream(spec, config, self._sets, self._classes)
            for spec in measured_sets(config)
            if not is_generated(spec)
        }
        self._given_space, self._workdir, self._stop = space, workdir, stop
        self._compared_with: dict[str, Statistics] = {}
        own = of_classifier and space is None and not config.evaluation.weights
        later = own and not of_files(config)
        if later:  # what the run trains itself it trains when it measures, after the first steps
            check_trainable(self._sets["training"])
        self._references = open_references(config, self._sets, None if later else self._space)

    @functools.cached_property
    def _space(self) -> FeatureSpace:
        return self._given_space or distributed.primary_first(
            "opens or trains the network of the features",
            lambda: open_space(self._config, self._sets, self._workdir, self._stop.check),
        )

    @functools.cached_property
    def _gatherer(self) -> Gatherer:
        return Gatherer(self._space, self._config.evaluation.kept, self._stop)

    def run(self, relay: RelayPipeline | None) -> dict[str, Any]:
        """Measures the sets of `evaluation.images`; writes evaluation.json and a picture of each.

        Samples of the same settings that the workdir has are used; else they are generated.

        Args:
          relay: the pipeline, for generated sets.

        Returns:
          The content of evaluation.json.

        Raises:
          InputError: images are not finite, or a file cannot be read any more.
          Interrupted: a signal came; the same call resumes.
        """
        streams = [*self._given.values()]
        generated = tuple(spec for spec in measured_sets(self._config) if is_generated(spec))
        if generated:
            streams.append(RelayStream(relay, generated, self._classes, self._samples))
        return self._measure(streams, self._folder)

    def run_stage(
        self, number: int, alone: StagePreview, params: Any, images_seen: int, folder: Path
    ) -> dict[str, float]:
        """Measures one stage during its training, unless that is done.

        Args:
          number: of the stage, from 1.
          alone: samples the stage.
          params: of the stage.
          images_seen: in training so far.
          folder: gets the same files as `run` writes.

        Returns:
          The metrics.
        """
        stream = StageStream(self._config, number, alone, params, images_seen)
        return self._measure([stream], folder)["results"][stream.names[0]]["metrics"]

    def _measure(self, streams: list[ImageStream], folder: Path) -> dict[str, Any]:
        """Measures streams, unless the folder has their results."""
        made_with = self._made_with(streams)
        distributed.check_same("what is measured", json.dumps(made_with, sort_keys=True))
        result = distributed.primary_alone(
            "reads earlier results", lambda: read_result(folder / RESULT)
        )
        if result and same_made_with(result["made_with"], made_with):
            log.info("evaluation: already in %s\n%s", folder, result_table(result["results"]))
        else:
            with _by_primary("sets earlier results aside") as here:
                if here and (folder / RESULT).exists():
                    keep_earlier(result, made_with, folder)
            results = self._results(streams, folder)
            result = {"results": results, "made_with": made_with, **environment(self._config)}
            with _by_primary("writes the results") as here:
                if here:
                    with atomic_write(folder / RESULT) as partial:
                        partial.write_text(json.dumps(result, indent=2, allow_nan=False))
            log.info("evaluation: -> %s\n%s", folder / RESULT, result_table(result["results"]))
        for stream in streams:
            self._gatherer.remove_saved(stream, folder)
        return result

    def _made_with(self, streams: list[ImageStream]) -> dict[str, Any]:
        """All that the metrics depend on, as JSON."""
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
        return json.loads(json.dumps(made_with))

    def _results(self, streams: list[ImageStream], folder: Path) -> dict[str, Any]:
        """The metrics of every set by its name; writes a picture of each."""
        results = {}
        for stream in streams:
            for name, gathered in self._gatherer.gather(stream, folder).items():
                kind = name if name in self._references else ""
                reference = self._reference(kind)
                results[name] = distributed.primary_alone(
                    f"compares {name}",
                    functools.partial(self._compared, stream, gathered, kind, reference),
                )
                with _by_primary("draws a picture") as here:
                    if here:
                        path = folder / picture_names(results)[name]
                        pictures.save_picture(_grid(gathered.pictures, stream), path)
        return results

    def _compared(
        self,
        stream: ImageStream,
        gathered: StatisticsAccumulator,
        kind: str,
        reference: Statistics | None,
    ) -> dict[str, Any]:
        """The row of a set in evaluation.json."""
        statistics = gathered.statistics(stream.about)
        metrics, notes = compare(reference, statistics, self._space)
        captions = stream.captions(gathered.kept)
        found, more = self._retrieval(kind, statistics.features, captions)
        return {
            "images": gathered.count,
            "metrics": metrics | found,
            "notes": [*notes, *more, *stream.notes],
        }

    def _retrieval(
        self, kind: str, features: np.ndarray, captions: list[str] | None
    ) -> tuple[dict[str, float], list[str]]:
        """The retrieval by caption of images with these features, if the reference has captions."""
        stream, reference = self._references[kind].stream, self._reference(kind)
        if captions is None or stream is None or reference.features is None:
            return {}, []
        theirs = stream.captions(kept_indices(stream.count, self._config.evaluation.kept))
        return retrieval(reference.features, theirs, features, captions) if theirs else ({}, [])

    def _reference(self, name: str) -> Statistics | None:
        """The statistics of a reference, read or gathered once; maybe None but in process 0."""
        if name not in self._compared_with:
            self._compared_with[name] = self._read_or_gathered(self._references[name])
        return self._compared_with[name]

    def _read_or_gathered(self, reference: Reference) -> Statistics | None:
        """Statistics from a published file, from the folder, or gathered and kept in the folder.

        Only process 0 needs them, and decides whether the folder has any; others may get None.
        """
        stream, path = reference.stream, self._folder / reference.file
        if stream is None:
            return reference.published
        with _by_primary("reads a reference") as here:
            kept = self._kept(reference) if here else None
        if distributed.from_primary(kept is not None):
            return kept
        (gathered,) = self._gatherer.gather(stream, self._folder).values()
        statistics = None
        with _by_primary("saves a reference") as here:
            if here:
                statistics = gathered.statistics(reference.about)
                if reference.published:
                    statistics = dataclasses.replace(
                        statistics,
                        count=reference.published.count,
                        gaussians=reference.published.gaussians,
                    )
                save_statistics(path, statistics, self._space)
        self._gatherer.remove_saved(stream, self._folder)
        return statistics

    def _kept(self, reference: Reference) -> Statistics | None:
        """The statistics of a reference's images in the folder, if there are any."""
        path = self._folder / reference.file
        try:
            kept = read_statistics(path, self._space) if path.is_file() else None
        except InputError as error:
            log.info("evaluation: the reference is measured again: %s", error)
            return None
        return kept if kept is not None and kept.about["images"] == reference.about else None


@contextlib.contextmanager
def _by_primary(does: str) -> Iterator[bool]:
    """A context that fails in all processes if process 0 fails. Yields whether this is that."""
    with distributed.raise_together(f"process 0, which {does}"):
        yield distributed.is_primary()


def _grid(shown: dict[int, np.ndarray], stream: ImageStream) -> Image.Image:
    """A picture of a stream's images, by their indices."""
    indices = np.asarray(sorted(shown))
    images = np.stack([shown[i] for i in indices.tolist()])
    return pictures.plain_grid(images, columns=10, captions=stream.texts_below(indices))


def generates(config: Config) -> bool:
    """Whether an evaluation measures images that the stages generate."""
    return any(map(is_generated, measured_sets(config)))


def needs_data(config: Config) -> bool:
    """Whether an evaluation needs the config's own images."""
    values = config.evaluation
    named = {*measured_sets(config), values.reference, values.native_reference}
    return values.features == "classifier" or not {"training", "held_out"}.isdisjoint(named)
