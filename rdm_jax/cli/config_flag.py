"""The flag --config: a config file, a config.json or a run's folder; and --config.field=value."""

import ast
import contextlib
import difflib
import importlib.machinery
import importlib.util
import inspect
import re
import sys
import traceback
from decimal import Decimal, InvalidOperation
from pathlib import Path
from types import ModuleType
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from rdm_jax import config as configs
from rdm_jax.config.saved import read_saved
from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.files import local_path, nearest

# So that --helpshort lists --config with the flags of the module that calls `define_config`.
flags.disclaim_key_flags()

NAME = "config"
OVERRIDE = re.compile(rf"--?(?:no)?({NAME}\.[^=]*)=?(.*)", re.DOTALL)
EXAMPLE = "Config(...).to_config_dict(), as in configs/default.py,"
MAX_DIGITS = 18


class WholeNumber(flags.IntegerParser):
    """An integer as people write it: 1000, 1_000, 1e3, 2.5e6."""

    def convert(self, argument: Any) -> int:
        """Returns the integer. Raises ValueError for any other text."""
        if not isinstance(argument, str):
            return super().convert(argument)
        with contextlib.suppress(ValueError):
            return super().convert(argument)
        with contextlib.suppress(InvalidOperation):
            number = Decimal(argument)
            if number.is_finite() and number.adjusted() < MAX_DIGITS and number == int(number):
                return int(number)
        raise ValueError(f"{argument!r} is not an integer")


class _ConfigParser(flags.ArgumentParser):
    """Loads what --config names, and refuses overrides of unknown fields."""

    def parse(self, argument: str) -> ConfigDict:
        values = load(argument)
        for word in flags.FLAGS.read_flags_from_files(sys.argv, force_gnu=False):
            if found := OVERRIDE.fullmatch(word):
                _check_field(values, *found.groups())
        return values


def define_config(
    help_string: str = "Config file; --config.field=value overrides.",
) -> flags.FlagHolder:
    """Defines --config with ml_collections' overrides; its value is a locked ConfigDict.

    Parsing the flags raises `absl.flags.Error`, which `cli.command.parse_flags` turns into an
    InputError.
    """
    config_flags.register_flag_parser_for_type(int, WholeNumber())
    holder = config_flags.DEFINE_config_file(NAME, help_string=help_string)
    flags.FLAGS[NAME].parser = _ConfigParser()
    return holder


def load(given: str) -> ConfigDict:
    """The config in a Python file with get_config (`FILE` or `FILE:ARGUMENT`), a config.json, or a
    folder that has one.

    Raises:
      InputError: there is no such file, or it holds no config.
    """
    if re.match(r"[\w+.-]+://", given) or not given.strip():
        local_path(given, "--config")  # refuses a URL
        raise InputError("--config='' names no file; a config such as configs/digits.py would do.")
    name, colon, argument = given.partition(":")
    whole, path = local_path(given, "--config"), local_path(name, "--config")
    if not (colon and path.is_file()) and (
        whole.suffix == ".json" or (whole / "config.json").is_file()
    ):
        return configs.parse(read_saved(whole)).to_config_dict().lock()
    if not path.is_file():
        close = nearest(path)
        why = "is a folder without a config.json" if path.is_dir() else "does not exist"
        raise InputError(
            f"--config={given!r}: {name} {why}; {close or 'a config such as configs/digits.py'} would do."
        )
    values = _call(given, path, [argument] if colon else [])
    values = values.to_config_dict() if isinstance(values, configs.Config) else values
    values = ConfigDict(values) if type(values) is dict else values
    if not isinstance(values, ConfigDict):
        raise InputError(
            f"--config={given!r}: get_config returns {type(values).__name__}; {EXAMPLE} would do."
        )
    return values.lock()


def _call(given: str, path: Path, arguments: list[str]) -> Any:
    """What get_config returns, with an error in the file put into one sentence."""
    try:
        module = _module(path)
        if not callable(getattr(module, "get_config", None)):
            raise InputError(
                f"--config={given!r}: {path} has no function get_config; one that returns {EXAMPLE} would do."
            )
        try:
            inspect.signature(module.get_config).bind(*arguments)
        except TypeError as error:
            would_do = f"{path} alone" if arguments else f"{path}:ARGUMENT, as the file explains,"
            raise InputError(
                f"--config={given!r}: {path} takes {'no' if arguments else 'an'} argument; {would_do} would do."
            ) from error
        return module.get_config(*arguments)
    except (
        InputError,
        Warning,
    ):  # a warning is an error where Python was told so, and no fault of the config
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
            f"--config={given!r} fails ({where}: {type(error).__name__}: {why}); mending that would do."
        ) from error


def _module(path: Path) -> ModuleType:
    loader = importlib.machinery.SourceFileLoader(f"{NAME}_config", str(path))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    sys.modules[loader.name] = module  # dataclasses in the file look for it
    loader.exec_module(module)
    return module


def _check_field(values: ConfigDict, field: str, text: str) -> None:
    """Refuses an override of an unknown field, and names those with nearly its name."""
    node, owner = values, NAME
    for part in field.split(".")[1:]:
        if not isinstance(node, ConfigDict):
            raise InputError(f"{field}: {owner} has no fields", f"Use --{owner}=VALUE.")
        if part not in node:
            name, bracket, _ = part.partition("[")
            if bracket and name in node:
                raise InputError(
                    f"{field}: a single element cannot be set", f"Use --{owner}.{name}='(1, 2)'."
                )
            close = difflib.get_close_matches(part, node, n=1)
            close = close or list(fields_called(part, values))[:3] or list(node)
            raise InputError(
                f"{field}={text} is not a field of the config ({owner} has no {part!r})",
                f"Use {' or '.join(close)}.",
            )
        node, owner = node[part], f"{owner}.{part}"
    if isinstance(node, ConfigDict) and not _is_dict(text):
        raise InputError(
            f"{field}={text}: {field} is a section",
            f"Use one of its fields, such as {field}.{next(iter(node))}.",
        )


def _is_dict(text: str) -> bool:
    try:
        return isinstance(ast.literal_eval(text), dict)
    except (ValueError, SyntaxError):
        return False


def fields_called(name: str, values: ConfigDict, owner: str = NAME) -> list[str]:
    """Returns the paths of all fields of a name, such as 'config.stage1.training.batch_size'."""
    found = [f"{owner}.{key}" for key in values if key == name]
    for key, value in values.items():
        if isinstance(value, ConfigDict):
            found += fields_called(name, value, f"{owner}.{key}")
    return found
