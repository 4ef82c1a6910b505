"""The captions that a run was trained with, kept in its workdir, to sample with."""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from rdm_jax.data.image_sets import ImageSet
from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.files import atomic_write, parse_json

VERSION = 1
MOST = 4096  # captions of each kind that are kept


@dataclasses.dataclass(frozen=True)
class Captions:
    """Captions of a run, each once and in a fixed random order.

    Attributes:
      training: of images that the run was trained on.
      held_out: of held-out images, without those of images that the run was trained on.
      complete: whether `training` has every caption that the run was trained on.
    """

    training: tuple[str, ...]
    held_out: tuple[str, ...] = ()
    complete: bool = True

    @classmethod
    def of(cls, training: Iterable[str], held_out: Iterable[str] = ()) -> "Captions":
        """The captions of training and held-out images, at most `MOST` of each kind.

        Images without a caption have ''.
        """
        seen = {caption for caption in training if caption}
        known = {plain(caption) for caption in seen}
        unseen = {caption for caption in held_out if caption and plain(caption) not in known}
        return cls(_some(seen), _some(unseen), complete=len(seen) <= MOST)

    def are_held_out(self, prompts: Iterable[str]) -> list[bool]:
        """Whether the run was certainly not trained on each prompt as a caption.

        Case and spaces do not matter. Where `training` is not complete, these are the prompts among
        `held_out`; else all that are not among `training`.
        """
        unseen, seen = (set(map(plain, part)) for part in (self.held_out, self.training))
        return [
            plain(prompt) in unseen or (self.complete and plain(prompt) not in seen)
            for prompt in prompts
        ]

    def write(self, path: Path) -> None:
        """Writes them as JSON, atomically."""
        values = {"version": VERSION, **dataclasses.asdict(self)}
        with atomic_write(path) as partial:
            partial.write_text(json.dumps(values, indent=1, ensure_ascii=False), "utf-8")


def read_captions(path: Path) -> Captions | None:
    """Reads what `Captions.write` has written; None if there is no such file.

    Raises:
      InputError: the file is damaged, or of a newer version of this package.
    """
    if not path.is_file():
        return None
    try:
        values = parse_json(path.read_bytes())
        parts = [values[name] for name in ("training", "held_out")]
        texts = all(type(text) is str for part in parts for text in part)
        if values["version"] != VERSION or not texts or type(values["complete"]) is not bool:
            raise ValueError("it has other fields")
        return Captions(*map(tuple, parts), complete=values["complete"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} cannot be read as the captions of a run ({error})",
            "Delete it, and give --config.sampling.prompts.",
        ) from error


def mark(caption: str, held_out: bool) -> str:
    """A caption for a picture, marked if it is held out."""
    return f"{caption} [held out]" if held_out else caption


def captions_of(images: ImageSet, indices: Int[np.ndarray, " n"] | None = None) -> list[str] | None:
    """The captions of images of a set, '' for none; None if the set has no captions.

    Args:
      images: the set.
      indices: of the images; None for all.
    """
    if text_of(images) is None:
        return None
    return list(images.caption(np.arange(len(images)) if indices is None else indices))


def text_of(images: ImageSet) -> dict[str, Any] | None:
    """What a checkpoint says of the text that it was trained with; None without captions."""
    return images.text and images.text._asdict()


def plain(caption: str) -> str:
    """A caption to compare: case and spaces do not matter."""
    return " ".join(caption.casefold().split())


def _some(captions: set[str]) -> tuple[str, ...]:
    ordered: Sequence[str] = sorted(captions)
    chosen = np.random.default_rng(0).permutation(len(ordered))[:MOST]
    return tuple(ordered[i] for i in chosen)
