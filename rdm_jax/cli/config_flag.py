"""The flag --config: a config file, a config.json or a run's folder; and --config.field=value."""

import ast
import contextlib
import difflib
import re
import sys
from decimal import Decimal, InvalidOperation
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from rdm_jax.config.load import load
from rdm_jax.runtime.errors import InputError

# So that --helpshort lists --config with the flags of the module that calls `define_config`.
flags.disclaim_key_flags()

NAME = "config"
OVERRIDE = re.compile(rf"--?(?:no)?({NAME}\.[^=]*)=?(.*)", re.DOTALL)
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
