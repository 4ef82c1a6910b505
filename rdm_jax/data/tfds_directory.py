"""Data sets of tensorflow-datasets that someone else may have made."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from rdm_jax.errors import InputError

OWN_FEATURE = re.compile(r"tensorflow_datasets\.core\.features\.[a-z0-9_.]+\.[A-Za-z0-9_]+")
CLASS_FIELDS = ("pythonClassName", "python_class_name", "type")  # in the form of today, and in older ones


def open_directory(directory: Path) -> tfds.core.DatasetBuilder:
    """The data set in a directory, of the library's own kinds of features, in files of that directory.

    `tfds.builder_from_directory` alone imports, and so runs, whatever module a data set names as that of its features.

    Raises:
      InputError: a feature is of another kind, or a file lies elsewhere.
      Exception: the library's own, for anything else that is wrong with the files.
    """
    for name in _class_names(json.loads((directory / "features.json").read_text())):
        if not (isinstance(name, str) and OWN_FEATURE.fullmatch(name)):
            would_do = "a data set with features of tensorflow-datasets alone"
            raise InputError(f"{directory / 'features.json'} wants {str(name)[:100]!r} to be imported; {would_do} would do.")
    builder = tfds.builder_from_directory(directory)
    inside = os.path.normpath(directory)
    for split in builder.info.splits.values():
        for path in split.filepaths:
            if os.path.dirname(os.path.normpath(path)) != inside:
                raise InputError(f"{directory / 'dataset_info.json'} names {path!s:.200}; files beside it would do.")
    return builder


def _class_names(features: Any) -> Iterator[Any]:
    """All names of classes in the description of features. Not every 'type' is one, but where it is, there is 'content'."""
    if isinstance(features, dict):
        for field in CLASS_FIELDS:
            if field in features and (field != "type" or "content" in features):
                yield features[field]
    for value in features.values() if isinstance(features, dict) else features if isinstance(features, list) else ():
        yield from _class_names(value)
