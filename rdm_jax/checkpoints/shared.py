"""A whole relay in one folder, to share: safetensors, the config, a card, and a hash of each file.

Nothing in it is executed. Unpacked, its stages are checkpoints as any others, with the same values
to the bit.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rdm_jax.checkpoints import folders, store
from rdm_jax.config import Config, parse
from rdm_jax.config.saved import about_now, read_saved, save_config
from rdm_jax.runtime import hub
from rdm_jax.runtime.console import log
from rdm_jax.runtime.errors import InputError, reason
from rdm_jax.runtime.files import atomic_write, parse_json, sha256
from rdm_jax.runtime.lazy import lazy_import
from rdm_jax.runtime.mounts import AnyPath

safetensors = lazy_import("safetensors", "weights")
safetensors_numpy = lazy_import("safetensors.numpy", "weights")

LIST, CONFIG, CARD, CAPTIONS = hub.LIST, hub.CONFIG, "README.md", "captions.json"
# What a checkpoint says of itself that whoever gets it needs; not where it was trained.
KEPT = ("version", "stage", "classes", "text", "seed", "validation_loss", "imported")
DTYPES = {"bfloat16": jnp.bfloat16, "float32": jnp.float32}


class SharedStage(NamedTuple):
    """A stage to share.

    Attributes:
      params: of its network.
      about: of its checkpoint.
      step: of its checkpoint.
    """

    params: Any
    about: dict[str, Any]
    step: int


def is_shared(folder: Path) -> bool:
    """Whether a folder holds a shared relay."""
    return (folder / LIST).is_file()


def fetch(url: str, field: str) -> Path:
    """The local folder of a shared relay 'hf://OWNER/NAME[@REVISION]', with what `unpack` reads.

    Args:
      field: that the user gave it in, for the message.

    Raises:
      InputError: as `hub.fetch`, or its config cannot be read.
    """
    folder = hub.fetch(url, [CONFIG, CAPTIONS], field)
    config = parse(read_saved(folder / CONFIG))
    files = [_file(number) for number in range(1, len(config.stages) + 1)]
    # Of the same commit, whatever is uploaded meanwhile.
    return hub.fetch(hub.at(url, folder.name), files, field)


def write(
    config: Config,
    stages: Sequence[SharedStage],
    folder: Path,
    *,
    captions: Path,
    card: str,
    dtype: str = "bfloat16",
) -> None:
    """Writes a relay into a new folder, which appears once it is complete.

    Args:
      config: of the run.
      stages: all of them, in their order.
      folder: must not exist.
      captions: of the run; may be missing.
      card: the text of README.md.
      dtype: of the parameters in the files, 'bfloat16' or 'float32'.

    Raises:
      InputError: the folder exists.
      OSError: a file cannot be written.
    """
    if folder.exists():
        raise InputError(f"{folder} exists", "Use a new folder.")
    made = folder.with_name(f".{folder.name}.incomplete")
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir(parents=True)
    for number, stage in enumerate(stages, 1):
        flat = {
            "/".join(key.key for key in keys): np.asarray(jnp.asarray(leaf, DTYPES[dtype]))
            for keys, leaf in jax.tree_util.tree_flatten_with_path(stage.params)[0]
        }
        about = {key: stage.about[key] for key in KEPT if key in stage.about}
        metadata = {"about": json.dumps(about), "step": str(stage.step)}
        safetensors_numpy.save_file(flat, made / _file(number), metadata=metadata)
    save_config(config, made / CONFIG)
    if captions.is_file():
        shutil.copyfile(captions, made / CAPTIONS)
    (made / CARD).write_text(card, "utf-8")
    hashes = {p.name: sha256(p) for p in sorted(made.iterdir()) if p.name != CARD}
    with atomic_write(made / LIST) as partial:
        partial.write_text(json.dumps({"version": hub.VERSION, "files": hashes}, indent=1))
    made.rename(folder)


def read_config(folder: Path) -> Config:
    """The config of a shared relay, whose files are compared with their hashes.

    Raises:
      InputError: a file is missing, damaged, or of a newer version of this package.
    """
    hashes = hub.hashes(folder)
    hashes.pop(CARD, None)  # which people edit, and nothing reads
    hub.check_there(folder, hashes)
    hub.check_equal(folder, hashes)
    config = parse(read_saved(folder / CONFIG))
    for number in range(1, len(config.stages) + 1):
        if _file(number) not in hashes:
            raise InputError(f"{folder} has no {_file(number)}", "Get it again.")
    return config


def unpack(
    folder: Path, config: Config, directory_of: Callable[[int], AnyPath], captions: Path
) -> None:
    """Makes a checkpoint of each stage that has none.

    Args:
      folder: of the shared relay.
      config: as `read_config` returns it.
      directory_of: the folder of the checkpoints of a stage, by its number from 1.
      captions: where the captions of the run are kept.

    Raises:
      InputError: a file is damaged, or of another network than its config says.
    """
    for number in range(1, len(config.stages) + 1):
        path, directory = folder / _file(number), directory_of(number)
        if folders.step_folders(directory):
            continue
        step, about, arrays = _read(path)
        stage = config.stage(number)
        wanted = stage.build(config.data.channels, len(about["classes"])).abstract
        about["shared"] = {"file": path.name, "sha256": sha256(path)}
        checkpoints = store.Checkpoints(directory)
        checkpoints.save_ema(step, _tree(arrays, wanted, path), about)
        checkpoints.close()
    if (folder / CAPTIONS).is_file() and not captions.exists():
        with atomic_write(captions) as partial:
            shutil.copyfile(folder / CAPTIONS, partial)
    log.info("%s: %d stages unpacked", folder, len(config.stages))


def _file(number: int) -> str:
    return f"stage{number}.safetensors"


def _read(path: Path) -> tuple[int, dict[str, Any], dict[str, np.ndarray]]:
    """Step, `about` and arrays of a stage's file."""
    try:
        with safetensors.safe_open(path, framework="np") as file:
            metadata = file.metadata()
            step, about = int(metadata["step"]), parse_json(metadata["about"])
            classes = about["classes"]
            if not isinstance(classes, list) or not isinstance(about["stage"], dict) or step < 0:
                raise ValueError("its metadata are not those of a stage")
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except InputError:
        raise
    except Exception as error:  # the library raises its own errors
        raise InputError(f"{path} cannot be read ({reason(error)})", "Get it again.") from error
    return step, about_now(about, str(path)), arrays


def _tree(arrays: dict[str, np.ndarray], wanted: Any, path: Path) -> Any:
    """The arrays as a network's tree, in the network's own dtypes."""
    left = set(arrays)

    def leaf(keys: tuple[Any, ...], like: jax.ShapeDtypeStruct) -> jax.Array:
        name = "/".join(key.key for key in keys)
        found = arrays.get(name)
        if found is None or found.shape != like.shape:
            raise InputError(
                f"{path} is of another network ({name} is {getattr(found, 'shape', 'missing')}, "
                f"and {like.shape} by its config)",
                "Get it again.",
            )
        left.discard(name)
        return jnp.asarray(found, like.dtype)

    tree = jax.tree_util.tree_map_with_path(leaf, wanted)
    if left:
        raise InputError(
            f"{path} has an array {min(left)!r}, which the network does not have", "Get it again."
        )
    return tree
