"""The space that checkpoints and snapshots take on the disk."""

import shutil
from pathlib import Path
from typing import Any

import jax

from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.mounts import AnyPath


def check_space(directory: AnyPath, abstract: Any, copies: int, snapshots: int = 0) -> None:
    """Raises InputError unless so many checkpoints of a state fit onto the disk.

    Args:
      directory: on that disk; a bucket has no limit.
      abstract: the state.
      copies: number of checkpoints.
      snapshots: number of snapshots of the state's averages.
    """
    if not isinstance(directory, Path):
        return
    need = copies * _bytes(abstract) + snapshots * _bytes(abstract.averages)
    free = shutil.disk_usage(directory).free
    if free >= need:
        return
    what, fix = f"{copies} checkpoints", "reduce training.keep_newest and keep_best"
    if snapshots:
        what = f"{what} and {snapshots} snapshots of averages"
        fix = f"{fix}, or increase training.snapshot_every"
    raise InputError(
        f"{directory} has {free / 2**30:.3g} GiB free, and {what} take {need / 2**30:.3g} GiB",
        f"Use another workdir, or {fix}.",
    )


def _bytes(abstract: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract))
