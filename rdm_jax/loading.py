"""The trained stages of a run, or of a shared relay, in a line of Python."""

import os
from pathlib import Path
from typing import Any

from rdm_jax.checkpoints import shared
from rdm_jax.config.load import load_config
from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.files import cache_folder, local_path, sha256
from rdm_jax.sampling.pipeline import RelayPipeline
from rdm_jax.workdir import Workdir


def load(workdir: str | os.PathLike, **overrides: Any) -> RelayPipeline:
    """The trained stages of a run, or those that somebody has shared.

    A shared relay is unpacked into the user's cache folder, once.

    Args:
      workdir: of the run, or the folder of a shared relay.
      overrides: other values of its config, as for `load_config`:
        `load("runs/digits", sampling={"labels": "3"}, stage1={"guidance": 1.5})`.

    Raises:
      InputError: there is no run, or as `load_config` and `RelayPipeline` do.
    """
    folder = local_path(workdir, "workdir")
    if shared.is_shared(folder):
        folder = _unpacked(folder)
    if not (folder / "config.json").is_file():
        raise InputError(
            f"workdir={os.fspath(workdir)!r} has no config.json", "Use the folder of a trained run."
        )
    return RelayPipeline(load_config(str(folder), **overrides), folder)


def _unpacked(folder: Path) -> Path:
    """The workdir in the user's cache that a shared relay is unpacked into."""
    config = shared.read_config(folder)
    workdir = Workdir(cache_folder() / "shared" / sha256(folder / shared.LIST)[:32])
    workdir.path.mkdir(parents=True, exist_ok=True)
    with workdir.locked():
        shared.unpack(folder, config, workdir.checkpoints, workdir.captions)
        workdir.write_config(config)
    return workdir.path
