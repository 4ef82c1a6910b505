"""Images made in parts, each kept in a file until all are there, so that an interrupted run goes
on."""

import collections
import concurrent.futures
import hashlib
import itertools
import json
import os
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Int, UInt8
from PIL import Image

from rdm_jax.render import pictures
from rdm_jax.runtime import distributed
from rdm_jax.runtime.console import progress
from rdm_jax.runtime.files import atomic_write, is_whole_npz
from rdm_jax.runtime.npz import Npz
from rdm_jax.runtime.signals import StopOnSignal
from rdm_jax.sampling.pipeline import RelayPipeline, in_batches

# Threads that compress and write, and the batches that may wait for them before the devices do.
WRITERS = min(8, os.cpu_count() or 1)
WAITING = 2 * WRITERS
ROWS = 256  # images at a time, of a file that is copied
LABELS = "dataset.json"


class SampleShards(NamedTuple):
    """The images of some seeds, in files of up to a batch each.

    Attributes:
      places: the file that a seed's images are in, and their row there.
    """

    places: dict[int, tuple[Path, int]]

    def runs(
        self, seeds: Int[np.ndarray, " n"]
    ) -> Iterator[tuple[np.lib.npyio.NpzFile, list[int]]]:
        """Open files, and the rows in them that are the images of these seeds, in their order."""
        for path, group in itertools.groupby(seeds.tolist(), lambda seed: self.places[seed][0]):
            with np.load(path) as part:
                yield part, [self.places[seed][1] for seed in group]

    def read(self, seeds: Int[np.ndarray, " n"]) -> list[np.ndarray]:
        """The images of every stage of these seeds, uint8 (n, h, w, c)."""
        stages = [
            [part[name][rows] for name in part.files if name != "seeds"]
            for part, rows in self.runs(seeds)
        ]
        return [np.concatenate(images) for images in zip(*stages, strict=True)]


def sample_in_parts(
    relay: RelayPipeline, seeds: Int[np.ndarray, " n"], folder: Path, stop: StopOnSignal
) -> tuple[SampleShards, float]:
    """Makes what is not in the folder yet, every process its share; returns once all is there.

    While the devices make a batch, the one before it is compressed and written by threads.

    Args:
      folder: where batches are kept, in arrays 'seeds' and 'stage0', 'stage1', ...; all of one
        setting, of any seeds.

    Returns:
      The parts; and images a second, of all processes, the first batch with its compilation left
      out (nan for one batch).

    Raises:
      InputError: a checkpoint makes what is not finite.
      Interrupted: a signal came; the batches done so far are kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    places = _finished(relay, folder)
    there = distributed.allgather(
        np.asarray([seed in places for seed in seeds.tolist()], bool)
    ).all(0)
    batches = in_batches(seeds[~there], relay.config.sampling.batch_size)
    new = [(folder / _part_name(relay, batch), batch) for batch in batches if len(batch)]
    share = new[jax.process_index() :: jax.process_count()]
    rate = _make(relay, share, stop, before=int(there.sum()) // jax.process_count())
    distributed.wait_for_all("made all parts")
    for path, batch in new:
        places |= {seed: (path, row) for row, seed in enumerate(batch.tolist())}
    return SampleShards(places), rate


def seeds_of_part(path: Path) -> Int[np.ndarray, " n"] | None:
    """The seeds whose images are in a file; None where it is none of ours, or damaged."""
    try:
        with np.load(path) as part:
            return part["seeds"].astype(np.int64)
    except Exception:  # numpy, zipfile and zlib each raise their own
        return None


def _finished(relay: RelayPipeline, folder: Path) -> dict[int, tuple[Path, int]]:
    """What earlier runs have finished, by seed. Each process looks for damage in its share of the
    files."""
    places, names = (
        {},
        ["seeds", *(_array_name(number) for number in range(len(relay.earlier) + 1))],
    )
    for number, path in enumerate(sorted(folder.glob("*.npz"))):
        seeds = seeds_of_part(path)
        if seeds is None or not len(seeds) or path.name != _part_name(relay, seeds):
            continue
        if number % jax.process_count() != jax.process_index() or is_whole_npz(path, names):
            places |= {seed: (path, row) for row, seed in enumerate(seeds.tolist())}
    return places


def _part_name(relay: RelayPipeline, seeds: Int[np.ndarray, " n"]) -> str:
    """What a file of the images of these seeds is called; another name where they are made of other
    small images."""
    made_of = [seeds.tolist(), relay.low.digest(seeds) if relay.low else ""]
    return f"{seeds[0]:010d}-{hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:12]}.npz"


def _make(
    relay: RelayPipeline, missing: list[tuple[Path, np.ndarray]], stop: StopOnSignal, before: int
) -> float:
    """Makes these parts; `before` images were there already."""
    turns, stop_of_all = (
        int(distributed.allgather(np.int32(len(missing))).max()),
        distributed.StopOfAll(stop),
    )
    made = sum(len(seeds) for _, seeds in missing)
    writing: collections.deque[concurrent.futures.Future] = collections.deque()
    begun, began = None, float("nan")
    with (
        concurrent.futures.ThreadPoolExecutor(WRITERS) as pool,
        progress(before + made, "sampling", before) as bar,
    ):
        for turn in range(turns + 1):
            following = relay.begin(missing[turn][1]) if turn < len(missing) else None
            if begun:
                writing.append(pool.submit(_save, *missing[turn - 1], relay.finish(begun)))
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
    return (
        jax.process_count() * (made - first) / (time.perf_counter() - began)
        if made > first
        else float("nan")
    )


def _save(path: Path, seeds: np.ndarray, stages: list[np.ndarray]) -> None:
    with atomic_write(path) as partial, partial.open("wb") as file:
        np.savez_compressed(
            file,
            seeds=seeds,
            **{_array_name(number): images for number, images in enumerate(stages)},
        )


def _array_name(number: int) -> str:
    """Of the images of a stage in a part, the first that is sampled being 0."""
    return f"stage{number}"


def write_npz(
    parts: SampleShards,
    seeds: Int[np.ndarray, " n"],
    names: list[str],
    others: dict[str, np.ndarray],
    path: Path,
    before: Npz | None = None,
    kept: Bool[np.ndarray, " m"] = np.zeros(0, bool),  # noqa: B008
) -> None:
    """One .npz of the images of every stage, by the names given, and other arrays; only a part at a
    time is in memory.

    Of the parts it takes the images of `seeds`, one or more.

    Args:
      before: a file with such images, which come first; it may be at `path`.
      kept: which of them.
    """
    with atomic_write(path) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as file:
        for number, name in enumerate(names):
            with file.open(_member(name), "w", force_zip64=True) as member:
                form = parts.read(seeds[:1])[number][0]
                shape = (int(kept.sum()) + len(seeds), *form.shape)
                header = {
                    "descr": np.lib.format.dtype_to_descr(form.dtype),
                    "fortran_order": False,
                    "shape": shape,
                }
                np.lib.format.write_array_header_2_0(member, header)
                for first in range(0, len(kept), ROWS):
                    chosen = kept[first : first + ROWS]
                    member.write(before.rows(name, first, len(chosen))[chosen].tobytes())
                for part, rows in parts.runs(seeds):
                    member.write(part[_array_name(number)][rows].tobytes())
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


def write_png(parts: SampleShards, seeds: Int[np.ndarray, " n"], folder: Path) -> None:
    """A .png of each final image, named by its seed; whatever else is in the folder stays."""
    folder.mkdir(parents=True, exist_ok=True)
    names = iter([png_name(seed) for seed in seeds])
    with concurrent.futures.ThreadPoolExecutor(WRITERS) as pool:
        for part, rows in parts.runs(seeds):
            images = part[part.files[-1]][rows]
            list(
                pool.map(
                    lambda image, name: _save_png(image, folder / name),
                    images,
                    [next(names) for _ in rows],
                )
            )


def write_labels(
    seeds: Int[np.ndarray, " n"],
    labels: Int[np.ndarray, " n"],
    names: tuple[str, ...],
    folder: Path,
) -> None:
    """EDM's dataset.json of pictures: their class numbers, and the names of the classes, which
    EDM's tools skip."""
    listed = sorted((png_name(seed), int(label)) for seed, label in zip(seeds, labels, strict=True))
    text = json.dumps(
        {"labels": listed, "class_names": names} if names else {"labels": None}
    ).encode()
    if not (folder / LABELS).is_file() or (folder / LABELS).read_bytes() != text:
        with atomic_write(folder / LABELS) as partial:
            partial.write_bytes(text)


def _save_png(image: UInt8[np.ndarray, "h w c"], path: Path) -> None:
    pictures.save_picture(Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image), path)
