"""Opens untrusted data sets of tensorflow-datasets."""

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
    """Opens a data set (`tfds.core.DatasetBuilder`) of the library's own features.

    All its files must be in the directory.

    `tfds.builder_from_directory` alone imports, and so runs, any module that a data set names for
    its features.

    Raises:
      InputError: a feature is of another kind, or a file is elsewhere.
      Exception: of the library, for anything else that is wrong with the files.
    """
    with _own_features_alone(directory):
        builder = tfds.builder_from_directory(directory)
        splits = builder.info.splits
    inside = os.path.normpath(directory)
    for split in splits.values():
        for path in split.filepaths:
            if os.path.dirname(os.path.normpath(path)) != inside:
                raise InputError(
                    f"{directory / 'dataset_info.json'} names {path!s:.200}, which is elsewhere",
                    "Use a data set whose files are in its own directory.",
                )
    return builder


@contextmanager
def _own_features_alone(directory: Path) -> Iterator[None]:
    """A context in which the library resolves the names of its own features only.

    The check is where features are imported: names come in several forms, and as JSON within
    strings of JSON.
    """
    connector = tfds.features.FeatureConnector
    found, resolve = vars(connector)["cls_from_name"], connector.cls_from_name

    def checked(name: str) -> Any:
        if not OWN_FEATURE.fullmatch(name):
            raise InputError(
                f"{directory / 'features.json'} asks to import {name[:100]!r}",
                "Use a data set with features of tensorflow-datasets only.",
            )
        return resolve(name)

    connector.cls_from_name = staticmethod(checked)
    try:
        yield
    finally:
        connector.cls_from_name = found
