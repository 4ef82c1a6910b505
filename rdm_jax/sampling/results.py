"""From seeds to files: samples.npz, grid.png and samples.json, made in parts so that an interrupted run goes on."""

import hashlib
import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rdm_jax import distributed
from rdm_jax.checks import parse_numbers
from rdm_jax.config import Config, to_dict
from rdm_jax.data.image_sets import ImageSet
from rdm_jax.files import is_whole_npz, is_whole_png, parse_json, whole_file
from rdm_jax.interrupt import StopOnSignal
from rdm_jax.sampling import pictures
from rdm_jax.sampling.parts import Parts, png_name, sample_in_parts, write_npz, write_png
from rdm_jax.sampling.relay import Relay
from rdm_jax.sampling.sampler import evaluations, handover, stage_settings
from rdm_jax.terminal import log

SAMPLES = "samples.json"
COLUMNS, ROWS = 3, 10  # examples a row of the grid, and its rows


def describe(config: Config, relay: Relay) -> dict[str, Any]:
    """All that the images depend on, as JSON: what the samples were made with."""
    stages = {f"stage{number}": stage_settings(config, number) for number in range(relay.first, len(config.stages) + 1)}
    sampling = {k: v for k, v in to_dict(config)["sampling"].items() if k not in ("name", "batch_size", "files")}
    about = {"seed": config.seed, "sampling": sampling, "stages": stages, "checkpoints": relay.checkpoints}
    if relay.low:
        about["low_images"] = relay.low.digest(_seeds(config))
    return json.loads(json.dumps(about))


def _seeds(config: Config) -> np.ndarray:
    return np.asarray(parse_numbers(config.sampling.seeds, "config.sampling.seeds"), np.int64)


def sample_to_files(relay: Relay, source: ImageSet | None, workdir: Path, stop: StopOnSignal) -> None:
    """Samples every configured seed and leaves, under workdir/<sampling.name>:

    samples.npz ('images' uint8 NHWC, 'labels', 'seeds', and 'stage1', ... uint8), or a folder images of <seed>.png files with
    their labels in EDM's dataset.json; grid.png; and samples.json (what they were made with). Finished batches are kept in a
    folder beside them until all are there, so that an interrupted run goes on.

    Args:
      source: prepared images, the nearest of which the grid shows; None to leave them out.

    Raises:
      InputError: a small image to start from cannot be used.
      Interrupted: a signal came; the batches done so far are kept.
    """
    config, folder = relay.config, workdir / relay.config.sampling.name
    made_with, seeds = describe(config, relay), _seeds(config)
    distributed.check_same("what the samples are made with", _digest(made_with))
    if distributed.gathered(np.int32(_is_done(folder, seeds, relay, made_with))).all():
        log.info("samples: %d images are already in %s", len(seeds), folder)
        return
    _say_what_is_made(relay)
    began = time.perf_counter()
    parts, rate = sample_in_parts(relay, seeds, folder / f".parts-{_digest(made_with)}", stop)
    seconds = time.perf_counter() - began
    with distributed.together():
        if distributed.is_first():
            _write(relay, parts, seeds, source, folder, made_with)
    timed = (len(seeds), seconds, "" if math.isnan(rate) else f", then {rate:.3g} images/s", folder)
    log.info("samples: %d images in %.1f s (compilation included)%s -> %s", *timed)


def _say_what_is_made(relay: Relay) -> None:
    if relay.low:
        log.info("samples: from the images of %s, in place of stage%d's", relay.config.sampling.low, relay.low.stage)
    for number, loaded in enumerate(relay.checkpoints, relay.first):
        stage = relay.config.stages[number - 1]
        about = (number, loaded["step"], evaluations(stage), stage.guidance)
        log.info("samples: stage%d from step %d, %d network evaluations an image, guidance %g", *about)
        if number > 1:
            log.info("samples: stage%d %s", number, handover(stage))


def _write(
    relay: Relay, parts: Parts, seeds: np.ndarray, source: ImageSet | None, folder: Path, made_with: dict[str, Any]
) -> None:
    """Leaves the files, then deletes the parts."""
    labels = relay.labels(seeds)
    if not _is_vouched_for(folder, made_with):
        _remove_images(folder)
    (folder / SAMPLES).unlink(missing_ok=True)  # it vouches for the others, so it comes last
    if relay.config.sampling.files == "png":
        write_png(parts, seeds, labels, folder / "images")
    else:
        write_npz(parts, _image_names(relay), {"labels": labels, "seeds": seeds}, folder / "samples.npz")
    pictures.save_picture(_draw(parts, labels, relay.class_names, source), folder / "grid.png")
    with whole_file(folder / SAMPLES) as partial:
        partial.write_text(json.dumps(made_with, indent=2))
    for leftover in folder.glob(".parts-*"):
        shutil.rmtree(leftover)


def _image_names(relay: Relay) -> list[str]:
    """Of the arrays in samples.npz that are images."""
    return [*relay.earlier, "images"]


def _is_done(folder: Path, seeds: np.ndarray, relay: Relay, made_with: dict[str, Any]) -> bool:
    """Whether the images are there, whole, as such files, made with the same."""
    if not _is_vouched_for(folder, made_with) or not is_whole_png(folder / "grid.png"):
        return False
    if relay.config.sampling.files == "npz":
        return is_whole_npz(folder / "samples.npz", [*_image_names(relay), "labels", "seeds"])
    return (folder / "images/dataset.json").is_file() and all(is_whole_png(folder / "images" / png_name(seed)) for seed in seeds)


def _is_vouched_for(folder: Path, made_with: dict[str, Any]) -> bool:
    try:
        return parse_json((folder / SAMPLES).read_text()) == made_with
    except (FileNotFoundError, ValueError):
        return False


def _remove_images(folder: Path) -> None:
    (folder / "samples.npz").unlink(missing_ok=True)
    shutil.rmtree(folder / "images", ignore_errors=True)


def _digest(made_with: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(made_with, sort_keys=True).encode()).hexdigest()[:12]


def _draw(parts: Parts, labels: np.ndarray, class_names: tuple[str, ...], source: ImageSet | None) -> Image.Image:
    """A row a class, evenly chosen if there are many; rows of any images where there are no classes."""
    if class_names:
        known = np.unique(labels)
        known = known[np.linspace(0, len(known) - 1, min(ROWS, len(known))).astype(int)]
        rows = [(class_names[c], np.flatnonzero(labels == c)[:COLUMNS].tolist()) for c in known]
    else:
        rows = [("", list(range(i, min(i + COLUMNS, len(labels))))) for i in range(0, min(len(labels), ROWS * COLUMNS), COLUMNS)]
    shown = sorted({number for _, numbers in rows for number in numbers})
    place = {number: i for i, number in enumerate(shown)}
    images = parts.read(np.asarray(shown))
    nearest = pictures.nearest_real(images[-1], source)[0] if source else None
    return pictures.relay_grid(images, nearest, [(name, [place[n] for n in numbers]) for name, numbers in rows])
