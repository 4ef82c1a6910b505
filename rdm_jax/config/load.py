"""Where a config comes from: a Python file, a packaged config by its name, a config.json or a run's
folder."""

import difflib
import importlib
import importlib.machinery
import importlib.util
import inspect
import re
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from rdm_jax.config.codec import choices, field_types, kind_of, to_plain
from rdm_jax.config.parse import parse
from rdm_jax.config.saved import read_saved
from rdm_jax.config.schema import Config
from rdm_jax.config.stage import Stage
from rdm_jax.runtime import hub
from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.files import local_path, nearest

RETURNS = "Return Config(...).to_config_dict(), as configs/default.py does."
FOLDER = "rdm_jax_config_folder"  # the package that the folder of a config file is, for its imports


def load_config(given: str, **overrides: Any) -> Config:
    """The config that `--config` would take, with other values.

    Args:
      given: a packaged config's name, a Python file, a config.json, a run's folder, or a shared
        relay hf://OWNER/NAME.
      overrides: fields by name; a section as a dict of its fields:
        `load_config("digits", seed=1, stage2={"sampler": {"steps": 8}})`. An instance of its class
        replaces a section: `stage1={"sampler": Heun(steps=8)}`.

    Raises:
      InputError: there is no such config, or a field is unknown or has another type.
    """
    return parse(_merged(load(given).to_dict(), overrides))


def load(given: str) -> ConfigDict:
    """The config in a Python file with get_config (`FILE` or `FILE:ARGUMENT`), in a packaged one
    (`NAME` or `NAME:ARGUMENT`), in a config.json, in a folder that has one, or of a shared relay
    `hf://OWNER/NAME[@REVISION]`.

    A file or a run's folder is preferred to a packaged config of the same name.

    Raises:
      InputError: there is no such config.
    """
    if hub.is_url(given):
        given = str(hub.fetch(given, [hub.CONFIG], "--config") / hub.CONFIG)
    if re.match(r"[\w+.-]+://", given) or not given.strip():
        local_path(given, "--config")  # refuses a URL
        raise InputError("--config='' names no config", f"Use {_one_of_the_packaged()}.")
    name, colon, argument = given.partition(":")
    whole, path = local_path(given, "--config"), local_path(name, "--config")
    if not (colon and path.is_file()) and (
        whole.suffix == ".json" or (whole / "config.json").is_file()
    ):
        return parse(read_saved(whole)).to_config_dict().lock()
    if not path.is_file():
        if name not in packaged():
            raise _not_found(given, name, path)
        path = packaged()[name]
    values = _call(given, path, [argument] if colon else [])
    values = values.to_config_dict() if isinstance(values, Config) else values
    values = ConfigDict(values) if type(values) is dict else values
    if not isinstance(values, ConfigDict):
        returned = type(values).__name__
        raise InputError(f"--config={given!r}: get_config returns {returned}", RETURNS)
    return values.lock()


def packaged() -> dict[str, Path]:
    """The configs that come with the package, by name: in the wheel, or in the checkout."""
    package = Path(__file__).parents[1]
    inside = package / "configs"
    folder = inside if inside.is_dir() else package.parent / "configs"
    return {
        path.stem: path for path in sorted(folder.glob("*.py")) if not path.name.startswith("_")
    }


def _one_of_the_packaged() -> str:
    return f"a config file, a run's folder, or one of {', '.join(packaged())}"


def _not_found(given: str, name: str, path: Path) -> InputError:
    """The error for what is not there, with what may be meant."""
    close = [path.stem] if path.stem in packaged() else []
    close = close or [str(found) for found in [nearest(path)] if found]
    close = close or difflib.get_close_matches(name, packaged(), n=1)
    what = "is a folder without a config.json" if path.is_dir() else "does not exist"
    fix = f"Use {close[0] if close else _one_of_the_packaged()}."
    return InputError(f"--config={given!r}: {name} {what}", fix)


def _merged(values: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """A nested dict with other values in it."""
    merged = dict(values)
    for name, value in overrides.items():
        before = merged.get(name)
        if not (isinstance(value, dict) and isinstance(before, dict)):
            merged[name] = value
        elif value.get("kind", before.get("kind")) != before.get("kind"):
            merged[name] = {**_defaults(name, value["kind"]), **value}
        else:
            merged[name] = _merged(before, value)
    return merged


def _defaults(field: str, kind: str) -> dict[str, Any]:
    """The fields of a kind of a stage's part; none if there is no such kind."""
    classes = {kind_of(cls): cls for cls in choices(field_types(Stage)[field])}
    return to_plain(classes[kind]()) if kind in classes else {}


def _call(given: str, path: Path, arguments: list[str]) -> Any:
    """What get_config returns. Raises InputError for an error in the file."""
    try:
        module = _module(path)
        if not callable(getattr(module, "get_config", None)):
            raise InputError(
                f"--config={given!r}: {path} has no function get_config", f"Add one. {RETURNS}"
            )
        try:
            inspect.signature(module.get_config).bind(*arguments)
        except TypeError as error:
            takes = "takes no argument" if arguments else "takes an argument"
            fix = f"Use {path}." if arguments else f"Use {path}:ARGUMENT, as the file explains."
            raise InputError(f"--config={given!r}: {path} {takes}", fix) from error
        return module.get_config(*arguments)
    except (InputError, Warning):  # with python -W error, a warning is not the config's fault
        raise
    except Exception as error:  # the config file is code, and may fail in any way
        lines = [
            frame.lineno
            for frame in traceback.extract_tb(error.__traceback__)
            if frame.filename == str(path)
        ]
        line = getattr(error, "lineno", None) or (lines[-1] if lines else None)
        where = f"{path}, line {line}" if line else path
        why = " ".join(str(getattr(error, "msg", None) or error).split())
        raise InputError(
            f"--config={given!r} fails ({where}: {type(error).__name__}: {why})",
            "Correct the file.",
        ) from error


def _module(path: Path) -> ModuleType:
    """Executes a config file as a module of the package that its folder is: `from . import other`
    imports the file other.py beside it."""
    for name in [name for name in sys.modules if name.partition(".")[0] == FOLDER]:
        del sys.modules[name]  # of another folder
    importlib.invalidate_caches()
    folder = ModuleType(FOLDER)
    folder.__path__ = [str(path.parent)]
    sys.modules[FOLDER] = folder
    name = f"{FOLDER}.{path.stem.replace('.', '_')}"
    loader = importlib.machinery.SourceFileLoader(name, str(path))
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses in the file look for it
    # Not `loader.exec_module`: its cached bytecode tells versions apart by seconds and size alone.
    source = loader.get_data(str(path))
    exec(loader.source_to_code(source, str(path)), vars(module))
    return module
