"""Reads written samples back, so that an evaluation does not have to sample them again."""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from rdm_jax.interop import latent_space
from rdm_jax.runtime import distributed
from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.npz import Npz
from rdm_jax.sampling import earlier
from rdm_jax.sampling.made_with import describe, same_settings, with_seeds
from rdm_jax.sampling.pipeline import RelayPipeline
from rdm_jax.sampling.sample_shards import png_name


class SavedSamples(ABC):
    """Images that sampling has written, by seed."""

    @abstractmethod
    def read(self, seeds: Int[np.ndarray, " n"]) -> dict[str, UInt8[np.ndarray, "n _h _w c"]]:
        """The images of seeds by array name ('images', 'stage1', ...), in the order of the seeds.

        Raises:
          InputError: a file cannot be read any more.
        """


class _NpzSamples(SavedSamples):
    def __init__(self, path: Path, names: Sequence[str], seeds: Int[np.ndarray, " m"]):
        # One reader per array: each keeps its position, so that batches in order are decompressed
        # once.
        self._files = {name: Npz(path) for name in names}
        self._rows = {seed: row for row, seed in enumerate(seeds.tolist())}

    def read(self, seeds: Int[np.ndarray, " n"]) -> dict[str, UInt8[np.ndarray, "n _h _w c"]]:
        spans = list(_spans([self._rows[seed] for seed in seeds.tolist()]))
        return {
            name: np.concatenate([file.rows(name, first, count) for first, count in spans])
            for name, file in self._files.items()
        }


class _PngSamples(SavedSamples):
    def __init__(self, folder: Path):
        self._folder = folder

    def read(self, seeds: Int[np.ndarray, " n"]) -> dict[str, UInt8[np.ndarray, "n _h _w c"]]:
        return {"images": np.stack([self._image(self._folder / png_name(s)) for s in seeds])}

    def _image(self, path: Path) -> UInt8[np.ndarray, "h w c"]:
        try:
            return _decode(path)
        except (OSError, SyntaxError, ValueError) as error:
            raise InputError(
                f"{path} cannot be read ({error})", "Sample it again with --mode=sample."
            ) from error


def find_saved(
    relay: RelayPipeline, folder: Path, seeds: Int[np.ndarray, " n"], names: Sequence[str]
) -> SavedSamples | None:
    """Finds written samples that equal what the pipeline makes of these seeds.

    They have the same settings, checkpoints and classes, and their files are intact. All processes
    must call it together.

    Args:
      relay: the pipeline.
      folder: of the samples, with samples.json.
      seeds: whose images are needed.
      names: the needed arrays: 'images' for the last stage, and those of `relay.earlier`, which
        only a samples.npz has.

    Returns:
      The samples; None if one of the processes does not find all of them.
    """
    saved = _find(relay, folder, seeds, names)
    found_by_all = distributed.allgather(np.asarray(saved is not None)).all()
    return saved if found_by_all else None


def _find(
    relay: RelayPipeline, folder: Path, seeds: Int[np.ndarray, " n"], names: Sequence[str]
) -> SavedSamples | None:
    try:
        before = earlier.read_made_with(folder)
        if not before or not set(seeds.tolist()) <= set(earlier.seeds_of(before)):
            return None
        ours = describe(with_seeds(relay.config, earlier.seeds_of(before)), relay)
        if not same_settings(before, ours):
            return None
        if relay.config.sampling.files == "png":
            return _find_png(relay, folder, seeds, names)
        return _find_npz(relay, folder / earlier.NPZ, seeds, names)
    except (InputError, OSError):  # sampling again says what is wrong, if anything is
        return None


def _find_npz(
    relay: RelayPipeline, path: Path, seeds: Int[np.ndarray, " n"], names: Sequence[str]
) -> SavedSamples | None:
    index = earlier.read_npz_index(path, relay)
    if index is None:
        return None
    written, labels, _ = index
    if not _labels_match(relay, seeds, dict(zip(written.tolist(), labels.tolist(), strict=True))):
        return None
    with Npz(path) as file:
        shapes = {name: (file.arrays[name][0][1:], file.arrays[name][1]) for name in names}
    expected = {name: (_shape(relay, name), np.dtype(np.uint8)) for name in names}
    return _NpzSamples(path, names, written) if shapes == expected else None


def _find_png(
    relay: RelayPipeline, folder: Path, seeds: Int[np.ndarray, " n"], names: Sequence[str]
) -> SavedSamples | None:
    if set(names) != {"images"}:
        return None
    if len(relay.classes) and not _labels_match(relay, seeds, earlier.read_png_labels(folder)):
        return None
    shape = _shape(relay, "images")
    for seed in seeds[jax.process_index() :: jax.process_count()]:  # the others check theirs
        try:
            if _decode(folder / "images" / png_name(seed)).shape != shape:
                return None
        except (OSError, SyntaxError, ValueError):  # Pillow raises each of these
            return None
    return _PngSamples(folder / "images")


def _labels_match(
    relay: RelayPipeline, seeds: Int[np.ndarray, " n"], labels: dict[int, int]
) -> bool:
    """Whether the samples have all seeds, each with the class that the settings give it."""
    return [labels.get(seed) for seed in seeds.tolist()] == relay.labels(seeds).tolist()


def _shape(relay: RelayPipeline, name: str) -> tuple[int, ...]:
    """(h, w, c) of the images in an array."""
    number = len(relay.config.stages) if name == "images" else int(name.removeprefix("stage"))
    return latent_space.image_shape(relay.config, number)


def _decode(path: Path) -> UInt8[np.ndarray, "h w c"]:
    with Image.open(path) as image:
        pixels = np.asarray(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _spans(rows: list[int]) -> Iterator[tuple[int, int]]:
    """First row and length of each span of consecutive rows."""
    for _, span in itertools.groupby(enumerate(rows), lambda pair: pair[1] - pair[0]):
        numbers = [row for _, row in span]
        yield numbers[0], len(numbers)
