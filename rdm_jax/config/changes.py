"""Fields that must stay the same in all runs of a workdir, may change on request, or are free."""

import difflib
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from rdm_jax.config import Config, to_dict
from rdm_jax.data.sources import same_source
from rdm_jax.runtime.errors import InputError

# Free fields do not change the trained parameters. Sampling checks its own.
FREE = (
    "evaluation",
    "parallel",
    "sampling",
    "tracker",
    "data.autoencoder",  # a path; checkpoints know the weights
    "data.cache_gib",
    "data.directory",
    "data.max_left_out",
    "data.workers",
    "data.worker_timeout",
    "stage.average",
    "stage.checkpoint",
    "stage.guidance",
    "stage.sampler",
    "stage.network.remat",
    "stage.training.accumulate",
    "stage.training.checkpoint_every",
    "stage.training.checkpoint_minutes",
    "stage.training.evaluate_every",
    "stage.training.images",
    "stage.training.keep_best",
    "stage.training.keep_newest",
    "stage.training.log_every",
    "stage.training.max_failed_saves",
    "stage.training.max_skipped",
    "stage.training.preview_every",
    "stage.training.snapshot_every",
    "stage.training.start_from",
    "stage.training.validation",
)
# A run continues with changes of these if `--allow_changes` names them; any other change makes it a
# different network or process.
ALLOWED = ("data", "stage.source", "stage.training", "stage.network.dropout", "stage.network.dtype")
# An average begins with the training.
NEVER = ("data.channels", "stage.training.averages")


class Change(NamedTuple):
    """A changed field of a config, by its dotted path."""

    field: str
    was: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.field} was {self.was!r} and is {self.now!r}"


def incompatible_changes(before: Any, now: Any) -> list[Change]:
    """The differences between two configs as JSON, without those of free fields."""
    return [
        each
        for each in _differences(before, now, "config")
        if not _is_one_of(each.field, FREE) and not _is_same_source(each)
    ]


def check_allowed(found: Sequence[Change], allowed: Sequence[str], what: str) -> None:
    """Refuses changes that are impossible, or not allowed by the user. Raises InputError.

    Args:
      found: the changes.
      allowed: names of fields or of their sections, as `check_names` takes them.
      what: has the config before the changes, such as 'checkpoint PATH'.
    """
    wrong = [
        each for each in found if not _can_change(each.field) or not _named(each.field, allowed)
    ]
    if not wrong:
        return
    listed = ", ".join(map(str, wrong))
    fix = "Use another workdir."
    if all(_can_change(each.field) for each in wrong):
        names = sorted(
            {"data" if ".data." in each.field else each.field.rpartition(".")[2] for each in found}
        )
        fix = (
            f"Use another workdir, or pass --allow_changes={','.join(names)} to continue training "
            "with the change."
        )
    raise InputError(f"{what} was made with another config ({listed})", fix)


def check_names(allowed: Sequence[str], config: Config) -> None:
    """Refuses names that are not fields, or fields that can never change. Raises InputError.

    Args:
      allowed: each a field ('learning_rate'), its path or the end of it
        ('stage2.training.learning_rate'), or a section ('data').
      config: the config with the fields.
    """
    fields = list(_fields(to_dict(config), "config"))
    for name in allowed:
        named = [field for field in fields if _named(field, [name])]
        if not named:
            leaves = sorted({field.rpartition(".")[2] for field in fields if _can_change(field)})
            close = difflib.get_close_matches(name, leaves, n=1) or ["learning_rate"]
            raise InputError(
                f"--allow_changes={name} is not a field of the config", f"Use {close[0]}."
            )
        if not any(map(_can_change, named)):
            raise InputError(
                f"--allow_changes={name}: {named[0]} cannot change within a run",
                "Use another workdir, or training.start_from with this run's checkpoint.",
            )


def _fields(values: dict[str, Any], path: str) -> Iterator[str]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _fields(value, f"{path}.{name}")
        else:
            yield f"{path}.{name}"


def _named(field: str, names: Sequence[str]) -> bool:
    """Whether a field, or a section that contains it, is among the names."""
    return any(f".{name}." in f".{field}." for name in names)


def _can_change(field: str) -> bool:
    return _is_one_of(field, (*ALLOWED, *FREE)) and not _is_one_of(field, NEVER)


def _is_one_of(field: str, patterns: Sequence[str]) -> bool:
    """Whether a field is one of these or in one of these sections.

    'stage' is any stage, or the autoencoder.
    """
    plain = re.sub(r"^(stage\d+|autoencoder)\b", "stage", field.removeprefix("config."))
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
