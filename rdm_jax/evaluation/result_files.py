"""evaluation.json: what an evaluation writes, reads back and moves aside."""

import platform
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from rdm_jax import __version__
from rdm_jax.config import Config, to_dict
from rdm_jax.render.tables import PUBLISHED, result_table
from rdm_jax.runtime.console import log
from rdm_jax.runtime.files import move_aside, parse_json
from rdm_jax.sampling.made_with import as_written_now

RESULT = "evaluation.json"


def read_result(path: Path) -> dict[str, Any] | None:
    """Reads an evaluation.json; None if it does not exist or is damaged."""
    try:
        result = parse_json(path.read_text())
        for row in result["results"].values():
            result_table({"": row})
        features, reference = result["made_with"]["features"], result["made_with"]["reference"]
        complete = (
            isinstance(features["name"], str)
            and isinstance(reference, dict)
            and {*PUBLISHED, "where"} <= result["published"].keys()
            and result["versions"].items()
        )
        return result if complete else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def same_made_with(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether two evaluations measure the same; an earlier version may have written `old`."""
    return {**old, "images": [as_written_now(about) for about in old.get("images", [])]} == new


def keep_earlier(result: dict[str, Any] | None, made_with: dict[str, Any], folder: Path) -> None:
    """Moves the results in a folder aside, before new ones are written.

    Args:
      result: the content of evaluation.json; None if it is damaged.
      made_with: of the new evaluation; a reference that stays the same is not moved.
      folder: of the evaluation.
    """
    names = list(picture_names(result["results"]).values()) if result else []
    if result and result["made_with"]["reference"] != made_with["reference"]:
        names += sorted(path.name for path in folder.glob("reference*.npz"))
    kept = move_aside(folder, [*names, RESULT])
    log.info(
        "evaluation: %s is of other settings, or damaged, and is kept in %s", folder / RESULT, kept
    )


def picture_names(names: Iterable[str]) -> dict[str, str]:
    """The file name of each set's picture: unique, and of safe characters."""
    found: dict[str, str] = {}
    for name in names:
        plain = "".join(c if c.isalnum() or c in "-_" else "_" for c in name)[-80:]
        taken = f"{plain}.png" in found.values()
        found[name] = f"{plain}-{len(found) + 1}.png" if taken else f"{plain}.png"
    return found


def environment(config: Config) -> dict[str, Any]:
    """The fields of evaluation.json that do not decide whether two evaluations are the same."""
    libraries = {name: version(name) for name in ("jax", "flax", "numpy", "pillow")}
    return {
        "published": to_dict(config)["evaluation"]["published"],
        "versions": {"rdm_jax": __version__, "python": platform.python_version(), **libraries},
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }
