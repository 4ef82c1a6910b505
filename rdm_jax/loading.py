"""Trained stages in a line of Python: of a run, a shared relay, or files of published weights."""

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rdm_jax.checkpoints import folders, shared
from rdm_jax.config import Config, to_dict
from rdm_jax.config.load import load_config
from rdm_jax.interop.import_stage import import_stage
from rdm_jax.runtime import hub, mounts
from rdm_jax.runtime.console import log
from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.files import cache_folder, local_path, sha256
from rdm_jax.runtime.locks import InUse
from rdm_jax.sampling.pipeline import RelayPipeline
from rdm_jax.workdir import Workdir

Source = str | os.PathLike[str]
SECONDS_TO_LOOK = 1.0  # between looks at what another process puts into the cache


def load(
    source: Source | Mapping[int, Source],
    *,
    config: str | Config | None = None,
    weights_key: str | None = None,
    **overrides: Any,
) -> RelayPipeline:
    """Trained stages, ready to sample.

    Shared relays and published weights are unpacked into the user's cache folder, once.

    Args:
      source: the workdir of a run or the folder of a shared relay, also gs://BUCKET/FOLDER; a
        shared relay hf://OWNER/NAME or hf://OWNER/NAME@REVISION of Hugging Face's hub; or a file of
        published weights (.pkl, .pt, .pth, safetensors) of stage 1, or several by the numbers of
        their stages:
        `{1: "edm.pkl", 2: "rdm.pt"}`. Stages before the first of them are not loaded: images of the
        stage before are then an argument of `sample`.
      config: of published weights: a config, or what `load_config` takes. The weights overrule
        what they determine.
      weights_key: of published weights, the network in the file; None for 'ema', or 'model_ema1' in
        JiT's.
      overrides: other values of the config, as for `load_config`:
        `load("runs/digits", sampling={"labels": "3"}, stage1={"guidance": 1.5})`.

    Raises:
      InputError: there is no such run or file, or as `load_config` and `RelayPipeline` do.
    """
    if isinstance(source, Mapping):
        return _load_files(source, config, weights_key, overrides)
    of_weights = config is not None or weights_key is not None
    folder = _local(source, of_weights)
    if folder.is_file():
        return _load_files({1: source}, config, weights_key, overrides)
    if not folder.exists():
        raise InputError(
            f"source={os.fspath(source)!r} does not exist",
            "Use the folder of a trained run, or a file of weights.",
        )
    if of_weights:
        raise InputError(
            f"config and weights_key do not go with {os.fspath(source)!r}, which is no file of "
            "published weights",
            "Leave them out.",
        )
    if shared.is_shared(folder):
        folder = _unpacked(folder)
    if not (folder / "config.json").is_file():
        raise InputError(
            f"source={os.fspath(source)!r} has no config.json", "Use the folder of a trained run."
        )
    return RelayPipeline(load_config(str(folder), **overrides), folder)


def _local(source: Source, of_weights: bool) -> Path:
    """The local path of a source; files of weights are local ones."""
    if hub.is_url(source) and not of_weights:
        return shared.fetch(os.fspath(source), "source")
    if mounts.is_url(source) and not of_weights:
        return mounts.mounted(os.fspath(source))
    return local_path(source, "source")


def _load_files(
    source: Mapping[int, Source],
    config: str | Config | None,
    key: str | None,
    overrides: dict[str, Any],
) -> RelayPipeline:
    """The stages of published files."""
    files = {number: local_path(path, "source") for number, path in sorted(source.items())}
    for path in files.values():
        if not path.is_file():
            raise InputError(f"source={path} is not a file", "Use a file of weights.")
    if config is None:
        raise InputError(
            f"source={dict(source)!r:.200} are weights, without a config",
            "Pass config='imagenet', or another config that they are of.",
        )
    values = load_config(config) if isinstance(config, str) else config
    first, last = min(files, default=0), max(files, default=0)
    if first < 1 or list(files) != list(range(first, last + 1)):
        raise InputError(
            f"source has weights of the stages {list(files)}",
            "Give stages from 1 that follow one another.",
        )
    if last > len(values.stages):
        raise InputError(
            f"source has weights of stage {last}, and the config {len(values.stages)} stage(s)",
            "Use a config with that stage.",
        )
    folder = _imported(files, values, key)
    whole = load_config(str(folder), **overrides)
    return RelayPipeline(
        dataclasses.replace(whole, stages=whole.stages[:last]), folder, first=first
    )


def _imported(files: Mapping[int, Path], config: Config, key: str | None) -> Path:
    """The workdir in the user's cache that files are imported into."""
    made_of = [to_dict(config), key, *((number, sha256(path)) for number, path in files.items())]
    digest = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
    workdir = Workdir(cache_folder() / "imported" / digest[:32])

    def bring() -> None:
        for number, path in files.items():
            directory = workdir.checkpoints(number)
            if not folders.step_folders(directory):
                try:
                    import_stage(config, number, path, workdir, key)
                except InputError:
                    if not folders.step_folders(directory):  # else another process was faster
                        raise

    _alone(bring, workdir)
    return workdir.path


def _unpacked(folder: Path) -> Path:
    """The workdir in the user's cache that a shared relay is unpacked into."""
    config = shared.read_config(folder)
    workdir = Workdir(cache_folder() / "shared" / sha256(folder / shared.LIST)[:32])
    workdir.path.mkdir(parents=True, exist_ok=True)

    def bring() -> None:
        with workdir.locked():
            shared.unpack(folder, config, workdir.checkpoints, workdir.captions)
            workdir.write_config(config)

    _alone(bring, workdir)
    return workdir.path


def _alone(bring: Callable[[], None], workdir: Workdir) -> None:
    """Brings something into the cache, after any other process that does."""
    announced = False
    while True:
        try:
            return bring()
        except InputError as error:
            if not isinstance(error.__cause__, InUse):
                raise
        if not announced:
            log.info("%s: waiting for another process that writes there", workdir.path)
            announced = True
        time.sleep(SECONDS_TO_LOOK)
