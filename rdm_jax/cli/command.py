"""How a command begins: its flags, of which those that cannot be used are refused in one sentence
each."""

import difflib
import re
import sys
from collections.abc import Callable
from typing import NoReturn

from absl import app, flags

from rdm_jax.cli.config_flag import NAME, fields_called
from rdm_jax.cli.exit_codes import exit_status
from rdm_jax.config import Config
from rdm_jax.runtime.environment import quiet_libtpu
from rdm_jax.runtime.errors import InputError

# What absl says of a value begins so, and what is said here instead.
VALUES = {
    "could not convert string to float": "it is not a number; one such as 0.1 or 1e-4 would do.",
    "('Non-boolean argument": "it is neither true nor false; True or False would do.",
}


def command(
    work: Callable[[], None],
    workdir: Callable[[], str | None] = lambda: None,
    config: str | None = None,
) -> NoReturn:
    """Parses the flags and does the work of a script, as `exit_status` does it; then the process
    ends.

    Args:
      work, workdir: as in `exit_status`.
      config: what --config is where it is not given.
    """
    if config and not any(re.match(f"--?{NAME}(=|$)", word) for word in sys.argv):
        sys.argv.insert(1, f"--{NAME}={config}")  # where ml_collections looks for it

    def parse_and_work() -> None:
        parse_flags(sys.argv)
        if NAME in flags.FLAGS and flags.FLAGS[NAME].value is None:
            raise InputError("--config is not given; a config such as configs/digits.py would do.")
        quiet_libtpu()
        work()

    sys.exit(exit_status(parse_and_work, workdir))


def parse_flags(argv: list[str]) -> None:
    """absl's parser. Raises InputError for what is no flag, and for a value that a flag cannot
    have."""
    app.define_help_flags()
    try:
        strays = flags.FLAGS(argv)[1:]
    except flags.Error as error:
        # absl keeps a parser's error as the context of its own, and its text alone in the message.
        raise (
            error.__context__ if isinstance(error.__context__, InputError) else _in_words(error)
        ) from error
    if strays:
        raise InputError(f"{strays[0]!r} is no flag; {_meant(strays[0])} would do.")


def _meant(stray: str) -> str:
    """What a word that belongs to no flag may be meant for."""
    if stray.partition(":")[0].endswith((".py", ".json")):
        return f"--{NAME}={stray}"
    if "=" in stray:
        return f"--{stray.lstrip('-')}"
    return "quotes around a value with spaces, or one of the flags that --helpshort lists,"


def _in_words(error: flags.Error) -> InputError:
    if isinstance(error, flags.UnrecognizedFlagError):
        name = error.flagname
        fields = fields_called(name, Config().to_config_dict())
        close = [
            f"--{other}"
            for other in fields[:3] or difflib.get_close_matches(name, list(flags.FLAGS), n=1)
        ]
        return InputError(
            f"--{name} is not a flag; {' or '.join(close) or 'one of those that --helpshort lists'} would do."
        )
    if not (found := re.fullmatch(r"flag (--[^=]+)=(.*?): (.*)", str(error), re.DOTALL)):
        return InputError(f"{error}; --helpshort lists the flags.")
    name, value, why = found.groups()
    if one_of := re.fullmatch(r"value should be one of <(.*)>", why):
        choices = one_of.group(1).split("|")
        close = difflib.get_close_matches(value, choices, n=1) or choices
        return InputError(f"{name}={value} is not known; {' or '.join(close)} would do.")
    why = next((ours for theirs, ours in VALUES.items() if why.startswith(theirs)), why)
    would_do = "" if why.endswith("would do.") else "; --helpshort says what would do."
    return InputError(f"{name}={value}: {why}{would_do}")
