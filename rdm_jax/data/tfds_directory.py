"""Data sets of tensorflow-datasets that someone else may have made."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.lazy import lazy_import

tfds = lazy_import("tensorflow_datasets", "data")

OWN_FEATURE = re.compile(r"tensorflow_datasets\.core\.features\.[a-z0-9_.]+\.[A-Za-z0-9_]+")


def open_directory(directory: Path) -> Any:
    """The data set (`tfds.core.DatasetBuilder`) in a directory, of the library's own kinds of features, in files of that
    directory.

    `tfds.builder_from_directory` alone imports, and so runs, whatever module a data set names as
    that of its features.

    Raises:
      InputError: a feature is of another kind, or a file lies elsewhere.
      Exception: the library's own, for anything else that is wrong with the files.
    """
    with _own_features_alone(directory):
        builder = tfds.builder_from_directory(directory)
        splits = builder.info.splits
    inside = os.path.normpath(directory)
    for split in splits.values():
        for path in split.filepaths:
            if os.path.dirname(os.path.normpath(path)) != inside:
                raise InputError(
                    f"{directory / 'dataset_info.json'} names {path!s:.200}; files beside it would do."
                )
    return builder


@contextmanager
def _own_features_alone(directory: Path) -> Iterator[None]:
    """A part in which the library resolves the names of its own features only.

    The check is where it imports them: names come in several forms, and as JSON within strings of
      JSON.
    """
    connector = tfds.features.FeatureConnector
    found, resolve = vars(connector)["cls_from_name"], connector.cls_from_name

    def checked(name: str) -> Any:
        if not OWN_FEATURE.fullmatch(name):
            would_do = "a data set with features of tensorflow-datasets alone"
            raise InputError(
                f"{directory / 'features.json'} wants {name[:100]!r} to be imported; {would_do} would do."
            )
        return resolve(name)

    connector.cls_from_name = staticmethod(checked)
    try:
        yield
    finally:
        connector.cls_from_name = found
