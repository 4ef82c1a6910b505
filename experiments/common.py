"""What the experiments share: variants of a config, trained and measured by ordinary runs."""

import bisect
import dataclasses
import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from PIL import Image

from rdm_jax.config import Config, Stage, kind_of, validate
from rdm_jax.data.image_sets import ImageSet
from rdm_jax.diffusion.pixels import Pixels
from rdm_jax.modes import run
from rdm_jax.render import pictures
from rdm_jax.render.tables import cell
from rdm_jax.runtime.compile_cache import keep_compiled
from rdm_jax.runtime.console import quiet_libraries, show_log
from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.ranges import parse_list
from rdm_jax.sampling import guides
from rdm_jax.stage_datasets import open_sets
from rdm_jax.workdir import Workdir

COLUMNS = ("fid", "frechet_distance", "kid", "accuracy", "precision", "recall")
COLUMNS += ("high_frequency_ratio",)


def start() -> None:
    """Starts an experiment: shows this project's log only, and keeps compiled programs."""
    show_log()
    quiet_libraries()
    keep_compiled()


def check_relay(config: Config) -> None:
    """Refuses a config that is not a relay of two stages, or cannot work. Raises InputError."""
    validate.check_config(config)
    kinds = [kind_of(type(stage.process)) for stage in config.stages]
    if kinds[1:] != ["relay"]:
        raise InputError(
            f"--config={kinds} is not a relay of two stages",
            "Use a config of two stages, the second a relay.",
        )


def named(found: dict[str, Any], text: str, flag: str) -> dict[str, Any]:
    """What the names in a flag select, in its own order; the first always, and for 'all' all.

    Raises:
      InputError: a name is not known.
    """
    names = parse_list(text, flag)
    names = tuple(found) if names == ("all",) else names
    for name in names:
        if name not in found:
            raise InputError(f"{flag}={name} is not known", f"Use {', '.join(found)}.")
    first = next(iter(found))
    return {name: part for name, part in found.items() if name in {first, *names}}


def with_evaluation(config: Config, **fields) -> Config:
    """The config with other fields of its evaluation."""
    return dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, **fields))


def prepared(config: Config, root: Path) -> tuple[Config, ImageSet, dict[str, float]]:
    """Prepares the data, and measures the held-out images in the folder `floor`.

    Returns:
      The config, whose runs share the floor's reference and its classifier, if there is one; the
      held-out images; their metrics.

    Raises:
      InputError: the config holds out no images, or selects no features.
    """
    validate.check_config(config)
    if not config.data.held_out:
        raise InputError(
            "config.data.held_out=0 leaves no images to compare with", "Use 1 or more."
        )
    metrics = measured(config, root, "floor", "held_out")
    config = with_evaluation(config, reference=f"npz:{root / 'floor' / 'reference.npz'}")
    if config.evaluation.features == "classifier" and not config.evaluation.weights:
        config = with_evaluation(config, weights=str(root / "classifier.safetensors"))
    last = len(config.stages)
    _, held_out = open_sets(config, [last])[last].split(config.data.held_out)
    return config, held_out, metrics


def trained(config: Config, workdir: Path, number: int) -> Path:
    """Trains stage `number` in a workdir, unless it is trained, without previews and evaluations.

    Returns:
      The folder of its last checkpoint.
    """
    config = config.with_stage(number, training={"preview_every": 0, "evaluate_every": 0})
    run(config.to_config_dict(), str(workdir), mode="train", stage=number)
    steps = config.stage(number).training.steps
    return Workdir(workdir).checkpoints(number) / str(steps)


def measured(config: Config, workdir: Path, name: str, what: str = "samples") -> dict[str, float]:
    """Evaluates a set of images in the folder `name` of a workdir, unless that is done.

    Returns:
      The metrics.
    """
    config = with_evaluation(config, name=name, images=what)
    run(config.to_config_dict(), str(workdir), mode="evaluate")
    return json.loads((workdir / name / "evaluation.json").read_text())["results"][what]["metrics"]


def with_nfe(config: Config, number: int, wanted: int) -> Config:
    """The config whose stage `number` evaluates its network `wanted` times per image.

    If several noise schedules of a relay have that NFE, it gets the shortest, which joins closest
    to `truncation_sigma`.

    Raises:
      InputError: no noise schedule has that NFE.
    """

    def with_steps(steps: int) -> Config:
        return config.with_stage(number, sampler={"steps": steps})

    def nfe(steps: int) -> int:
        return with_steps(steps).stage(number).nfe

    steps = range(2, 8 * wanted + 3)
    found = steps[min(bisect.bisect_left(steps, wanted, key=nfe), len(steps) - 1)]
    if nfe(found) != wanted:
        raise InputError(f"NFE {wanted} is not possible", "Use an odd number, 3 or more.")
    return with_steps(found)


def sampling_flops(stages: Iterable[Stage], channels: int, classes: int) -> int:
    """FLOPs of all stages' networks per image; all passes of guidance count."""
    return sum(2 * guides.multiply_adds(stage, channels, classes) for stage in stages)


def draw_samples(relays: Iterable[tuple[str, Config, Path]], count: int) -> Image.Image:
    """Samples of the same seeds, a row for each relay, below the first one's images of stage 1.

    Args:
      relays: title, config and workdir of each.
      count: of seeds, from 0 on.
    """
    rows = []
    for title, config, workdir in relays:
        sampling = dataclasses.replace(
            config.sampling, name="shown", seeds=f"0-{count - 1}", files="npz"
        )
        config = dataclasses.replace(config, sampling=sampling)
        run(config.to_config_dict(), str(workdir), mode="sample")
        with np.load(workdir / "shown" / "samples.npz") as made:
            rows += [("stage 1", made["stage1"])] if not rows else []
            rows.append((title, made["images"]))
    return pictures.labelled_rows(rows, [f"seed {n}" for n in range(count)])


def columns(metrics: dict[str, float]) -> list[str]:
    """The metrics that the experiments' tables show, the distance first."""
    return [name for name in COLUMNS if name in metrics]


def distance(metrics: dict[str, float]) -> float:
    """The Frechet distance, called FID in Inception's features."""
    return metrics[columns(metrics)[0]]


def cells(results: Sequence[dict[str, float]]) -> list[str]:
    """The cells of these columns: means over runs, and their standard deviation if several."""
    return [_cell(name, [result[name] for result in results]) for name in columns(results[0])]


def _cell(metric: str, values: Sequence[float]) -> str:
    mean = cell(metric, statistics.mean(values))
    return f"{mean} +- {cell(metric, statistics.stdev(values))}" if len(values) > 1 else mean


def write_small(images: ImageSet, factor: int, folder: Path) -> None:
    """Writes pooled images for `sampling.low`, in class folders if there are classes."""
    batch = images.batch(np.arange(len(images)))
    small = np.asarray(Pixels().decode(Pixels().encode(jnp.asarray(batch["image"]), factor)))
    for number, (image, label) in enumerate(zip(small, batch["label"], strict=True)):
        name = images.class_names[label] if images.class_names else ""
        path = folder / name / f"{number:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = image[..., 0] if image.shape[-1] == 1 else image
        pictures.save_picture(Image.fromarray(pixels), path)
