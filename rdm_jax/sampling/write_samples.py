"""From seeds to files: samples.npz or PNGs, grid.png and samples.json.

Existing samples stay; further seeds are added to them.
"""

import hashlib
import itertools
import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from rdm_jax.data.classes import table
from rdm_jax.data.image_sets import ImageSet
from rdm_jax.diffusion import guidance
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
from rdm_jax.workdir import Workdir

COLUMNS, ROWS = 3, 10  # of the grid: examples per row, and rows


def sample_to_files(
    relay: RelayPipeline, source: ImageSet | None, workdir: Path, stop: StopOnSignal
) -> None:
    """Samples every configured seed that is missing, and writes workdir/<sampling.name>.

    The folder then has samples.npz ('images' uint8 NHWC, 'labels', 'class_names', 'seeds',
    'prompts' of networks that know text, and 'stage1', ... uint8), or a folder `images` of
    <seed>.png with their labels, class names and prompts in EDM's dataset.json; grid.png
    (grid-2.png, ... for further seeds); and samples.json with all that the images depend on. Until
    all images exist, finished batches are kept in a folder beside them, so that an interrupted run
    resumes.

    Existing samples of the same settings stay. Those of earlier checkpoints of this run are moved
    aside.

    Args:
      relay: the pipeline.
      source: prepared images; the grid shows the nearest to each sample. None leaves these out.
      workdir: of the run.
      stop: checked after every batch.

    Raises:
      InputError: a small image to start from cannot be used, or the folder has other samples.
      Interrupted: a signal came; the finished batches are kept.
    """
    config, folder = relay.config, Workdir(workdir).samples(relay.config)
    asked = parse_numbers(config.sampling.seeds, "config.sampling.seeds")
    if repeated := repetition(config.sampling.seeds, "config.sampling.seeds"):
        log.info("samples: %s", repeated)
    distributed.check_same("what the samples are made with", _digest(describe(config, relay)))
    existing = distributed.primary_first(
        "looks for earlier samples", lambda: earlier.find(relay, folder)
    )
    missing = _missing(relay, existing, asked)
    rows = _rows_of_grid(relay, existing, missing, asked)
    shown = np.asarray([seed for _, seeds in rows for seed in seeds], np.int64)
    made = np.concatenate([missing, shown[~np.isin(shown, missing)]])
    shards = folder / f".parts-{_digest(any_seeds(describe(config, relay)))}"
    if not len(made):
        with distributed.raise_together("process 0, which completes the samples"):
            if distributed.is_primary():
                _complete(relay, existing, asked)
                _remove_shards(relay, shards, existing, asked)
        log.info("samples: %d images are already in %s", len(asked), folder)
        return
    _log_work(relay, missing, made, existing)
    began = time.perf_counter()
    _mark(relay, shards)
    parts, rate = sample_in_parts(relay, made, shards, stop)
    seconds = time.perf_counter() - began
    with distributed.raise_together("process 0, which writes the samples"):
        if distributed.is_primary():
            _write(relay, parts, missing, rows, source, existing, asked)
            _remove_shards(relay, shards, existing, asked)
    distributed.wait_for_all("see the samples")
    log.info(
        "samples: %d images in %.1f s (compilation included)%s -> %s",
        len(made),
        seconds,
        "" if math.isnan(rate) else f", then {rate:.3g} images/s",
        folder,
    )


def _mark(relay: RelayPipeline, shards: Path) -> None:
    """Writes beside the shards what they are made with."""
    with distributed.raise_together():
        if distributed.is_primary():
            with atomic_write(shards / SAMPLES) as partial:
                partial.write_text(json.dumps(any_seeds(describe(relay.config, relay))))


def _remove_shards(
    relay: RelayPipeline, shards: Path, existing: Earlier, asked: tuple[int, ...]
) -> None:
    """Deletes shards whose images are all among the samples now, and logs the others."""
    files = relay.config.sampling.files
    for path in shards.glob("*.npz"):
        seeds = seeds_of_part(path)
        if seeds is None or np.all(
            np.isin(seeds, existing.wanted(asked)) | existing.present(seeds, files)
        ):
            path.unlink()
    if count := len(list(shards.glob("*.npz"))):
        log.info("samples: %d finished batches of other seeds are kept in %s", count, shards)
    else:
        shutil.rmtree(shards, ignore_errors=True)
    ours = any_seeds(describe(relay.config, relay))
    for other in sorted(existing.folder.glob(".parts-*")):
        if other != shards:
            log.info(
                "samples: finished batches of an interrupted run are kept in %s (%s)",
                other,
                _describe_shards(other, ours),
            )


def _describe_shards(shards: Path, ours: dict[str, Any]) -> str:
    """How the settings of a folder of shards differ from these."""
    try:
        changes = differences(any_seeds(parse_json((shards / SAMPLES).read_text())), ours)
        return ", ".join(changes[:3]) or "by an earlier version of this program"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"its {SAMPLES} cannot be read"


def _missing(relay: RelayPipeline, existing: Earlier, asked: tuple[int, ...]) -> np.ndarray:
    """The seeds whose images do not exist, the same in every process: int64 (n,)."""
    wanted = np.asarray(existing.wanted(asked), np.int64)
    distributed.check_same(f"what is wanted in {existing.folder}", str(wanted.tolist()))
    found = np.zeros(len(wanted), bool)
    mine = slice(jax.process_index(), None, jax.process_count())  # each looks at its share
    found[mine] = existing.present(wanted[mine], relay.config.sampling.files)
    return wanted[~distributed.allgather(found).any(0)]


def _rows_of_grid(
    relay: RelayPipeline, existing: Earlier, missing: np.ndarray, asked: tuple[int, ...]
) -> list[tuple[str, list[int]]]:
    """The rows of the grid to draw, each a name and seeds; none if nothing new is to be shown.

    The grid shows what is sampled now, or all requested seeds if there is no grid yet. There is one
    row per class, evenly chosen if there are many; without classes the rows are of any images.
    """
    drawn = is_whole_png(existing.folder / "grid.png")
    drawn = bool(distributed.allgather(np.asarray(drawn)).all())
    if drawn and set(missing.tolist()) <= set(existing.seeds):  # these were drawn before
        return []
    seeds = missing if drawn else np.asarray(asked, np.int64)
    if relay.text:
        return _rows_by_prompt(relay, seeds)
    if not len(relay.classes):
        firsts = range(0, min(len(seeds), ROWS * COLUMNS), COLUMNS)
        return [("", seeds[first : first + COLUMNS].tolist()) for first in firsts]
    labels = relay.labels(seeds)
    known = np.unique(labels)
    known = known[np.linspace(0, len(known) - 1, min(ROWS, len(known))).astype(int)]
    return [(relay.classes.names[c], seeds[labels == c][:COLUMNS].tolist()) for c in known]


def _rows_by_prompt(relay: RelayPipeline, seeds: np.ndarray) -> list[tuple[str, list[int]]]:
    """A row per prompt; if there are more prompts than rows, one image of each."""
    by_prompt: dict[str, list[int]] = {}
    for seed, prompt in zip(seeds.tolist(), relay.prompts(seeds), strict=True):
        by_prompt.setdefault(prompt, []).append(seed)
    if len(by_prompt) <= ROWS:
        return [("", those[:COLUMNS]) for those in by_prompt.values()]
    firsts = [those[0] for those in by_prompt.values()][: ROWS * COLUMNS]
    return [("", firsts[first : first + COLUMNS]) for first in range(0, len(firsts), COLUMNS)]


def _log_work(
    relay: RelayPipeline, missing: np.ndarray, made: np.ndarray, existing: Earlier
) -> None:
    if existing.seeds and len(missing):
        log.info("samples: %d images are added to those in %s", len(missing), existing.folder)
    if again := len(made) - len(missing):
        log.info("samples: %d images are sampled again to draw the missing grid", again)
    if relay.low:
        low = relay.config.sampling.low
        log.info("samples: the images of %s replace those of stage%d", low, relay.low.stage)
    if len(relay.classes):
        numbers = tuple(np.unique(relay.labels(made)).tolist())
        log.info("samples: classes (index and name) %s", table(relay.classes, numbers))
    if relay.text:
        prompts = list(dict.fromkeys(relay.prompts(made)))
        held_out = sum(relay.are_held_out(prompts))
        log.info("samples: %d prompts, %d of them held out", len(prompts), held_out)
    for number, loaded in enumerate(relay.checkpoints, relay.first):
        stage = relay.config.stage(number)
        log.info(
            "samples: stage%d from step %d, average %s, NFE %d per image, guidance %s",
            number,
            loaded["step"],
            stage.average,
            stage.nfe,
            guidance.text(stage.guidance),
        )
        if number > 1:
            log.info("samples: stage%d %s", number, stage.sampler.handover(stage.process))


def _write(
    relay: RelayPipeline,
    parts: SampleShards,
    missing: np.ndarray,
    rows: list[tuple[str, list[int]]],
    source: ImageSet | None,
    existing: Earlier,
    asked: tuple[int, ...],
) -> None:
    """Adds the new images to the existing ones."""
    folder, files = existing.folder, relay.config.sampling.files
    if not existing.made_with:  # first, so that the folder is known to be ours after a kill
        _write_made_with(relay, existing.all_seeds(asked), folder)
    if files == "png":
        write_png(parts, missing, folder / "images")
        _write_labels(relay, existing.all_seeds(asked), folder / "images")
    elif len(missing):
        _write_npz(relay, parts, missing, existing)
    if rows:
        pictures.save_picture(_draw(relay, parts, rows, source), _free_grid(folder))
    _write_made_with(relay, existing.all_seeds(asked), folder)


def _complete(relay: RelayPipeline, existing: Earlier, asked: tuple[int, ...]) -> None:
    """Writes labels and samples.json of existing images.

    They are missing if a run was killed before it wrote them; an earlier version wrote less.
    """
    if relay.config.sampling.files == "png":
        _write_labels(relay, existing.all_seeds(asked), existing.folder / "images")
    if not set(asked) <= set(existing.seeds):
        _write_made_with(relay, existing.all_seeds(asked), existing.folder)


def _write_npz(
    relay: RelayPipeline, parts: SampleShards, made: np.ndarray, existing: Earlier
) -> None:
    """Writes samples.npz of the existing and the new images."""
    path, names = existing.folder / "samples.npz", [*relay.earlier, "images"]
    if existing.damaged or existing.more:  # it stays until the new one replaces it
        kept_as = move_aside(existing.folder, []) / "samples.npz"
        link_or_copy(path, kept_as)
        why = "is damaged" if existing.damaged else "has arrays that sampling does not write"
        log.warning("samples: %s %s, and is kept as %s", path, why, kept_as)
    kept = ~np.isin(existing.npz_seeds, made)
    seeds = np.concatenate([existing.npz_seeds[kept], made])
    others = {"labels": relay.labels(seeds), "seeds": seeds}
    if len(relay.classes):
        others["class_names"] = np.asarray(relay.classes.names)
    if relay.text:
        others["prompts"] = np.asarray(relay.prompts(seeds))
    before = Npz(path) if existing.has_npz else None
    write_npz(parts, made, names, others, path, before=before, kept=kept)


def _write_labels(relay: RelayPipeline, seeds: tuple[int, ...], folder: Path) -> None:
    """Writes the labels file of the PNGs that exist."""
    written = np.asarray([seed for seed in seeds if (folder / png_name(seed)).is_file()], np.int64)
    prompts = relay.prompts(written) if relay.text else ()
    write_labels(written, relay.labels(written), relay.classes.names, folder, prompts)


def _write_made_with(relay: RelayPipeline, seeds: tuple[int, ...], folder: Path) -> None:
    with atomic_write(folder / SAMPLES) as partial:
        partial.write_text(json.dumps(describe(with_seeds(relay.config, seeds), relay), indent=2))


def _free_grid(folder: Path) -> Path:
    """The path for a new grid."""
    if not is_whole_png(folder / "grid.png"):
        return folder / "grid.png"
    return next(path for n in itertools.count(2) if not (path := folder / f"grid-{n}.png").exists())


def _digest(made_with: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(made_with, sort_keys=True).encode()).hexdigest()[:12]


def _draw(
    relay: RelayPipeline,
    parts: SampleShards,
    rows: list[tuple[str, list[int]]],
    source: ImageSet | None,
) -> Image.Image:
    shown = sorted({seed for _, seeds in rows for seed in seeds})
    index = {seed: i for i, seed in enumerate(shown)}
    seeds = np.asarray(shown, np.int64)
    images = parts.read(seeds)
    nearest = pictures.nearest_real(images[-1], source)[0] if source else None
    named_rows = [(name, [index[seed] for seed in seeds]) for name, seeds in rows]
    return pictures.relay_grid(images, nearest, named_rows, relay.captions_below(seeds))
