"""How a command begins: its flags, and one line for each that cannot be used."""

import difflib
import re
import sys
from collections.abc import Callable, Iterator
from typing import NoReturn

from absl import app, flags

from rdm_jax.cli.config_flag import NAME, WholeNumber, fields_called
from rdm_jax.cli.exit_codes import exit_status
from rdm_jax.config import Config
from rdm_jax.runtime.environment import quiet_libtpu
from rdm_jax.runtime.errors import InputError

WORD = re.compile(r"--?([^=]+)(?:=(.*))?", re.DOTALL)
HELP = "Use one of the flags that --helpshort lists."


def command(
    work: Callable[[], None],
    workdir: Callable[[], str | None] = lambda: None,
    config: str | None = None,
) -> NoReturn:
    """Parses the flags, does the work of a script like `exit_status`, and ends the process.

    Args:
      work, workdir: as in `exit_status`.
      config: the value of --config if it is not given.
    """
    if config and not any(re.match(f"--?{NAME}(=|$)", word) for word in sys.argv):
        sys.argv.insert(1, f"--{NAME}={config}")  # where ml_collections looks for it

    def parse_and_work() -> None:
        parse_flags(sys.argv)
        if NAME in flags.FLAGS and flags.FLAGS[NAME].value is None:
            raise InputError("--config is missing", "Pass a config such as configs/digits.py.")
        quiet_libtpu()
        work()

    sys.exit(exit_status(parse_and_work, workdir))


def parse_flags(argv: list[str]) -> None:
    """Parses the flags with absl.

    Raises:
      InputError: a flag is unknown or has a value that it cannot have, or a word is not a flag.
    """
    app.define_help_flags()
    try:
        strays = flags.FLAGS(argv)[1:]
    except flags.UnrecognizedFlagError as error:
        raise _unknown(error.flagname) from error
    except flags.Error as error:
        # absl raises its own error while it handles that of a parser, such as --config's.
        if isinstance(error.__context__, InputError):
            raise error.__context__ from error
        raise _illegal_value(argv) or InputError(f"{error}", HELP) from error
    if strays:
        raise InputError(f"{strays[0]!r} is not a flag", _meaning_of(strays[0]))


def _meaning_of(stray: str) -> str:
    """How to write a word that belongs to no flag."""
    if stray.partition(":")[0].endswith((".py", ".json")):
        return f"Use --{NAME}={stray}."
    if "=" in stray:
        return f"Use --{stray.lstrip('-')}."
    return f"Put quotes around a value with spaces. {HELP}"


def _unknown(name: str) -> InputError:
    """The error for an unknown flag, with those that have nearly its name."""
    close = fields_called(name, Config().to_config_dict())[:3]
    close = close or difflib.get_close_matches(name, list(flags.FLAGS), n=1)
    fix = f"Use {' or '.join(f'--{other}' for other in close)}." if close else HELP
    return InputError(f"--{name} is not a flag", fix)


def _illegal_value(argv: list[str]) -> InputError | None:
    """The error for the first value that its flag's parser refuses; None if they accept all."""
    for name, value in _given(argv):
        parser = flags.FLAGS[name].parser
        try:
            parser.parse(value)
        except (TypeError, ValueError):
            problem, fix = _expected(parser, value)
            return InputError(f"--{name}={value} {problem}", fix)
    return None


def _given(argv: list[str]) -> Iterator[tuple[str, str]]:
    """Yields the names and values of the known flags, except --config and flags without a value."""
    words = flags.FLAGS.read_flags_from_files(argv[1:], force_gnu=False)
    for word, following in zip(words, [*words[1:], None], strict=True):
        found = WORD.fullmatch(word)
        if not found or found[1] == NAME or found[1] not in flags.FLAGS:
            continue
        value = found[2]
        if value is None and not flags.FLAGS[found[1]].boolean:
            value = following
        if value is not None:
            yield found[1], value


def _expected(parser: flags.ArgumentParser, value: str) -> tuple[str, str]:
    """What is wrong with a value, and what to use, by the kind of its flag."""
    match parser:
        case flags.EnumParser():
            choices = parser.enum_values
            close = difflib.get_close_matches(value, choices, n=1) or choices
            return "is not known", f"Use {' or '.join(close)}."
        case flags.BooleanParser():
            return "is neither true nor false", "Use True or False."
        case WholeNumber():
            return f"is not {_number(parser)}", "Use a number such as 1000, 1_000 or 1e3."
        case flags.IntegerParser():
            return f"is not {_number(parser)}", "Use a number such as 1000."
        case flags.FloatParser():
            return f"is not {_number(parser)}", "Use a number such as 0.1 or 1e-4."
    return "cannot be parsed", HELP


def _number(parser: flags.IntegerParser | flags.FloatParser) -> str:
    """What a parser of numbers accepts."""
    kind = "an integer" if isinstance(parser, flags.IntegerParser) else "a number"
    low, high = parser.lower_bound, parser.upper_bound
    if low is not None and high is not None:
        return f"{kind} from {low} to {high}"
    if low is not None:
        return f"{kind} of at least {low}"
    return kind if high is None else f"{kind} of at most {high}"
