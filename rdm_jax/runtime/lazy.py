"""Libraries that are imported at their first use: they take long to import, or are optional."""

import importlib
import importlib.util
from typing import Any

from rdm_jax.runtime.console import log
from rdm_jax.runtime.errors import InputError


class _LazyModule:
    """Stands for a module, and imports it when one of its names is asked for."""

    def __init__(self, name: str, extra: str):
        self._name, self._extra = name, extra

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__"):  # what introspection looks for in every object
            raise AttributeError(attribute)
        return getattr(import_library(self._name, self._extra), attribute)


def lazy_import(name: str, extra: str = "") -> Any:
    """A library that is imported at its first use, such as `lazy_import("matplotlib.figure",
    "plots")`.

    Args:
      name: of the module.
      extra: of this package, that installs it; '' where it is always installed.

    Returns:
      What may be used like the module. Its first use raises InputError where the library is
      missing.
    """
    return _LazyModule(name, extra)


def import_library(name: str, extra: str) -> Any:
    """Imports a module. Raises InputError with the extra that installs it where it is missing."""
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


def is_installed(name: str, extra: str, without: str) -> bool:
    """Whether a package that can be done without is installed; where it is not, the log says what
    is missing `without` it."""
    found = importlib.util.find_spec(name) is not None
    if not found:
        log.info("%s: %s is not installed. Run pip install 'rdm_jax[%s]'.", without, name, extra)
    return found
