"""From seeds to files: samples.npz, grid.png and samples.json, made in parts so that an interrupted run goes on."""

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rdm_jax.checks import parse_numbers
from rdm_jax.config import Config, to_dict
from rdm_jax.data.image_sets import ImageSet
from rdm_jax.files import whole_file
from rdm_jax.interrupt import StopOnSignal
from rdm_jax.sampling import pictures
from rdm_jax.sampling.relay import Relay
from rdm_jax.sampling.sampler import evaluations, handover, stage_settings
from rdm_jax.terminal import log, progress

COLUMNS, ROWS = 3, 10  # examples a row of the grid, and its rows


def describe(config: Config, relay: Relay) -> dict[str, Any]:
    """All that the images depend on, as JSON: what the samples were made with."""
    stages = {f"stage{number}": stage_settings(config, number) for number in range(relay.first, len(config.stages) + 1)}
    sampling = {k: v for k, v in to_dict(config)["sampling"].items() if k not in ("name", "batch_size")}
    about = {"seed": config.seed, "sampling": sampling, "stages": stages, "checkpoints": relay.checkpoints}
    if relay.low:
        about["low_images"] = relay.low.digest(_seeds(config))
    return json.loads(json.dumps(about))


def _seeds(config: Config) -> np.ndarray:
    return np.asarray(parse_numbers(config.sampling.seeds, "config.sampling.seeds"), np.int64)


def sample_to_files(relay: Relay, source: ImageSet | None, workdir: Path, stop: StopOnSignal) -> None:
    """Samples every configured seed and leaves, under workdir/<sampling.name>:

    samples.npz ('images' uint8 NHWC, 'labels', 'seeds', and 'stage1', ... uint8), grid.png, and samples.json (what they were
    made with). Finished batches are kept in a folder beside them until all are there, so that an interrupted run goes on.

    Args:
      source: prepared images, the nearest of which the grid shows; None to leave them out.

    Raises:
      InputError: a small image to start from cannot be used.
      Interrupted: a signal came; the batches done so far are kept.
    """
    config, folder = relay.config, workdir / relay.config.sampling.name
    made_with, seeds = describe(config, relay), _seeds(config)
    if _is_done(folder, made_with):
        log.info("samples: %d images are already in %s", len(seeds), folder)
        return
    if relay.low:
        log.info("samples: from the images of %s, in place of stage%d's", config.sampling.low, relay.low.stage)
    for number, loaded in enumerate(relay.checkpoints, relay.first):
        stage = config.stages[number - 1]
        about = (number, loaded["step"], evaluations(stage), stage.guidance)
        log.info("samples: stage%d from step %d, %d network evaluations an image, guidance %g", *about)
        if number > 1:
            log.info("samples: stage%d %s", number, handover(stage))
    began = time.perf_counter()
    stages = _sample_in_parts(relay, seeds, folder / f".parts-{_digest(made_with)}", stop)
    seconds = time.perf_counter() - began
    arrays = {"images": stages[-1], "labels": relay.labels(seeds), "seeds": seeds}
    earlier = len(config.stages) - len(stages) + 1  # number of the first stage whose images there are
    arrays.update({f"stage{number}": images for number, images in enumerate(stages[:-1], earlier)})
    (folder / "samples.json").unlink(missing_ok=True)  # it vouches for the others, so it comes last
    _save_npz(folder / "samples.npz", arrays)
    pictures.save_picture(_draw(stages, arrays["labels"], relay.class_names, source), folder / "grid.png")
    with whole_file(folder / "samples.json") as partial:
        partial.write_text(json.dumps(made_with, indent=2))
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
    with whole_file(path) as partial, partial.open("wb") as file:
        np.savez_compressed(file, **arrays)


def _sample_in_parts(relay: Relay, seeds: np.ndarray, folder: Path, stop: StopOnSignal) -> list[np.ndarray]:
    """Samples batch by batch; a batch whose file is there already is read instead of made."""
    folder.mkdir(parents=True, exist_ok=True)
    batch_size, parts = relay.config.sampling.batch_size, []
    with progress(len(seeds), "sampling") as bar:
        for first in range(0, len(seeds), batch_size):
            some = seeds[first : first + batch_size]
            path = folder / f"{first:010d}-{len(some)}.npz"
            if not path.exists():
                _save_npz(path, {f"stage{i}": images for i, images in enumerate(relay.sample(some))})
            with np.load(path) as part:
                parts.append([part[f"stage{i}"] for i in range(len(part.files))])
            bar.update(len(some))
            stop.check()
    return [np.concatenate(images) for images in zip(*parts, strict=True)]


def _draw(stages: list[np.ndarray], labels: np.ndarray, class_names: tuple[str, ...], source: ImageSet | None) -> Image.Image:
    """A row a class, evenly chosen if there are many; rows of any images where there are no classes."""
    if class_names:
        known = np.unique(labels)
        known = known[np.linspace(0, len(known) - 1, min(ROWS, len(known))).astype(int)]
        rows = [(class_names[c], np.flatnonzero(labels == c)[:COLUMNS].tolist()) for c in known]
    else:
        rows = [("", list(range(i, min(i + COLUMNS, len(labels))))) for i in range(0, min(len(labels), ROWS * COLUMNS), COLUMNS)]
    shown = sorted({number for _, numbers in rows for number in numbers})
    place = {number: i for i, number in enumerate(shown)}
    images = [stage[shown] for stage in stages]
    nearest = pictures.nearest_real(images[-1], source)[0] if source else None
    return pictures.relay_grid(images, nearest, [(name, [place[n] for n in numbers]) for name, numbers in rows])
