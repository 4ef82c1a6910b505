"""Libraries that are imported at their first use: slow to import, or optional."""

import importlib
from typing import Any

from rdm_jax.runtime.console import log
from rdm_jax.runtime.errors import InputError


class _LazyModule:
    """Takes the place of a module, and imports it when one of its names is used."""

    def __init__(self, name: str, extra: str):
        self._name, self._extra = name, extra

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__"):  # introspection looks for these in every object
            raise AttributeError(attribute)
        return getattr(import_library(self._name, self._extra), attribute)


def lazy_import(name: str, extra: str = "") -> Any:
    """Imports a library at its first use, as in `lazy_import("matplotlib.figure", "plots")`.

    Args:
      name: of the module.
      extra: of this package, that installs it; '' if it is always installed.

    Returns:
      An object to use like the module; its first use raises InputError if the library is missing.
    """
    return _LazyModule(name, extra)


def import_library(name: str, extra: str) -> Any:
    """Imports a module. Raises InputError, which names the extra to install, if it is missing."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or name
        if not extra or missing.partition(".")[0] == "rdm_jax":
            raise
        raise InputError(
            f"the package {missing.partition('.')[0]} is not installed",
            f"Run pip install 'rdm_jax[{extra}]'.",
        ) from error


def is_available(name: str, extra: str, without: str) -> bool:
    """Imports an optional module; if it is missing, logs what is not done `without` it.

    For work that may begin hours later: a missing library is noticed now.
    """
    try:
        import_library(name, extra)
    except InputError as error:
        log.info("%s: %s", without, error)
        return False
    return True
