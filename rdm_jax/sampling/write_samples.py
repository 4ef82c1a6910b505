"""From seeds to files: samples.npz or pictures, grid.png and samples.json. What is there stays;
further seeds are added to it."""

import hashlib
import itertools
import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rdm_jax.data.classes import table
from rdm_jax.data.image_sets import ImageSet
from rdm_jax.render import pictures
from rdm_jax.runtime import distributed
from rdm_jax.runtime.console import log
from rdm_jax.runtime.files import atomic_write, is_whole_png, link_or_copy, move_aside, parse_json
from rdm_jax.runtime.npz import Npz
from rdm_jax.runtime.ranges import parse_numbers, repetition
from rdm_jax.runtime.signals import StopOnSignal
from rdm_jax.sampling import earlier
from rdm_jax.sampling.earlier import SAMPLES, Earlier
from rdm_jax.sampling.made_with import any_seeds, describe, differences, with_seeds
from rdm_jax.sampling.pipeline import RelayPipeline
from rdm_jax.sampling.sample_shards import (
    SampleShards,
    png_name,
    sample_in_parts,
    seeds_of_part,
    write_labels,
    write_npz,
    write_png,
)

COLUMNS, ROWS = 3, 10  # examples a row of the grid, and its rows


def sample_to_files(
    relay: RelayPipeline, source: ImageSet | None, workdir: Path, stop: StopOnSignal
) -> None:
    """Samples every configured seed that is not there yet, and leaves, under
    workdir/<sampling.name>:

    samples.npz ('images' uint8 NHWC, 'labels', 'class_names', 'seeds', and 'stage1', ... uint8), or
    a folder images of <seed>.png files with their labels and the names of the classes in EDM's
    dataset.json; grid.png, of further seeds grid-2.png and so on; and samples.json (what they were
    made with). Finished batches are kept in a folder beside them until all are there, so that an
    interrupted run goes on.

    Samples that are there, of the same settings, stay. Those of earlier checkpoints of this run are
    moved aside.

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
    there = distributed.primary_first(lambda: earlier.find(relay, folder))
    missing = _missing(relay, there, asked)
    rows = _rows_of_grid(relay, there, missing, asked)
    shown = np.asarray([seed for _, seeds in rows for seed in seeds], np.int64)
    made = np.concatenate([missing, shown[~np.isin(shown, missing)]])
    place = folder / f".parts-{_digest(any_seeds(describe(config, relay)))}"
    if not len(made):
        if distributed.is_primary():
            _complete(relay, there, asked)
            _remove_parts(relay, place, there, asked)
        log.info("samples: %d images are already in %s", len(asked), folder)
        return
    _say_what_is_made(relay, missing, made, there)
    began = time.perf_counter()
    _mark(relay, place)
    parts, rate = sample_in_parts(relay, made, place, stop)
    seconds = time.perf_counter() - began
    with distributed.raise_together():
        if distributed.is_primary():
            _write(relay, parts, missing, rows, source, there, asked)
            _remove_parts(relay, place, there, asked)
    timed = (len(made), seconds, "" if math.isnan(rate) else f", then {rate:.3g} images/s", folder)
    log.info("samples: %d images in %.1f s (compilation included)%s -> %s", *timed)


def _mark(relay: RelayPipeline, place: Path) -> None:
    """Says beside finished batches what they are made with."""
    with distributed.raise_together():
        if distributed.is_primary():
            with atomic_write(place / SAMPLES) as partial:
                partial.write_text(json.dumps(any_seeds(describe(relay.config, relay))))


def _remove_parts(
    relay: RelayPipeline, place: Path, there: Earlier, asked: tuple[int, ...]
) -> None:
    """Deletes finished batches whose images are all among the samples now; the log names what
    stays."""
    for path in place.glob("*.npz"):
        seeds = seeds_of_part(path)
        if seeds is None or np.all(
            np.isin(seeds, there.wanted(asked)) | there.present(seeds, relay.config.sampling.files)
        ):
            path.unlink()
    if count := len(list(place.glob("*.npz"))):
        log.info(
            "samples: %d finished batches of seeds that were not asked for now are kept in %s",
            count,
            place,
        )
    else:
        shutil.rmtree(place, ignore_errors=True)
    ours = any_seeds(describe(relay.config, relay))
    for other in sorted(there.folder.glob(".parts-*")):
        if other != place:
            log.info(
                "samples: %s is kept, with finished batches of a run that was interrupted (%s)",
                other,
                _what(other, ours),
            )


def _what(parts: Path, ours: dict[str, Any]) -> str:
    """What the finished batches in a folder are of, as far as that differs from these settings."""
    try:
        changes = differences(any_seeds(parse_json((parts / SAMPLES).read_text())), ours)
        return ", ".join(changes[:3]) or "by an earlier version of this program"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"its {SAMPLES}, which says of what settings, cannot be read"


def _missing(relay: RelayPipeline, there: Earlier, asked: tuple[int, ...]) -> np.ndarray:
    """The seeds whose images are not there, the same in every process: int64 (n,)."""
    wanted = np.asarray(there.wanted(asked), np.int64)
    found = there.present(wanted, relay.config.sampling.files)
    distributed.check_same(f"what is wanted in {there.folder}", str(wanted.tolist()))
    return wanted[~distributed.allgather(found).all(0)]


def _rows_of_grid(
    relay: RelayPipeline, there: Earlier, missing: np.ndarray, asked: tuple[int, ...]
) -> list[tuple[str, list[int]]]:
    """The rows of the grid that is to be drawn, a name and seeds each: of what is made; of all,
    where there is no grid yet.

    A row a class, evenly chosen if there are many; rows of any images where there are no classes.
    """
    drawn = bool(distributed.allgather(np.asarray(is_whole_png(there.folder / "grid.png"))).all())
    if drawn and set(missing.tolist()) <= set(there.seeds):  # these were drawn before
        return []
    seeds = missing if drawn else np.asarray(asked, np.int64)
    if not len(relay.classes):
        firsts = range(0, min(len(seeds), ROWS * COLUMNS), COLUMNS)
        return [("", seeds[first : first + COLUMNS].tolist()) for first in firsts]
    labels = relay.labels(seeds)
    known = np.unique(labels)
    known = known[np.linspace(0, len(known) - 1, min(ROWS, len(known))).astype(int)]
    return [(relay.classes.names[c], seeds[labels == c][:COLUMNS].tolist()) for c in known]


def _say_what_is_made(
    relay: RelayPipeline, missing: np.ndarray, made: np.ndarray, there: Earlier
) -> None:
    if there.seeds and len(missing):
        log.info("samples: %d images are added to those in %s", len(missing), there.folder)
    if len(made) > len(missing):
        log.info(
            "samples: %d images are made again, to draw the grid that is missing",
            len(made) - len(missing),
        )
    if relay.low:
        log.info(
            "samples: from the images of %s, in place of stage%d's",
            relay.config.sampling.low,
            relay.low.stage,
        )
    if len(relay.classes):
        numbers = tuple(np.unique(relay.labels(made)).tolist())
        log.info("samples: of the classes (number and name) %s", table(relay.classes, numbers))
    for number, loaded in enumerate(relay.checkpoints, relay.first):
        stage = relay.config.stage(number)
        about = (number, loaded["step"], stage.nfe, stage.guidance)
        log.info(
            "samples: stage%d from step %d, %d network evaluations an image, guidance %g", *about
        )
        if number > 1:
            log.info("samples: stage%d %s", number, stage.sampler.handover(stage.process))


def _write(
    relay: RelayPipeline,
    parts: SampleShards,
    missing: np.ndarray,
    rows: list[tuple[str, list[int]]],
    source: ImageSet | None,
    there: Earlier,
    asked: tuple[int, ...],
) -> None:
    """Adds what was made to what is there."""
    folder, files = there.folder, relay.config.sampling.files
    if not there.made_with:  # from now on the folder is known to be ours, should this be killed
        _write_made_with(relay, there.all_seeds(asked), folder)
    if files == "png":
        write_png(parts, missing, folder / "images")
        _write_labels(relay, there.all_seeds(asked), folder / "images")
    elif len(missing):
        _write_npz(relay, parts, missing, there)
    if rows:
        pictures.save_picture(_draw(parts, rows, source), _free_grid(folder))
    _write_made_with(relay, there.all_seeds(asked), folder)


def _complete(relay: RelayPipeline, there: Earlier, asked: tuple[int, ...]) -> None:
    """Writes what is said of images that are there, where a run was killed before it did, or an
    earlier version said less."""
    if relay.config.sampling.files == "png":
        _write_labels(relay, there.all_seeds(asked), there.folder / "images")
    if not set(asked) <= set(there.seeds):
        _write_made_with(relay, there.all_seeds(asked), there.folder)


def _write_npz(relay: RelayPipeline, parts: SampleShards, made: np.ndarray, there: Earlier) -> None:
    """samples.npz of what is there already, if anything, and what was made."""
    path, names = there.folder / "samples.npz", [*relay.earlier, "images"]
    if there.damaged or there.more:  # it stays until the new one takes its place
        kept_as = move_aside(there.folder, []) / "samples.npz"
        link_or_copy(path, kept_as)
        why = "is damaged" if there.damaged else "has arrays that are not of sampling"
        log.warning("samples: %s %s, and is kept as %s", path, why, kept_as)
    kept = ~np.isin(there.npz_seeds, made)
    seeds = np.concatenate([there.npz_seeds[kept], made])
    others = {"labels": relay.labels(seeds), "seeds": seeds}
    if len(relay.classes):
        others["class_names"] = np.asarray(relay.classes.names)
    write_npz(parts, made, names, others, path, Npz(path) if there.has_npz else None, kept)


def _write_labels(relay: RelayPipeline, seeds: tuple[int, ...], folder: Path) -> None:
    """The labels file of the pictures that are there."""
    there = np.asarray([seed for seed in seeds if (folder / png_name(seed)).is_file()], np.int64)
    write_labels(there, relay.labels(there), relay.classes.names, folder)


def _write_made_with(relay: RelayPipeline, seeds: tuple[int, ...], folder: Path) -> None:
    with atomic_write(folder / SAMPLES) as partial:
        partial.write_text(json.dumps(describe(with_seeds(relay.config, seeds), relay), indent=2))


def _free_grid(folder: Path) -> Path:
    """Where to draw what was made."""
    if not is_whole_png(folder / "grid.png"):
        return folder / "grid.png"
    return next(path for n in itertools.count(2) if not (path := folder / f"grid-{n}.png").exists())


def _digest(made_with: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(made_with, sort_keys=True).encode()).hexdigest()[:12]


def _draw(
    parts: SampleShards, rows: list[tuple[str, list[int]]], source: ImageSet | None
) -> Image.Image:
    shown = sorted({seed for _, seeds in rows for seed in seeds})
    place = {seed: i for i, seed in enumerate(shown)}
    images = parts.read(np.asarray(shown, np.int64))
    nearest = pictures.nearest_real(images[-1], source)[0] if source else None
    return pictures.relay_grid(
        images, nearest, [(name, [place[seed] for seed in seeds]) for name, seeds in rows]
    )
