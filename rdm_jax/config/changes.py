"""What must be the same in all runs of one workdir, what may change where that is asked for, and
what is free."""

import difflib
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from rdm_jax.config import Config, to_dict
from rdm_jax.data.sources import same_source
from rdm_jax.runtime.errors import InputError

TRAINING = (
    *(
        "accumulate",
        "checkpoint_every",
        "checkpoint_minutes",
        "evaluate_every",
        "images",
        "keep_best",
        "keep_newest",
    ),
    *("log_every", "max_failed_saves", "max_skipped", "preview_every", "start_from", "validation"),
)
# Free: they do not touch what is learnt. Sampling checks its own.
FREE = (
    *("evaluation", "parallel", "sampling"),
    *(
        f"data.{field}"
        for field in ("cache_gib", "directory", "max_left_out", "workers", "worker_timeout")
    ),
    *("stage.checkpoint", "stage.guidance", "stage.sampler", "stage.network.remat"),
    *(f"stage.training.{field}" for field in TRAINING),
)
# What a run can go on with all the same, if `--allow_changes` names it; all else makes another
# network or another process of it.
ALLOWED = ("data", "stage.source", "stage.training", "stage.network.dropout", "stage.network.dtype")
NEVER = ("data.channels",)


class Change(NamedTuple):
    """A field of a config, by its dotted path, that is not what it was."""

    field: str
    was: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.field} was {self.was!r} and is {self.now!r}"


def incompatible_changes(before: Any, now: Any) -> list[Change]:
    """What is different between two nested dicts, as JSON has them, and not free."""
    return [
        each
        for each in _differences(before, now, "config")
        if not _is_one_of(each.field, FREE) and not _is_same_source(each)
    ]


def check_allowed(found: Sequence[Change], allowed: Sequence[str], what: str) -> None:
    """Refuses changes that cannot be made, or that nobody has asked for. Raises InputError.

    Args:
      allowed: names of fields or of their sections, as `check_names` takes them.
      what: is of the config before the changes, such as 'checkpoint PATH'.
    """
    wrong = [
        each for each in found if not _can_change(each.field) or not _named(each.field, allowed)
    ]
    if not wrong:
        return
    listed = ", ".join(map(str, wrong))
    remedy = "another workdir"
    if all(_can_change(each.field) for each in wrong):
        names = sorted(
            {"data" if ".data." in each.field else each.field.rpartition(".")[2] for each in found}
        )
        remedy += f", or --allow_changes={','.join(names)} to train on with the change,"
    raise InputError(f"{what} was made with another config ({listed}); {remedy} would do.")


def check_names(allowed: Sequence[str], config: Config) -> None:
    """Refuses names that are no fields, or fields that can never change. Raises InputError.

    Args:
      allowed: each a field ('learning_rate'), its path or the end of it
        ('stage2.training.learning_rate'), or a section ('data').
    """
    fields = list(_fields(to_dict(config), "config"))
    for name in allowed:
        named = [field for field in fields if _named(field, [name])]
        if not named:
            leaves = sorted({field.rpartition(".")[2] for field in fields if _can_change(field)})
            close = difflib.get_close_matches(name, leaves, n=1) or ["learning_rate"]
            raise InputError(
                f"--allow_changes={name} is no field of the config; {close[0]} would do."
            )
        if not any(map(_can_change, named)):
            would_do = "another workdir, or training.start_from with this run's checkpoint,"
            raise InputError(
                f"--allow_changes={name}: {named[0]} cannot change within a run; {would_do} would do."
            )


def _fields(values: dict[str, Any], path: str) -> Iterator[str]:
    for name, value in values.items():
        yield from (
            _fields(value, f"{path}.{name}") if isinstance(value, dict) else (f"{path}.{name}",)
        )


def _named(field: str, names: Sequence[str]) -> bool:
    """Whether a field, or a section that it is in, is among the names."""
    return any(f".{name}." in f".{field}." for name in names)


def _can_change(field: str) -> bool:
    return _is_one_of(field, (*ALLOWED, *FREE)) and not _is_one_of(field, NEVER)


def _is_one_of(field: str, patterns: Sequence[str]) -> bool:
    """Whether a field is one of these, or in one of these sections; 'stage' stands for any
    stage."""
    plain = re.sub(r"^stage\d+", "stage", field.removeprefix("config."))
    return any(f"{plain}.".startswith(f"{pattern}.") for pattern in patterns)


def _is_same_source(change: Change) -> bool:
    old, new = change.was, change.now
    return (
        change.field.endswith(".source")
        and isinstance(old, str)
        and isinstance(new, str)
        and same_source(old, new)
    )


def _differences(old: Any, new: Any, field: str) -> list[Change]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [d for k in keys for d in _differences(old.get(k), new.get(k), f"{field}.{k}")]
    return [] if old == new else [Change(field, old, new)]
