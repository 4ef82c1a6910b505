"""From seeds to files: samples.npz or pictures, grid.png and samples.json. What is there stays; further seeds are added to it."""

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
from rdm_jax.classes import table
from rdm_jax.data.image_sets import ImageSet
from rdm_jax.evaluation.npz import Npz
from rdm_jax.files import is_whole_png, parse_json, whole_file
from rdm_jax.interrupt import StopOnSignal
from rdm_jax.lists import parse_numbers, repetition
from rdm_jax.sampling import earlier, pictures
from rdm_jax.sampling.earlier import SAMPLES, Earlier
from rdm_jax.sampling.made_with import any_seeds, describe, same_settings, with_seeds
from rdm_jax.sampling.parts import Parts, png_name, sample_in_parts, write_labels, write_npz, write_png
from rdm_jax.sampling.relay import Relay
from rdm_jax.sampling.sampler import evaluations, handover
from rdm_jax.terminal import log

COLUMNS, ROWS = 3, 10  # examples a row of the grid, and its rows


def sample_to_files(relay: Relay, source: ImageSet | None, workdir: Path, stop: StopOnSignal) -> None:
    """Samples every configured seed that is not there yet, and leaves, under workdir/<sampling.name>:

    samples.npz ('images' uint8 NHWC, 'labels', 'class_names', 'seeds', and 'stage1', ... uint8), or a folder images of <seed>.png
    files with their labels and the names of the classes in EDM's dataset.json; grid.png, of further seeds grid-2.png and so on;
    and samples.json (what they were made with). Finished batches are kept in a folder beside them until all are there, so that
    an interrupted run goes on.

    Samples that are there, of the same settings, stay. Those of earlier checkpoints of this run are moved aside.

    Args:
      source: prepared images, the nearest of which the grid shows; None to leave them out.

    Raises:
      InputError: a small image to start from cannot be used, or the folder holds something else.
      Interrupted: a signal came; the batches done so far are kept.
    """
    config, folder = relay.config, workdir / relay.config.sampling.name
    asked = parse_numbers(config.sampling.seeds, "config.sampling.seeds")
    if said := repetition(config.sampling.seeds, "config.sampling.seeds"):
        log.info("samples: %s", said)
    distributed.check_same("what the samples are made with", _digest(describe(config, relay)))
    there = distributed.first_before_others(lambda: earlier.find(relay, folder))
    missing = _missing(relay, there, asked)
    if not len(missing):
        if distributed.is_first():
            _complete(relay, there, asked)
        log.info("samples: %d images are already in %s", len(asked), folder)
        return
    _say_what_is_made(relay, missing, there)
    began = time.perf_counter()
    place = _place_of_parts(relay, missing, folder)
    parts, rate = sample_in_parts(relay, missing, place, stop)
    seconds = time.perf_counter() - began
    with distributed.together():
        if distributed.is_first():
            _write(relay, parts, missing, source, there, asked)
            _remove_parts(relay, place)
    timed = (len(missing), seconds, "" if math.isnan(rate) else f", then {rate:.3g} images/s", folder)
    log.info("samples: %d images in %.1f s (compilation included)%s -> %s", *timed)


def _place_of_parts(relay: Relay, seeds: np.ndarray, folder: Path) -> Path:
    """Where finished batches of these seeds are kept; what they are made with lies beside them."""
    made_with = describe(with_seeds(relay.config, seeds.tolist()), relay)
    place = folder / f".parts-{_digest(made_with)}"
    with distributed.together():
        if distributed.is_first():
            with whole_file(place / SAMPLES) as partial:
                partial.write_text(json.dumps(made_with))
    return place


def _remove_parts(relay: Relay, place: Path) -> None:
    """Deletes parts that are not needed any more: these, and what other settings have left, which can not be added here."""
    ours = describe(relay.config, relay)
    for parts in place.parent.glob(".parts-*"):
        try:
            made_with = parse_json((parts / SAMPLES).read_text())
            useful = parts != place and same_settings(any_seeds(made_with), any_seeds(ours))
        except (OSError, ValueError, KeyError, TypeError):
            useful = False
        if not useful:
            shutil.rmtree(parts)


def _missing(relay: Relay, there: Earlier, asked: tuple[int, ...]) -> np.ndarray:
    """The seeds whose images are to be made, the same in every process: int64 (n,)."""
    wanted = np.asarray(there.wanted(asked), np.int64)
    drawn = is_whole_png(there.folder / "grid.png")
    found = there.present(wanted, relay.config.sampling.files) if drawn else np.zeros(len(wanted), bool)
    distributed.check_same(f"what is wanted in {there.folder}", str(wanted.tolist()))
    return wanted[~distributed.gathered(found).all(0)]


def _say_what_is_made(relay: Relay, missing: np.ndarray, there: Earlier) -> None:
    if there.seeds:
        log.info("samples: %d images are added to those in %s", len(missing), there.folder)
    if relay.low:
        log.info("samples: from the images of %s, in place of stage%d's", relay.config.sampling.low, relay.low.stage)
    if len(relay.classes):
        numbers = tuple(np.unique(relay.labels(missing)).tolist())
        log.info("samples: of the classes (number and name) %s", table(relay.classes, numbers))
    for number, loaded in enumerate(relay.checkpoints, relay.first):
        stage = relay.config.stages[number - 1]
        about = (number, loaded["step"], evaluations(stage), stage.guidance)
        log.info("samples: stage%d from step %d, %d network evaluations an image, guidance %g", *about)
        if number > 1:
            log.info("samples: stage%d %s", number, handover(stage))


def _write(relay: Relay, parts: Parts, made: np.ndarray, source: ImageSet | None, there: Earlier, asked: tuple[int, ...]) -> None:
    """Adds what was made to what is there."""
    folder, files = there.folder, relay.config.sampling.files
    if not there.made_with:  # from now on the folder is known to be ours, should this be killed
        _write_made_with(relay, there.all_seeds(asked), folder)
    if files == "png":
        write_png(parts, made, folder / "images")
        _write_labels(relay, there.all_seeds(asked), folder / "images")
    else:
        _write_npz(relay, parts, made, there)
    grid = _free_grid(folder, again=set(made.tolist()) <= set(there.seeds))
    if grid:
        pictures.save_picture(_draw(parts, relay.labels(made), relay.classes.names, source), grid)
    _write_made_with(relay, there.all_seeds(asked), folder)


def _complete(relay: Relay, there: Earlier, asked: tuple[int, ...]) -> None:
    """Writes what is said of images that are there, where a run was killed before it did, or an earlier version said less."""
    if relay.config.sampling.files == "png":
        _write_labels(relay, there.all_seeds(asked), there.folder / "images")
    if not set(asked) <= set(there.seeds):
        _write_made_with(relay, there.all_seeds(asked), there.folder)


def _write_npz(relay: Relay, parts: Parts, made: np.ndarray, there: Earlier) -> None:
    """samples.npz of what is there already, if anything, and what was made."""
    path, names = there.folder / "samples.npz", [*relay.earlier, "images"]
    before = Npz(path) if there.has_npz else None
    kept = ~np.isin(there.npz_seeds, made)
    seeds = np.concatenate([there.npz_seeds[kept], made])
    others = {"labels": relay.labels(seeds), "seeds": seeds}
    if len(relay.classes):
        others["class_names"] = np.asarray(relay.classes.names)
    write_npz(parts, names, others, path, before, kept)


def _write_labels(relay: Relay, seeds: tuple[int, ...], folder: Path) -> None:
    """The labels file of the pictures that are there."""
    there = np.asarray([seed for seed in seeds if (folder / png_name(seed)).is_file()], np.int64)
    write_labels(there, relay.labels(there), relay.classes.names, folder)


def _write_made_with(relay: Relay, seeds: tuple[int, ...], folder: Path) -> None:
    with whole_file(folder / SAMPLES) as partial:
        partial.write_text(json.dumps(describe(with_seeds(relay.config, seeds), relay), indent=2))


def _free_grid(folder: Path, *, again: bool) -> Path | None:
    """Where to draw what was made; None where it is drawn already."""
    if not is_whole_png(folder / "grid.png"):
        return folder / "grid.png"
    number = next(n for n in range(2, 10**9) if not (folder / f"grid-{n}.png").exists())
    return None if again else folder / f"grid-{number}.png"


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
