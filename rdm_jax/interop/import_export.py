"""Import of published weights into a run, and export of parameters in the published format."""

import dataclasses
import errno
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from rdm_jax.checkpoints import averages, folders, store
from rdm_jax.config import Config, to_dict
from rdm_jax.config.rules import refuse_latents
from rdm_jax.config.saved import VERSION
from rdm_jax.interop import formats
from rdm_jax.runtime import sharding
from rdm_jax.runtime.console import log
from rdm_jax.runtime.errors import InputError, reason
from rdm_jax.runtime.files import atomic_write, parse_json, sha256
from rdm_jax.runtime.lazy import lazy_import
from rdm_jax.workdir import Workdir

torch_files = lazy_import("rdm_jax.interop.torch_files")
safetensors = lazy_import("safetensors", "weights")
safetensors_numpy = lazy_import("safetensors.numpy", "weights")

# The supported dtypes of safetensors; others change their values as float32.
FLOATS = ("F64", "F32", "F16", "BF16")


class Weights(NamedTuple):
    """An open file of weights.

    Attributes:
      class_name, settings: of the network, in the published code's words; None if unknown.
      shapes: of every tensor in it, by PyTorch's names.
      read: reads a tensor by its name.
    """

    class_name: str | None
    settings: dict[str, Any] | None
    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]


@contextmanager
def open_weights(path: Path, key: str | None = None) -> Iterator[Weights]:
    """Opens EDM's .pkl, RDM's .pt, JiT's .pth or safetensors, recognised by content.

    Nothing is executed.

    Args:
      path: of the file.
      key: of the network in a file with several, as in `torch_files.open_torch`.

    Raises:
      InputError: it is none of these, or damaged, or has no such network.
    """
    if path.is_file() and _begins_like_safetensors(path):
        if key is not None:
            raise InputError(
                f"--weights_key={key} does not go with {path}, which holds a single network",
                "Leave it out.",
            )
        with _open_safetensors(path) as weights:
            yield weights
        return
    with torch_files.open_torch(path, key) as found:
        shapes = {name: tensor.shape for name, tensor in found.tensors.items()}
        yield Weights(
            found.class_name, found.settings, shapes, lambda name: found.tensors[name].read()
        )


def _begins_like_safetensors(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


@contextmanager
def _open_safetensors(path: Path) -> Iterator[Weights]:
    try:
        file = safetensors.safe_open(path, framework="np")
        about = file.metadata() or {}
        settings = parse_json(about["settings"]) if "settings" in about else None
        if not isinstance(settings, dict | None):
            raise ValueError("its settings are not a dict")
        names = file.keys()  # not iterable itself
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise InputError(
            f"{path} cannot be used ({error})", "Use an intact safetensors file."
        ) from error
    with file:
        yield Weights(
            about.get("class_name"),
            settings,
            shapes,
            lambda name: _read_safetensor(file, name, path),
        )


def _read_safetensor(file: Any, name: str, path: Path) -> np.ndarray:
    dtype = file.get_slice(name).get_dtype()
    if dtype not in FLOATS:
        raise InputError(
            f"{path} cannot be used ({name} is of dtype {dtype})", f"Use {', '.join(FLOATS)}."
        )
    return file.get_tensor(name)


def stage_of(weights: Weights, config: Config, number: int) -> tuple[Config, int]:
    """The config with stage `number` (from 1) as the weights require, and their number of classes.

    Every field that changes is logged.

    Raises:
      InputError: the weights are of a network that is not supported.
    """
    stage = config.stage(number)
    if weights.settings is None or weights.class_name is None:
        return config, _format(config, number).classes(weights.shapes)
    found = formats.describe(weights.class_name, weights.settings, weights.shapes, stage)
    fields = formats.determined(found.stage)
    _log_changes(f"stage{number}", stage, found.stage)
    _log_changes("data.channels", config.data.channels, found.channels)
    config = config.with_stage(number, **{name: getattr(found.stage, name) for name in fields})
    data = dataclasses.replace(config.data, channels=found.channels)
    return dataclasses.replace(config, data=data), found.classes


def fit_resolutions(config: Config, number: int, kept: Sequence[int]) -> Config:
    """The config with the resolutions of other stages adapted to that of stage `number` (from 1).

    A published relay is imported stage by stage; resolutions of stages that are not imported yet
    are not known.

    Args:
      kept: stages that are imported already; they are not changed, nor are stages beyond them.
    """
    stages = list(config.stages)
    after = itertools.takewhile(lambda index: index + 1 not in kept, range(number, len(stages)))
    before = itertools.takewhile(lambda index: index + 1 not in kept, range(number - 2, -1, -1))
    for index in [*after, *before]:
        if index >= number:
            size = tuple(side * stages[index].factor for side in stages[index - 1].resolution)
        else:
            size = tuple(side // stages[index + 1].factor for side in stages[index + 1].resolution)
        if size != stages[index].resolution:
            log.info(
                "config.stage%d.resolution: %s -> %s, to match stage%d",
                index + 1,
                stages[index].resolution,
                size,
                number,
            )
        stages[index] = dataclasses.replace(stages[index], resolution=size)
    return dataclasses.replace(config, stages=tuple(stages))


def _log_changes(path: str, before: Any, after: Any) -> None:
    """Logs every field that differs; `path` names the value in the config."""
    if dataclasses.is_dataclass(after) and type(before) is type(after):
        for field in dataclasses.fields(after):
            name = field.name
            _log_changes(f"{path}.{name}", getattr(before, name), getattr(after, name))
    elif before != after:
        log.info("config.%s: %s -> %s, as in the weights", path, before, after)


def _format(config: Config, number: int) -> formats.Format:
    """The format of a stage's network. Raises InputError if it has none; names the field."""
    try:
        return formats.format_of(config.stage(number))
    except InputError as error:
        raise InputError(f"config.stage{number}.{error.problem}", error.fix) from error


def check_no_checkpoints(workdir: Path, number: int) -> None:
    """Raises InputError if a stage already has checkpoints."""
    directory = Workdir(workdir).checkpoints(number)
    if folders.step_folders(directory):
        raise InputError(f"{directory} already has checkpoints", "Use another --workdir.")


def save_imported(
    weights: Weights,
    config: Config,
    number: int,
    classes: int,
    parameters: dict[str, Any],
    path: Path,
    workdir: Path,
) -> None:
    """Saves parameters as checkpoint 0 of a stage, in their dtype in the file.

    Args:
      weights: the file that they are read from.
      config: as `stage_of` returns it.
      number: of the stage, from 1.
      classes: their number; their names are '0', '1', ...
      parameters: from `read_parameters`.
      path: of the file.
      workdir: of the run.
    """
    imported = {
        "file": path.name,
        "sha256": sha256(path),
        "class_name": weights.class_name,
        "settings": weights.settings,
    }
    about = {
        "version": VERSION,
        "stage": to_dict(config)[f"stage{number}"],
        "classes": [str(i) for i in range(classes)],
        "seed": config.seed,
        "imported": imported,
    }
    checkpoints = store.Checkpoints(Workdir(workdir).checkpoints(number))
    checkpoints.save_ema(0, parameters, about)
    checkpoints.close()


def read_parameters(
    weights: Weights, config: Config, number: int, classes: int, path: Path
) -> dict[str, Any]:
    """Reads a stage's parameters, one after the other, into this package's tree of arrays.

    float16 and float32 are kept, other dtypes become float32.

    Raises:
      InputError: a parameter is missing, unknown or of another shape.
    """
    published = _format(config, number)
    abstract = config.stage(number).build(config.data.channels, classes).abstract
    names = _names(published, abstract)
    unknown = sorted(
        name
        for name in weights.shapes.keys() - set(names.values())
        if not published.is_buffer(name)
    )
    if unknown:
        raise InputError(
            f"{path} has a parameter {unknown[0]!r}, which the network does not have",
            "Use the config of these weights.",
        )

    def check(keys, leaf):
        name = names[_strings(keys)]
        if name not in weights.shapes:
            raise InputError(
                f"{path} has no parameter {name!r}", "Use a file of the config's network."
            )
        wanted = published.to_theirs(name, np.broadcast_to(np.int8(0), leaf.shape)).shape
        found = weights.shapes[name]
        if wanted != found:
            raise InputError(
                f"{path} has {name!r} of shape {found} instead of {wanted}, the config's",
                "Use the config of these weights.",
            )

    def read(keys, leaf):
        name = names[_strings(keys)]
        array = published.to_ours(name, weights.read(name))
        if array.dtype not in (np.float16, np.float32):
            array = array.astype(np.float32)
        return jax.device_put(array)

    jax.tree.map_with_path(check, abstract)  # all of them, before anything large is read
    try:
        published.check_buffers(weights.shapes, weights.read)
    except InputError as error:
        raise InputError(f"{path} has {error.problem}", error.fix) from error
    return jax.tree.map_with_path(read, abstract)


def _names(published: formats.Format, abstract: dict[str, Any]) -> dict[tuple[str, ...], str]:
    """The original's name of every parameter, by path."""
    paths = [_strings(keys) for keys, _ in jax.tree_util.tree_flatten_with_path(abstract)[0]]
    return {path: published.original_name(path) for path in paths}


def _strings(keys: tuple) -> tuple[str, ...]:
    return tuple(key.key for key in keys)


def export_stage(config: Config, number: int, workdir: Path, path: Path) -> None:
    """Writes a stage's parameters as safetensors: float32, named and laid out as the original.

    They are the average that the stage's config chooses, the EMA by default.

    Constants that the original stores (resampling filters, positions) are written as well, so that
    a strict `load_state_dict` accepts the file; its metadata has the class and the settings to
    construct the network with.

    Raises:
      InputError: there is no such checkpoint or average, or the published code has no such network.
      OSError: the file cannot be written.
    """
    refuse_latents(config, "the export of a stage")
    stage, published = config.stage(number), _format(config, number)
    folder, step = folders.find(
        stage.checkpoint, Workdir(workdir).checkpoints(number), f"config.stage{number}.checkpoint"
    )
    chosen = averages.choose(stage, folder, step)
    classes = len(chosen.about["classes"])
    try:
        class_name, settings = published.settings_of(config.data.channels, classes)
    except InputError as error:
        raise InputError(f"config.stage{number}.{error.problem}", error.fix) from error
    abstract = stage.build(config.data.channels, classes).abstract
    replicated = sharding.replicated(sharding.local_mesh())
    params = chosen.read(store.with_sharding(abstract, replicated))
    names, tensors = _names(published, abstract), published.buffers()
    for keys, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        name = names[_strings(keys)]
        tensors[name] = np.ascontiguousarray(published.to_theirs(name, np.asarray(leaf)))
    metadata = {"class_name": class_name, "settings": json.dumps(settings)}
    with atomic_write(path) as partial:
        try:
            safetensors_numpy.save_file(tensors, partial, metadata=metadata)
        except safetensors.SafetensorError as error:  # also raised for a full disk
            raise OSError(errno.EIO, reason(error), str(path)) from error
    log.info(
        "export: %d tensors of stage%d, step %d, average %s -> %s",
        len(tensors),
        number,
        step,
        stage.average,
        path,
    )
