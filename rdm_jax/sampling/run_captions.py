"""The captions that a run was trained with, kept in its workdir, to sample with."""

import dataclasses
import functools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from rdm_jax.data.image_sets import ImageSet
from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.files import atomic_write, parse_json

Pair = tuple[str, str]  # a caption, and the name of a class
VERSION = 1
MOST = 2**16  # captions of each kind that are kept


@dataclasses.dataclass(frozen=True)
class Captions:
    """Captions of a run in a fixed random order, each once with each class of its images.

    Attributes:
      training: of images that the run was trained on.
      held_out: of held-out images, without those of images that the run was trained on.
      complete: whether `training` has every caption that the run was trained on.
      training_classes, held_out_classes: the name of the class beside each caption; () if there
        are no classes, or an earlier version wrote the captions.
    """

    training: tuple[str, ...]
    held_out: tuple[str, ...] = ()
    complete: bool = True
    training_classes: tuple[str, ...] = ()
    held_out_classes: tuple[str, ...] = ()

    @classmethod
    def of(cls, training: Iterable[Pair], held_out: Iterable[Pair] = ()) -> "Captions":
        """The captions of training and held-out images, at most `MOST` of each kind.

        Images without a caption have '', and so have those without a class.
        """
        seen = {pair for pair in training if pair[0]}
        known = {folded(caption) for caption, _ in seen}
        unseen = {pair for pair in held_out if pair[0] and folded(pair[0]) not in known}
        (learnt, classes), (others, their_classes) = _some(seen), _some(unseen)
        return cls(learnt, others, len(seen) <= MOST, classes, their_classes)

    def are_held_out(self, prompts: Iterable[str]) -> list[bool]:
        """Whether the run was certainly not trained on each prompt as a caption.

        Case and spaces do not matter. Where `training` is not complete, these are the prompts among
        `held_out`; else all that are not among `training`.
        """
        unseen, seen = self._folded
        return [
            folded(prompt) in unseen or (self.complete and folded(prompt) not in seen)
            for prompt in prompts
        ]

    @functools.cached_property
    def _folded(self) -> tuple[frozenset[str], frozenset[str]]:
        """`held_out` and `training`, to look prompts up."""
        unseen, seen = (frozenset(map(folded, part)) for part in (self.held_out, self.training))
        return unseen, seen

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
        if values["version"] != VERSION or type(values["complete"]) is not bool:
            raise ValueError("it has other fields")
        found = {name: _texts(values[name]) for name in ("training", "held_out")}
        for name, captions in tuple(found.items()):
            classes = found[f"{name}_classes"] = _texts(values.get(f"{name}_classes", []))
            if len(classes) not in (0, len(captions)):
                raise ValueError(f"{name} has {len(captions)} captions of {len(classes)} classes")
        return Captions(**found, complete=values["complete"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} cannot be read as the captions of a run ({error})",
            "Delete it, and give --config.sampling.prompts.",
        ) from error


def _texts(values: Any) -> tuple[str, ...]:
    if type(values) is not list or not all(type(value) is str for value in values):
        raise ValueError("it has captions or classes that are not text")
    return tuple(values)


def mark(caption: str, held_out: bool) -> str:
    """A caption for a picture, marked if it is held out."""
    return f"{caption} [held out]" if held_out else caption


def folded(caption: str) -> str:
    """A caption to compare: case and spaces do not matter."""
    return " ".join(caption.casefold().split())


def pairs_of(images: ImageSet) -> list[Pair]:
    """The caption of each image of a set, and the name of its class; '' where there is none."""
    captions = images.caption() or []
    if not images.class_names:
        return [(caption, "") for caption in captions]
    names = (*images.class_names, "")  # an image without a class has the label -1
    labels = images.labels().tolist()
    return [(caption, names[label]) for caption, label in zip(captions, labels, strict=True)]


def _some(pairs: set[Pair]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    ordered = sorted(pairs)
    chosen = np.random.default_rng(0).permutation(len(ordered))[:MOST]
    some = [ordered[i] for i in chosen]
    classes = tuple(name for _, name in some)
    return tuple(caption for caption, _ in some), classes if any(classes) else ()
