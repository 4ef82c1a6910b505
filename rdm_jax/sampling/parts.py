"""Images made in parts, each kept in a file until all are there, so that an interrupted run goes on."""

import collections
import concurrent.futures
import json
import os
import time
import zipfile
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Int, UInt8
from PIL import Image

from rdm_jax import distributed
from rdm_jax.evaluation.npz import Npz
from rdm_jax.files import is_whole_npz, whole_file
from rdm_jax.interrupt import StopOnSignal
from rdm_jax.sampling import pictures
from rdm_jax.sampling.relay import Relay
from rdm_jax.terminal import progress

# Threads that compress and write, and the batches that may wait for them before the devices do.
WRITERS = min(8, os.cpu_count() or 1)
WAITING = 2 * WRITERS
ROWS = 256  # images at a time, of a file that is copied
LABELS = "dataset.json"


class Parts(NamedTuple):
    """The images of some seeds, in files of `size` each: arrays 'stage0', 'stage1', ... uint8 (b, h, w, c)."""

    paths: list[Path]
    size: int
    count: int

    def read(self, numbers: Int[np.ndarray, " n"]) -> list[np.ndarray]:
        """The images of every stage with these numbers."""
        rows = []
        for number in numbers:
            with np.load(self.paths[number // self.size]) as part:
                rows.append([part[name][number % self.size] for name in part.files])
        return [np.stack(images) for images in zip(*rows, strict=True)]


def sample_in_parts(relay: Relay, seeds: Int[np.ndarray, " n"], folder: Path, stop: StopOnSignal) -> tuple[Parts, float]:
    """Makes what is not in the folder yet, every process its share; returns once all parts are there.

    While the devices make a batch, the one before it is compressed and written by threads.

    Returns:
      The parts; and images a second, of all processes, the first batch with its compilation left out (nan for one batch).

    Raises:
      InputError: a checkpoint makes what is not finite.
      Interrupted: a signal came; the parts done so far are kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    size = relay.config.sampling.batch_size
    firsts = range(0, len(seeds), size)
    parts = Parts([folder / f"{first:010d}-{min(size, len(seeds) - first)}.npz" for first in firsts], size, len(seeds))
    share = range(jax.process_index(), len(firsts), jax.process_count())
    names = [_array_name(number) for number in range(len(relay.earlier) + 1)]
    missing = [(parts.paths[n], seeds[firsts[n] : firsts[n] + size]) for n in share if not is_whole_npz(parts.paths[n], names)]
    rate = _make(relay, missing, stop, done=sum(len(seeds[firsts[n] : firsts[n] + size]) for n in share))
    distributed.wait_for_all("made all parts")
    return parts, rate


def _make(relay: Relay, missing: list[tuple[Path, np.ndarray]], stop: StopOnSignal, done: int) -> float:
    """Makes these parts, of a share of `done` images in the end."""
    turns, stop_of_all = int(distributed.gathered(np.int32(len(missing))).max()), distributed.StopOfAll(stop)
    made = sum(len(seeds) for _, seeds in missing)
    writing: collections.deque[concurrent.futures.Future] = collections.deque()
    begun, began = None, float("nan")
    with concurrent.futures.ThreadPoolExecutor(WRITERS) as pool, progress(done, "sampling", done - made) as bar:
        for turn in range(turns + 1):
            following = relay.begin(missing[turn][1]) if turn < len(missing) else None
            if begun:
                writing.append(pool.submit(_save, missing[turn - 1][0], relay.finish(begun)))
                bar.update(begun.count)
                began = time.perf_counter() if turn == 1 else began
            while len(writing) > WAITING:
                writing.popleft().result()
            begun = following
            if turn:  # what was begun first is kept
                stop_of_all.check()
        for future in writing:
            future.result()
    first = len(missing[0][1]) if missing else 0
    return jax.process_count() * (made - first) / (time.perf_counter() - began) if made > first else float("nan")


def _save(path: Path, stages: list[np.ndarray]) -> None:
    with whole_file(path) as partial, partial.open("wb") as file:
        np.savez_compressed(file, **{_array_name(number): images for number, images in enumerate(stages)})


def _array_name(number: int) -> str:
    """Of the images of a stage in a part, the first that is sampled being 0."""
    return f"stage{number}"


def write_npz(
    parts: Parts,
    names: list[str],
    others: dict[str, np.ndarray],
    path: Path,
    before: Npz | None = None,
    kept: Bool[np.ndarray, " m"] = np.zeros(0, bool),  # noqa: B008
) -> None:
    """One .npz of the images of every stage, by the names given, and other arrays; only a part at a time is in memory.

    Args:
      before: a file with such images, which come first; it may be at `path`.
      kept: which of them.
    """
    with whole_file(path) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as file:
        for number, name in enumerate(names):
            with file.open(_member(name), "w", force_zip64=True) as member:
                with np.load(parts.paths[0]) as part:
                    form = part[_array_name(number)][0]
                shape = (int(kept.sum()) + parts.count, *form.shape)
                header = {"descr": np.lib.format.dtype_to_descr(form.dtype), "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_2_0(member, header)
                for first in range(0, len(kept), ROWS):
                    chosen = kept[first : first + ROWS]
                    member.write(before.rows(name, first, len(chosen))[chosen].tobytes())
                for part_path in parts.paths:
                    with np.load(part_path) as part:
                        member.write(part[_array_name(number)].tobytes())
        for name, array in others.items():
            with file.open(_member(name), "w") as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def _member(name: str) -> zipfile.ZipInfo:
    """Without the time, so that the same arrays make the same file."""
    info = zipfile.ZipInfo(f"{name}.npy")
    info.compress_type = zipfile.ZIP_DEFLATED
    return info


def png_name(seed: int | np.integer) -> str:
    """What the image of a seed is called."""
    return f"{seed:010d}.png"


def write_png(parts: Parts, seeds: Int[np.ndarray, " n"], folder: Path) -> None:
    """A .png of each final image, named by its seed; whatever else is in the folder stays."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [png_name(seed) for seed in seeds]
    with concurrent.futures.ThreadPoolExecutor(WRITERS) as pool:
        for index, part_path in enumerate(parts.paths):
            with np.load(part_path) as part:
                images = part[part.files[-1]]
            here = names[index * parts.size :]
            list(pool.map(lambda image, name: _save_png(image, folder / name), images, here))


def write_labels(seeds: Int[np.ndarray, " n"], labels: Int[np.ndarray, " n"], names: tuple[str, ...], folder: Path) -> None:
    """EDM's dataset.json of pictures: their class numbers, and the names of the classes, which EDM's tools skip."""
    listed = sorted((png_name(seed), int(label)) for seed, label in zip(seeds, labels, strict=True))
    text = json.dumps({"labels": listed, "class_names": names} if names else {"labels": None}).encode()
    if not (folder / LABELS).is_file() or (folder / LABELS).read_bytes() != text:
        with whole_file(folder / LABELS) as partial:
            partial.write_bytes(text)


def _save_png(image: UInt8[np.ndarray, "h w c"], path: Path) -> None:
    pictures.save_picture(Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image), path)
