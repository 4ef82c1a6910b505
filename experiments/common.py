"""What the experiments share: variants of a config, trained and measured by the project's own
runs."""

import bisect
import dataclasses
import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from PIL import Image

from rdm_jax.config import Config, Stage, kind_of, validate
from rdm_jax.data.image_sets import ImageSet
from rdm_jax.diffusion.pixels import Pixels
from rdm_jax.render import pictures
from rdm_jax.render.tables import cell
from rdm_jax.run import run
from rdm_jax.runtime.compile_cache import keep_compiled
from rdm_jax.runtime.console import quiet_libraries, show_log
from rdm_jax.stage_datasets import open_sets

COLUMNS = ("fid", "frechet_distance", "kid", "accuracy", "precision", "recall")


def start() -> None:
    """What every experiment begins with: a log of this project's lines alone, and a place for what
    is compiled."""
    show_log()
    quiet_libraries()
    keep_compiled()


def check_relay(config: Config) -> None:
    """Refuses what is no relay of two stages, or cannot work. Raises InputError."""
    validate.check_config(config)
    kinds = [kind_of(type(stage.process)) for stage in config.stages]
    validate.require(
        kinds[1:] == ["relay"], "--config", kinds, "a config of two stages, the second a relay,"
    )


def with_evaluation(config: Config, **fields) -> Config:
    """The config with other fields of its evaluation."""
    return dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, **fields))


def prepared(config: Config, root: Path) -> tuple[Config, ImageSet, dict[str, float]]:
    """Prepares the data, and measures real images that were held out, in the folder `floor`.

    Returns:
      The config, whose runs share the floor's reference and, if there is one, its classifier; the
      images held out; their metrics.

    Raises:
      InputError: the config holds no images out, or says nothing of the features to measure with.
    """
    validate.check_config(config)
    validate.require(
        config.data.held_out, "config.data.held_out", config.data.held_out, "more than 0"
    )
    metrics = measured(config, root, "floor", "held_out")
    config = with_evaluation(config, reference=f"npz:{root / 'floor' / 'reference.npz'}")
    if config.evaluation.features == "classifier" and not config.evaluation.weights:
        config = with_evaluation(config, weights=str(root / "classifier.safetensors"))
    held_out = open_sets(config, [len(config.stages)])[len(config.stages)].split(
        config.data.held_out
    )[1]
    return config, held_out, metrics


def trained(config: Config, workdir: Path, number: int) -> Path:
    """Trains stage `number` in a workdir, unless that is done, without previews and evaluations.

    Returns:
      The folder of its last checkpoint.
    """
    config = config.with_stage(number, training={"preview_every": 0, "evaluate_every": 0})
    run(config.to_config_dict(), str(workdir), mode="train", stage=number)
    return workdir / f"stage{number}" / "checkpoints" / str(config.stage(number).training.steps)


def measured(config: Config, workdir: Path, name: str, what: str = "samples") -> dict[str, float]:
    """Evaluates what the config makes, unless that is done, in the folder `name` of a workdir, and
    returns the metrics."""
    config = with_evaluation(config, name=name, images=what)
    run(config.to_config_dict(), str(workdir), mode="evaluate")
    return json.loads((workdir / name / "evaluation.json").read_text())["results"][what]["metrics"]


def with_evaluations(config: Config, number: int, wanted: int) -> Config:
    """The config whose stage `number` runs its network `wanted` times for an image.

    Where several ladders of a relay do, the shortest, which joins closest to `truncation_sigma`.

    Raises:
      InputError: no ladder does.
    """
    ladders = range(2, 8 * wanted + 3)
    of = lambda steps: config.with_stage(number, sampler={"steps": steps})  # noqa: E731
    count = lambda steps: of(steps).stage(number).nfe  # noqa: E731
    steps = ladders[min(bisect.bisect_left(ladders, wanted, key=count), len(ladders) - 1)]
    validate.require(count(steps) == wanted, "evaluations", wanted, "an odd number, 3 or more,")
    return of(steps)


def sampling_flops(stages: Iterable[Stage], channels: int, classes: int) -> int:
    """Operations of all stages' networks for one image, two a multiply-add, both passes of guidance
    counted."""
    passes = ((stage, stage.nfe * (1 if stage.guidance == 1 else 2)) for stage in stages)
    return sum(2 * count * stage.multiply_adds(channels, classes) for stage, count in passes)


def columns(metrics: dict[str, float]) -> list[str]:
    """Those of an evaluation's metrics that the experiments' tables show, the distance first."""
    return [name for name in COLUMNS if name in metrics]


def distance(metrics: dict[str, float]) -> float:
    """The Frechet distance, which is called FID in Inception's features."""
    return metrics[columns(metrics)[0]]


def cells(results: Sequence[dict[str, float]]) -> list[str]:
    """The cells of these columns: means over runs and, of several, their standard deviation."""
    return [_cell(name, [result[name] for result in results]) for name in columns(results[0])]


def _cell(metric: str, values: Sequence[float]) -> str:
    mean = cell(metric, statistics.mean(values))
    return f"{mean} +- {cell(metric, statistics.stdev(values))}" if len(values) > 1 else mean


def write_small(images: ImageSet, factor: int, folder: Path) -> None:
    """The means of factor x factor cells of images as `sampling.low` takes them, in class folders
    if there are classes."""
    batch = images.batch(np.arange(len(images)))
    small = np.asarray(Pixels().decode(Pixels().encode(jnp.asarray(batch["image"]), factor)))
    for number, (image, label) in enumerate(zip(small, batch["label"], strict=True)):
        path = (
            folder / (images.class_names[label] if images.class_names else "") / f"{number:05d}.png"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        pictures.save_picture(
            Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image), path
        )
