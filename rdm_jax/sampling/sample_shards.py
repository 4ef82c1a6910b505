"""Sampling in shards: each batch is kept in a file until all exist, so that a run can resume."""

import collections
import concurrent.futures
import hashlib
import itertools
import json
import os
import time
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Int, UInt8
from PIL import Image

from rdm_jax.render import pictures
from rdm_jax.runtime import distributed, mounts
from rdm_jax.runtime.console import progress
from rdm_jax.runtime.files import atomic_write, is_whole_npz
from rdm_jax.runtime.npz import Npz
from rdm_jax.runtime.signals import StopOnSignal
from rdm_jax.sampling.pipeline import RelayPipeline
from rdm_jax.sampling.stage_sampler import in_batches

WRITERS = min(8, os.cpu_count() or 1)  # threads that compress and write
WAITING = 2 * WRITERS  # batches that may wait for them before the devices have to
ROWS = 256  # images that are copied at a time from an existing file
LABELS = "dataset.json"


class SampleShards(NamedTuple):
    """The images of some seeds, in files of up to one batch.

    Attributes:
      places: the file of each seed's images, and their row in it.
    """

    places: dict[int, tuple[Path, int]]

    def runs(
        self, seeds: Int[np.ndarray, " n"]
    ) -> Iterator[tuple[np.lib.npyio.NpzFile, list[int]]]:
        """Yields open files and the rows of these seeds' images in them, in the order of seeds."""
        for path, group in itertools.groupby(seeds.tolist(), lambda seed: self.places[seed][0]):
            with np.load(path) as part:
                yield part, [self.places[seed][1] for seed in group]

    def read(self, seeds: Int[np.ndarray, " n"]) -> list[np.ndarray]:
        """The images of every stage for these seeds, each uint8 (n, h, w, c)."""
        stages = [
            [part[name][rows] for name in part.files if name != "seeds"]
            for part, rows in self.runs(seeds)
        ]
        return [np.concatenate(images) for images in zip(*stages, strict=True)]


def sample_in_parts(
    relay: RelayPipeline, seeds: Int[np.ndarray, " n"], folder: Path, stop: StopOnSignal
) -> tuple[SampleShards, float]:
    """Samples what is not in the folder yet; every process does its share.

    While the devices compute a batch, threads compress and write the one before it. Returns once
    all shards of all processes exist.

    Args:
      relay: the pipeline.
      seeds: (n,).
      folder: of the shards, with arrays 'seeds' and 'stage0', 'stage1', ...; all shards have the
        same settings and any seeds.
      stop: checked after every batch.

    Returns:
      The shards; and images per second of all processes together, without the first batch and its
      compilation (nan for one batch).

    Raises:
      InputError: an image has values that are not finite.
      Interrupted: a signal came; the finished batches are kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    places = _finished(relay, folder, seeds)
    finished = np.asarray([seed in places for seed in seeds.tolist()], bool)
    batches = in_batches(seeds[~finished], relay.config.sampling.batch_size)
    new = [(folder / _part_name(relay, batch), batch) for batch in batches if len(batch)]
    share = new[jax.process_index() :: jax.process_count()]
    rate = _make(relay, share, stop, before=int(finished.sum()) // jax.process_count())
    distributed.wait_for_all("sample")
    for path, batch in new:
        places |= {seed: (path, row) for row, seed in enumerate(batch.tolist())}
    return SampleShards(places), rate


def seeds_of_part(path: Path) -> Int[np.ndarray, " n"] | None:
    """The seeds whose images are in a shard; None if the file is damaged or not a shard."""
    try:
        with np.load(path) as part:
            return part["seeds"].astype(np.int64)
    except Exception:  # numpy, zipfile and zlib each raise their own
        return None


def _finished(
    relay: RelayPipeline, folder: Path, seeds: Int[np.ndarray, " n"]
) -> dict[int, tuple[Path, int]]:
    """Files and rows of the images of these seeds that earlier runs have finished, by seed.

    Each process reads its share of the files that process 0 lists.
    """
    files = distributed.primary_alone(
        "lists finished samples", lambda: sorted(path.name for path in folder.glob("*.npz"))
    )
    index = {seed: number for number, seed in enumerate(seeds.tolist())}
    found = np.full((len(seeds), 2), -1, np.int32)  # number of the file, and row
    names = ["seeds", *(_array_name(number) for number in range(len(relay.earlier) + 1))]
    for number in range(jax.process_index(), len(files), jax.process_count()):
        path = folder / files[number]
        made = seeds_of_part(path)
        if made is None or not len(made) or path.name != _part_name(relay, made):
            continue
        if is_whole_npz(path, names):
            for row, seed in enumerate(made.tolist()):
                if seed in index:
                    found[index[seed]] = number, row
    places = {}
    for part in distributed.allgather(found).tolist():
        for seed, (number, row) in zip(seeds.tolist(), part, strict=True):
            if number >= 0:
                places[seed] = folder / files[number], row
    return places


def _part_name(relay: RelayPipeline, seeds: Int[np.ndarray, " n"]) -> str:
    """The file name of a shard of these seeds; other small images give another name."""
    made_of = [seeds.tolist(), relay.low.digest(seeds) if relay.low else ""]
    return f"{seeds[0]:010d}-{hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:12]}.npz"


def _make(
    relay: RelayPipeline, missing: list[tuple[Path, np.ndarray]], stop: StopOnSignal, before: int
) -> float:
    """Samples the missing shards of this process; `before` images exist already.

    Returns:
      Images per second, as `sample_in_parts` does.
    """
    turns = int(distributed.allgather(np.int32(len(missing))).max())
    stop_of_all = distributed.StopOfAll(stop)
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
                if turn == 1:  # the first batch compiles, and is not timed
                    began = time.perf_counter()
            while len(writing) > WAITING:
                writing.popleft().result()
            begun = following
            if turn:  # the first batch is kept in any case
                stop_of_all.check()
        for future in writing:
            future.result()
    first = len(missing[0][1]) if missing else 0
    if made == first:
        return float("nan")
    return jax.process_count() * (made - first) / (time.perf_counter() - began)


def _save(path: Path, seeds: np.ndarray, stages: list[np.ndarray]) -> None:
    with atomic_write(path) as partial, partial.open("wb") as file:
        np.savez_compressed(
            file,
            seeds=seeds,
            **{_array_name(number): images for number, images in enumerate(stages)},
        )
    mounts.push()


def _array_name(number: int) -> str:
    """The array of a stage's images in a shard; the first stage that is sampled is 0."""
    return f"stage{number}"


def write_npz(
    parts: SampleShards,
    seeds: Int[np.ndarray, " n"],
    names: list[str],
    others: dict[str, np.ndarray],
    path: Path,
    before: Npz | None = None,
    kept: Bool[np.ndarray, " m"] | None = None,
) -> None:
    """Writes one .npz of the images of every stage and other arrays, a shard at a time in memory.

    Args:
      parts: the shards.
      seeds: (n,), one or more, whose images are taken from the shards.
      names: of the stages' arrays, in the order of the stages.
      others: other arrays by name.
      path: of the file to write.
      before: an existing file, whose images come first; it may be at `path`.
      kept: (m,), which of its images are kept; None for none.
    """
    kept = np.zeros(0, bool) if kept is None else kept
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
    """A member without a time stamp, so that equal arrays give equal files."""
    info = zipfile.ZipInfo(f"{name}.npy")
    info.compress_type = zipfile.ZIP_DEFLATED
    return info


def png_name(seed: int | np.integer) -> str:
    """The file name of a seed's image."""
    return f"{seed:010d}.png"


def write_png(parts: SampleShards, seeds: Int[np.ndarray, " n"], folder: Path) -> None:
    """Writes a PNG of each final image, named by its seed; other files in the folder stay."""
    folder.mkdir(parents=True, exist_ok=True)
    names = iter([png_name(seed) for seed in seeds])
    with concurrent.futures.ThreadPoolExecutor(WRITERS) as pool:
        for part, rows in parts.runs(seeds):
            images = part[part.files[-1]][rows]
            paths = [folder / next(names) for _ in rows]
            for _ in pool.map(_save_png, images, paths):  # waits, and raises what a thread raised
                pass


def write_labels(
    seeds: Int[np.ndarray, " n"],
    labels: Int[np.ndarray, " n"],
    names: tuple[str, ...],
    folder: Path,
    prompts: Sequence[str] = (),
) -> None:
    """Writes EDM's dataset.json: class indices by file name.

    It also has the names of the classes, and the prompts by file name, which EDM's tools ignore.
    """
    listed = sorted((png_name(seed), int(label)) for seed, label in zip(seeds, labels, strict=True))
    values = {"labels": listed, "class_names": names} if names else {"labels": None}
    if prompts:
        values["captions"] = sorted(zip(map(png_name, seeds), prompts, strict=True))
    text = json.dumps(values).encode()
    if not (folder / LABELS).is_file() or (folder / LABELS).read_bytes() != text:
        with atomic_write(folder / LABELS) as partial:
            partial.write_bytes(text)


def _save_png(image: UInt8[np.ndarray, "h w c"], path: Path) -> None:
    pictures.save_picture(Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image), path)
