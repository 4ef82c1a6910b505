"""What must be the same in all runs of one workdir."""

from typing import Any

from rdm_jax.data.sources import same_source

# What may change all the same: it does not touch what is learnt. Sampling checks its own.
FREE_FIELDS = (
    "accumulate",
    "cache_gib",
    "checkpoint",
    "checkpoint_every",
    "directory",
    "evaluate_every",
    "evaluation",
    "guidance",
    "images",
    "keep_best",
    "keep_newest",
    "log_every",
    "max_failed_saves",
    "max_left_out",
    "max_skipped",
    "parallel",
    "preview_every",
    "remat",
    "sampler",
    "sampling",
    "start_from",
    "validation",
    "worker_timeout",
    "workers",
)


def changes(before: Any, now: Any, field: str) -> str:
    """What is different and must not be, as 'config.seed was 1 and is 2, ...'; '' for nothing.

    Args:
      before, now: as JSON has them.
      field: what both are, 'config' say.
    """
    bad = [change for change in _differences(before, now, field) if not _is_free(change[0]) and not _is_same_source(*change)]
    return ", ".join(f"{name} was {old!r} and is {new!r}" for name, old, new in bad)


def _is_free(field: str) -> bool:
    return any(part in FREE_FIELDS for part in field.split("."))


def _is_same_source(field: str, old: Any, new: Any) -> bool:
    return field.endswith(".source") and isinstance(old, str) and isinstance(new, str) and same_source(old, new)


def _differences(old: Any, new: Any, field: str) -> list[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [d for k in keys for d in _differences(old.get(k), new.get(k), f"{field}.{k}")]
    return [] if old == new else [(field, old, new)]
