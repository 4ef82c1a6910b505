"""The flag --config: a config file, a config.json or a run's folder; and its overrides,
--config.field=value."""

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

flags.disclaim_key_flags()  # --config is one of the module's that defines it here, and so in its --helpshort

NAME = "config"
OVERRIDE = re.compile(rf"--?(?:no)?({NAME}\.[^=]*)=?(.*)", re.DOTALL)
MAX_DIGITS = 18


class WholeNumber(flags.IntegerParser):
    """A whole number as people write it: 1000, 1_000, 1e3, 2.5e6."""

    def convert(self, argument: Any) -> int:
        """The number. Raises ValueError for any other text."""
        if not isinstance(argument, str):
            return super().convert(argument)
        with contextlib.suppress(ValueError):
            return super().convert(argument)
        with contextlib.suppress(InvalidOperation):
            number = Decimal(argument)
            if number.is_finite() and number.adjusted() < MAX_DIGITS and number == int(number):
                return int(number)
        raise ValueError("it is not a whole number; one such as 1000, 1_000 or 1e3 would do.")


class _ConfigParser(flags.ArgumentParser):
    """Loads what --config names, and refuses overrides of what is no field in it."""

    def parse(self, argument: str) -> ConfigDict:
        values = load(argument)
        for word in flags.FLAGS.read_flags_from_files(sys.argv, force_gnu=False):
            if found := OVERRIDE.fullmatch(word):
                _check_field(values, *found.groups())
        return values


def define_config(
    help_string: str = "Config file; --config.field=value overrides.",
) -> flags.FlagHolder:
    """Defines --config with its overrides by ml_collections; its value is a locked ConfigDict.

    What cannot be used raises `absl.flags.Error` when flags are parsed, which `rdm_jax.command`
    puts into words.
    """
    config_flags.register_flag_parser_for_type(int, WholeNumber())
    holder = config_flags.DEFINE_config_file(NAME, help_string=help_string)
    flags.FLAGS[NAME].parser = _ConfigParser()
    return holder


def _check_field(values: ConfigDict, field: str, text: str) -> None:
    """Refuses an override of what is no field, with those that are spelt almost like it."""
    node, owner = values, NAME
    for part in field.split(".")[1:]:
        if not isinstance(node, ConfigDict):
            raise InputError(
                f"{field}: {owner} has no fields; --{owner}=VALUE, the whole of it, would do."
            )
        if part not in node:
            if "[" in part and part.partition("[")[0] in node:
                whole = f"--{owner}.{part.partition('[')[0]}='(1, 2)'"
                raise InputError(
                    f"{field}: an element cannot be set alone; all of them, as in {whole}, would do."
                )
            close = difflib.get_close_matches(part, node, n=1)
            elsewhere = close or list(fields_called(part, values))[:3] or list(node)
            would_do = " or ".join(elsewhere)
            raise InputError(
                f"{field}={text} is not a field of the config ({owner} has no {part!r}); {would_do} would do."
            )
        node, owner = node[part], f"{owner}.{part}"
    if isinstance(node, ConfigDict) and not _is_dict(text):
        raise InputError(
            f"{field}={text}: this is a section; one of its fields, such as {field}.{next(iter(node))}, would do."
        )


def _is_dict(text: str) -> bool:
    try:
        return isinstance(ast.literal_eval(text), dict)
    except (ValueError, SyntaxError):
        return False


def fields_called(name: str, values: ConfigDict, owner: str = NAME) -> list[str]:
    """All fields of this name, such as 'config.stage1.training.batch_size'."""
    found = [f"{owner}.{key}" for key in values if key == name]
    for key, value in values.items():
        found += (
            fields_called(name, value, f"{owner}.{key}") if isinstance(value, ConfigDict) else []
        )
    return found
