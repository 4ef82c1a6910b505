"""The class of each image: of its seed, or as the caller asks."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from rdm_jax.data.classes import Classes, parse_labels
from rdm_jax.runtime import random_streams
from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.random_streams import RandomStream

Label = int | np.integer | str  # the index or the name of a class
Labels = Label | Sequence[Label] | np.ndarray | Array


def labels_of(
    seeds: Int[np.ndarray, " b"], rule: str, classes: Classes, *, run_seed: int
) -> Int[np.ndarray, " b"]:
    """int32 class indices of seeds, each from its seed alone; -1 if there are no classes.

    Args:
      seeds: of the images.
      rule: 'balanced', 'random', or a list of classes such as 'cat, dog' or '0,2-5'
        (config.Sampling.labels).
      classes: of the network.
      run_seed: the config's seed.

    Raises:
      InputError: the list has a name that is not a class, or that is ambiguous.
    """
    if not len(classes):
        return np.full(len(seeds), -1, np.int32)
    if rule == "random":
        keys = random_streams.image_keys(
            random_streams.stream_key(run_seed, 0, RandomStream.LABEL),
            jnp.asarray(seeds.astype(np.uint32)),
        )
        return np.asarray(
            jax.vmap(lambda key: jax.random.randint(key, (), 0, len(classes)))(keys), np.int32
        )
    if rule == "balanced":
        listed = np.arange(len(classes))
    else:
        listed = np.asarray(parse_labels(rule, classes, "config.sampling.labels"))
    return listed[seeds % len(listed)].astype(np.int32)


def labels_asked(labels: Labels, count: int, classes: Classes) -> Int[np.ndarray, " n"]:
    """int32 class indices of `count` images.

    Args:
      labels: a class of all images, or classes that they take in turn.
      count: of the images.
      classes: of the network.

    Raises:
      InputError: there is no such class, or no image depends on classes.
    """
    plain = _plain(labels)
    is_list = isinstance(plain, Iterable) and not isinstance(plain, str)
    listed = [_plain(label) for label in (plain if is_list else [plain])]
    if not len(classes):
        raise InputError(
            f"labels={labels!r:.60} is of no use: no image depends on classes", "Leave it out."
        )
    if count and not listed:
        raise InputError(f"labels={labels!r} has no classes", "Give one or more.")
    for label in listed:
        if type(label) not in (int, str):
            raise _no_class(label, classes)
    numbers = {label: _index(label, classes) for label in dict.fromkeys(listed)}
    return np.asarray([numbers[listed[i % len(listed)]] for i in range(count)], np.int32)


def _plain(value: Any) -> Any:
    """Arrays and their scalars as Python's lists and numbers; other values as they are."""
    return value.tolist() if isinstance(value, np.ndarray | np.generic | Array) else value


def _index(label: int | str, classes: Classes) -> int:
    """The index of a class by its name or index."""
    if isinstance(label, str):
        found = parse_labels(json.dumps([label]), classes, "labels")
        if len(found) == 1:
            return found[0]
    elif 0 <= label < len(classes):
        return label
    raise _no_class(label, classes)


def _no_class(label: Any, classes: Classes) -> InputError:
    return InputError(
        f"labels={label!r} is not a class",
        f"Use an index from 0 to {len(classes) - 1}, or one of the names {classes}.",
    )
