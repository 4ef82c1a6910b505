"""The relay itself: the stages run one after the other, from seeds to images on disk."""

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rdm_jax import sharding
from rdm_jax.checks import parse_seeds
from rdm_jax.config import Config, to_dict
from rdm_jax.data.pipeline import PreparedImages
from rdm_jax.errors import InputError
from rdm_jax.interrupt import StopOnSignal
from rdm_jax.sampling import pictures
from rdm_jax.sampling.sampler import StageSampler, evaluations, stage_sampler, to_uint8
from rdm_jax.terminal import log, progress
from rdm_jax.training import checkpoint
from rdm_jax.training.loop import build_network
from rdm_jax.training.step import to_float

COLUMNS = 3  # examples a row of the grid


def make_samplers(config: Config, source: PreparedImages) -> list[StageSampler]:
    """The sampler of every stage; each compiles when it is first used."""
    channels, classes = source.image_shape[-1], len(source.class_names)
    return [
        stage_sampler(
            stage,
            build_network(stage, source),
            number=number,
            channels=channels,
            classes=classes,
            run_seed=config.seed,
        )
        for number, stage in enumerate(config.stages, 1)
    ]


class Relay:
    """All stages with their averaged parameters, ready to sample.

    Args:
      config: of the run; each stage's `checkpoint` says what to load.
      source: the prepared images, for their size and classes.
      workdir: of the run.

    Raises:
      InputError: a checkpoint is missing, damaged or of another network.
    """

    def __init__(self, config: Config, source: PreparedImages, workdir: Path):
        self.config, self.classes = config, len(source.class_names)
        self.mesh = sharding.data_mesh()
        self._samplers = make_samplers(config, source)
        self.params, self.checkpoints = [], []
        for number, stage in enumerate(config.stages, 1):
            folder, step = checkpoint.find(stage.checkpoint, workdir / f"stage{number}" / "checkpoints")
            abstract = jax.eval_shape(build_network(stage, source).init, jax.random.key(0))
            abstract = checkpoint.with_sharding(abstract, sharding.replicated(self.mesh))
            checkpoints = checkpoint.Checkpoints(folder, read_only=True)
            params, about = checkpoints.restore_ema(step, abstract)
            checkpoints.close()
            self.params.append(params)
            _check_same_stage(config, number, source, folder / str(step), about)
            self.checkpoints.append({"step": step, "validation_loss": about["validation_loss"]})
            if "/" in stage.checkpoint:
                self.checkpoints[-1]["folder"] = str(folder.resolve())

    def labels(self, seeds: np.ndarray) -> np.ndarray:
        """The classes of seeds, int32: the chosen classes in turn; -1 where the images have none."""
        classes = np.asarray(self.config.sampling.classes or range(self.classes), np.int32)
        return classes[seeds % len(classes)] if self.classes else np.full(len(seeds), -1, np.int32)

    def sample(self, seeds: np.ndarray) -> list[np.ndarray]:
        """The images of every stage, uint8 NHWC, for any number of seeds up to the batch size.

        A short batch is filled up, so that nothing is compiled again.
        """
        batch_size = self.config.sampling.batch_size
        padded = np.resize(seeds, batch_size)
        seeds_and_labels = sharding.put_batch((padded.astype(np.uint32), self.labels(padded)), self.mesh)
        images, low = [], None
        for sampler, params in zip(self._samplers, self.params, strict=True):
            low = sampler(params, low, seeds_and_labels[1], seeds_and_labels[0])
            images.append(np.asarray(to_uint8(low))[: len(seeds)])
        return images


def _check_same_stage(config: Config, number: int, source: PreparedImages, path: Path, about: dict[str, Any]) -> None:
    """Refuses a checkpoint that was trained to compute something else, though its arrays may have the right shapes."""
    ours = json.loads(json.dumps(to_dict(config)[f"stage{number}"]))
    for part in ("network", "precondition", "process"):
        for field in sorted(ours[part].keys() | about["stage"][part].keys()):
            was, now = about["stage"][part].get(field), ours[part].get(field)
            if was != now and field not in ("dropout", "dtype"):
                name = f"config.stage{number}.{part}.{field}"
                raise InputError(f"{name}={now!r}, but checkpoint {path} is of another network ({was!r}); {was!r} would do.")
    if about["classes"] != list(source.class_names):
        raise InputError(f"checkpoint {path} knows the classes {about['classes']}; data with these would do.")


def describe(config: Config, relay: Relay) -> dict[str, Any]:
    """All that the images depend on, as JSON: what the samples were made with."""
    values = to_dict(config)
    stages = {
        name: {k: values[name][k] for k in ("resolution", "process", "sampler", "guidance", "network", "precondition")}
        for name in (f"stage{i + 1}" for i in range(len(config.stages)))
    }
    sampling = {k: v for k, v in values["sampling"].items() if k not in ("name", "batch_size")}
    return json.loads(json.dumps({"seed": config.seed, "sampling": sampling, "stages": stages, "checkpoints": relay.checkpoints}))


def sample_to_files(config: Config, source: PreparedImages, workdir: Path, stop: StopOnSignal) -> None:
    """Samples every configured seed and leaves, under workdir/<sampling.name>:

    samples.npz ('images' uint8 NHWC, 'labels', 'seeds', and 'stage1', ... uint8), grid.png, and samples.json (what they were
    made with). Finished batches are kept in a folder beside them until all are there, so that an interrupted run goes on.

    Raises:
      InputError: a checkpoint cannot be used.
      Interrupted: a signal came; the batches done so far are kept.
    """
    folder, relay = workdir / config.sampling.name, Relay(config, source, workdir)
    made_with, seeds = describe(config, relay), np.asarray(parse_seeds(config.sampling.seeds), np.int64)
    if _is_done(folder, made_with):
        log.info("samples: %d images are already in %s", len(seeds), folder)
        return
    for number, stage in enumerate(config.stages, 1):
        about = (number, relay.checkpoints[number - 1]["step"], evaluations(stage), stage.guidance)
        log.info("samples: stage%d from step %d, %d network evaluations an image, guidance %g", *about)
    began = time.perf_counter()
    stages = _sample_in_parts(relay, seeds, folder / f".parts-{_digest(made_with)}", stop)
    seconds = time.perf_counter() - began
    arrays = {"images": stages[-1], "labels": relay.labels(seeds), "seeds": seeds}
    arrays.update({f"stage{i + 1}": images for i, images in enumerate(stages[:-1])})
    (folder / "samples.json").unlink(missing_ok=True)  # it vouches for the others, so it comes last
    _save_npz(folder / "samples.npz", arrays)
    pictures.save_picture(_draw(stages, arrays["labels"], source), folder / "grid.png")
    partial = folder / "samples.incomplete"
    partial.write_text(json.dumps(made_with, indent=2))
    partial.replace(folder / "samples.json")
    for part in folder.glob(".parts-*/*"):
        part.unlink()
    for parts in folder.glob(".parts-*"):
        parts.rmdir()
    log.info("samples: %d images in %.1f s (compilation included) -> %s", len(seeds), seconds, folder)


def _is_done(folder: Path, made_with: dict[str, Any]) -> bool:
    files = [folder / name for name in ("samples.npz", "grid.png", "samples.json")]
    if not all(file.is_file() for file in files):
        return False
    try:
        return json.loads(files[-1].read_text()) == made_with
    except json.JSONDecodeError:
        return False


def _digest(made_with: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(made_with, sort_keys=True).encode()).hexdigest()[:12]


def _save_npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes an npz, whole or not at all."""
    partial = path.with_name(f".{path.name}.incomplete")
    with partial.open("wb") as file:
        np.savez_compressed(file, **arrays)
    partial.replace(path)


def _sample_in_parts(relay: Relay, seeds: np.ndarray, folder: Path, stop: StopOnSignal) -> list[np.ndarray]:
    """Samples batch by batch; a batch whose file is there already is read instead of made."""
    folder.mkdir(parents=True, exist_ok=True)
    batch_size, parts = relay.config.sampling.batch_size, []
    with progress(len(seeds), "sampling") as bar:
        for first in range(0, len(seeds), batch_size):
            some = seeds[first : first + batch_size]
            path = folder / f"{first:010d}-{len(some)}.npz"
            if not path.exists():
                stages = relay.sample(some)
                _save_npz(path, {f"stage{i}": images for i, images in enumerate(stages)})
            with np.load(path) as part:
                parts.append([part[f"stage{i}"] for i in range(len(part.files))])
            bar.update(len(some))
            stop.check()
    return [np.concatenate(images) for images in zip(*parts, strict=True)]


def _draw(stages: list[np.ndarray], labels: np.ndarray, source: PreparedImages):
    """A row a class, or ten rows where there are no classes."""
    names = dict(enumerate(source.class_names))
    if names:
        rows = [(names[c], np.flatnonzero(labels == c)[:COLUMNS].tolist()) for c in sorted(set(labels.tolist()))]
    else:
        rows = [("", list(range(i, min(i + COLUMNS, len(labels))))) for i in range(0, min(len(labels), 10 * COLUMNS), COLUMNS)]
    shown = sorted({number for _, numbers in rows for number in numbers})
    place = {number: i for i, number in enumerate(shown)}
    images = [stage[shown] for stage in stages]
    nearest, _ = pictures.nearest_real(images[-1], source)
    return pictures.relay_grid(images, nearest, [(name, [place[n] for n in numbers]) for name, numbers in rows])


def make_preview(config: Config, number: int, source: PreparedImages):
    """A function (params, path) that draws samples of one stage during its training.

    A relay stage starts from real images' means, so that its picture does not depend on the stages before it.
    """
    sampler, stage = make_samplers(config, source)[number - 1], config.stages[number - 1]
    batch_size, classes, mesh = config.sampling.batch_size, len(source.class_names), sharding.data_mesh()
    seeds = np.arange(batch_size)
    labels, low = (seeds % classes).astype(np.int32) if classes else np.full(batch_size, -1, np.int32), None
    if number > 1:
        real = source.batch(np.linspace(0, len(source) - 1, batch_size).astype(int))  # of all classes, if it is sorted
        labels, pool = real["label"], source.image_shape[0] // config.stages[number - 2].resolution[0]
        low = sharding.put_batch(np.asarray(to_float(jnp.asarray(real["image"]), pool)), mesh)
    seeds, labels = sharding.put_batch((seeds.astype(np.uint32), labels), mesh)

    def preview(params: Any, path: Path) -> None:
        images = np.asarray(to_uint8(sampler(params, low, labels, seeds)))
        pictures.save_picture(pictures.plain_grid(images, columns=10), path)

    log.info("stage%d: previews of %d samples, %d network evaluations an image", number, batch_size, evaluations(stage))
    return preview
