"""From images to numbers one can trust: every metric of every set, and what they were measured with, as JSON and pictures."""

import functools
import hashlib
import json
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rdm_jax import __version__, sharding
from rdm_jax.config import Config, to_dict
from rdm_jax.data.image_sets import ImageSet
from rdm_jax.errors import InputError
from rdm_jax.evaluation import inception
from rdm_jax.evaluation.classifier import classifier_space
from rdm_jax.evaluation.features import FeatureSpace
from rdm_jax.evaluation.generated import RelayStream, StageStream
from rdm_jax.evaluation.npz import Npz
from rdm_jax.evaluation.statistics import Statistics, Tally, compare, read_statistics, save_statistics
from rdm_jax.evaluation.streams import NpzStream, Stream, open_stream
from rdm_jax.evaluation.tables import result_table
from rdm_jax.files import whole_file
from rdm_jax.interrupt import StopOnSignal
from rdm_jax.sampling import pictures
from rdm_jax.sampling.preview import StageAlone
from rdm_jax.sampling.relay import Relay
from rdm_jax.terminal import log, progress

RESULT = "evaluation.json"
# What is gathered is saved so often, but for no more than a twentieth of the time.
SAVE_SECONDS = 60.0


def open_space(config: Config, sets: dict[str, ImageSet], workdir: Path) -> FeatureSpace:
    """The features that the config asks for; a classifier that no path is given for is kept in the workdir."""
    values = config.evaluation
    given = Path(values.weights).expanduser() if values.weights else None
    if values.features == "inception":
        return inception.inception_space(given or inception.default_path())
    path = given or workdir / "classifier.safetensors"
    return classifier_space(sets["training"], sets.get("held_out"), path, train=given is None)


class Evaluator:
    """Measures sets of images against one reference.

    Args:
      config: of the run; `evaluation` says what.
      images, held_out: of the last stage; None where the config does not need them (`needs_data`).
      workdir: of the run.
      stop: looked at after every batch; what is gathered is saved before `Interrupted` is raised.
      space: the features; None for those that the config asks for.

    Raises:
      InputError: the network that makes the features is not there, or cannot be used.
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
        self._sets = {name: part for name, part in (("training", images), ("held_out", held_out)) if part is not None}
        self._space = space or open_space(config, self._sets, workdir)
        self._params = jax.device_put(self._space.params, sharding.replicated(sharding.data_mesh()))
        self._apply = jax.jit(self._space.apply)

    def run(self, relay: Relay | None) -> dict[str, Any]:
        """Measures all sets of `evaluation.images`, and leaves evaluation.json and a picture of each in the folder.

        Args:
          relay: what generates, for sets that are generated.

        Returns:
          What is in evaluation.json.
        """
        specs = _specs(self._config)
        generated = tuple(filter(_is_generated, specs))
        streams = [open_stream(spec, self._config, self._sets) for spec in specs if spec not in generated]
        streams += [RelayStream(relay, generated)] if generated else []
        return self._measure(streams, self._folder)

    def run_stage(self, number: int, alone: StageAlone, params: Any, images_seen: int, folder: Path) -> dict[str, float]:
        """Measures one stage during its training, unless that has been done, and leaves the same files as `run` in a folder.

        Returns:
          The metrics.
        """
        done = read_result(folder / RESULT)
        if done:
            return done["results"][f"stage{number}"]["metrics"]
        stream = StageStream(self._config, number, alone, params, images_seen)
        return self._measure([stream], folder)["results"][f"stage{number}"]["metrics"]

    def _measure(self, streams: list[Stream], folder: Path) -> dict[str, Any]:
        made_with = {
            "features": {"name": self._space.name, "digest": self._space.digest},
            "kept": self._config.evaluation.kept,
            "reference": self._reference.about,
            "images": [stream.about for stream in streams],
        }
        made_with = json.loads(json.dumps(made_with))
        earlier = read_result(folder / RESULT)
        if earlier and earlier["made_with"] == made_with:
            log.info("evaluation: already in %s\n%s", folder, result_table(earlier["results"]))
            return earlier
        began, results = time.perf_counter(), {}
        for stream in streams:
            for name, tally in self._gather(stream, folder).items():
                metrics, notes = compare(self._reference, tally.statistics(stream.about), self._space)
                results[name] = {"images": tally.count, "metrics": metrics, "notes": notes}
                shown = [tally.pictures[n] for n in sorted(tally.pictures)]
                pictures.save_picture(pictures.plain_grid(np.stack(shown), columns=10), folder / f"{picture_name(name)}.png")
        seconds = time.perf_counter() - began
        result = {"results": results, "made_with": made_with, "seconds": seconds, **_surroundings(self._config)}
        with whole_file(folder / RESULT) as partial:
            partial.write_text(json.dumps(result, indent=2))
        for partial in folder.glob(".gathered-*.npz"):
            partial.unlink()
        log.info("evaluation: %.1f s -> %s\n%s", seconds, folder / RESULT, result_table(results))
        return result

    @functools.cached_property
    def _reference(self) -> Statistics:
        """Of the reference: read, or gathered and kept in the folder for the next time."""
        spec, path = self._config.evaluation.reference, self._folder / "reference.npz"
        if spec.startswith("npz:"):
            return self._published(Path(spec.removeprefix("npz:")).expanduser())
        stream = open_stream(spec, self._config, self._sets)
        if path.is_file():
            try:
                statistics = read_statistics(path, self._space)
                if statistics.about["images"] == stream.about | {"kept": self._config.evaluation.kept}:
                    return statistics
            except InputError as error:
                log.info("evaluation: the reference is measured again: %s", error)
        about = stream.about | {"kept": self._config.evaluation.kept}
        (tally,) = self._gather(stream, self._folder).values()
        save_statistics(path, tally.statistics(about), self._space)
        self._partial(stream, self._folder).unlink()
        return read_statistics(path, self._space)

    def _published(self, path: Path) -> Statistics:
        """Statistics of others; where images are beside them, as in ADM's files, their features are what is compared with."""
        statistics = read_statistics(path, self._space)
        with Npz(path) as file:
            has_images = "arr_0" in file.arrays
        if statistics.features is not None or not has_images:
            return statistics
        shape = (*self._config.stages[-1].resolution, self._config.data.channels)
        stream = NpzStream("reference", path, shape, self._config.evaluation.batch_size)
        (tally,) = self._gather(stream, self._folder).values()
        features = tally.statistics({}).features
        return Statistics(statistics.about, statistics.count, statistics.gaussians, features)

    def _gather(self, stream: Stream, folder: Path) -> dict[str, Tally]:
        """Sees every image of a stream, from where an earlier run was stopped."""
        kept, shown = self._config.evaluation.kept, stream.shown()
        tallies = {name: Tally(self._space, stream.count, kept=kept, shown=shown) for name in stream.names}
        path = self._partial(stream, folder)
        done = _restore(tallies, path)
        saved, pause = time.monotonic(), SAVE_SECONDS
        with progress(stream.count, f"measuring {', '.join(stream.names)}", done) as bar:
            while done < stream.count:
                here = min(stream.batch_size, stream.count - done)
                images, labels = stream.batch(done, here)
                for name, tally in tallies.items():
                    tally.add(self._outputs(images[name], stream.batch_size), images[name], labels)
                done += here
                bar.update(here)
                if self._stop.requested or done == stream.count or time.monotonic() - saved > pause:
                    began = time.monotonic()
                    _save(tallies, path)
                    saved = time.monotonic()
                    pause = max(SAVE_SECONDS, 20 * (saved - began))
                    self._stop.check()
        return tallies

    def _partial(self, stream: Stream, folder: Path) -> Path:
        """Where what has been gathered of a stream is kept."""
        identity = json.dumps([stream.about, self._space.digest, self._config.evaluation.kept], sort_keys=True)
        return folder / f".gathered-{hashlib.sha256(identity.encode()).hexdigest()[:12]}.npz"

    def _outputs(self, images: np.ndarray, batch_size: int) -> dict[str, jax.Array]:
        """What the feature space says of images; a short batch is filled up, so that nothing is compiled again."""
        padded = images[np.arange(batch_size) % len(images)]
        return self._apply(self._params, sharding.put_batch(padded, sharding.data_mesh()))


def generates(config: Config) -> bool:
    """Whether an evaluation measures what the stages make."""
    return any(map(_is_generated, _specs(config)))


def needs_data(config: Config) -> bool:
    """Whether an evaluation needs the config's own images."""
    values = config.evaluation
    return values.features == "classifier" or not {"training", "held_out"}.isdisjoint([*_specs(config), values.reference])


def _specs(config: Config) -> list[str]:
    return [spec.strip() for spec in config.evaluation.images.split(",")]


def _is_generated(spec: str) -> bool:
    return spec == "samples" or spec.startswith("stage")


def picture_name(name: str) -> str:
    """What the picture of a set is called: its spec without what no file name should have."""
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in name)[-80:]


def read_result(path: Path) -> dict[str, Any] | None:
    """What an evaluation has written; None where there is none, or only a damaged one."""
    try:
        result = json.loads(path.read_text())
        return result if {"results", "made_with"} <= result.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def _surroundings(config: Config) -> dict[str, Any]:
    libraries = {name: version(name) for name in ("jax", "flax", "numpy", "pillow")}
    versions = {"rdm_jax": __version__, "python": platform.python_version(), **libraries}
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    return {"published": to_dict(config)["evaluation"]["published"], "versions": versions, "devices": device}


def _save(tallies: dict[str, Tally], path: Path) -> None:
    arrays = {f"{name}/{key}": value for name, tally in tallies.items() for key, value in tally.state().items()}
    with whole_file(path) as partial, partial.open("wb") as file:
        np.savez(file, **arrays)


def _restore(tallies: dict[str, Tally], path: Path) -> int:
    """Sets what a stopped run has gathered, and returns how many images that was."""
    if not path.is_file():
        return 0
    with Npz(path) as file:
        for name, tally in tallies.items():
            tally.set_state({key.removeprefix(f"{name}/"): file.read(key) for key in file.arrays if key.startswith(f"{name}/")})
    done = next(iter(tallies.values())).done
    log.info("evaluation: going on from %s of %s images", f"{done:,}", f"{next(iter(tallies.values())).count:,}")
    return done
