"""Saved configs: their version, and the upgrade of earlier versions to today's fields.

A config is saved in a workdir's config.json, and a stage's in every checkpoint (`about`). Adding,
renaming or removing a field needs a line in one of the tables below, so that saved runs stay
usable; `tests/test_golden.py` has a run of each version.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from rdm_jax.config import Config, Stage, choices, kind_of, stage_number, to_dict, to_plain
from rdm_jax.config.autoencoder import Autoencoder
from rdm_jax.config.codec import field_types, item_type
from rdm_jax.runtime.errors import InputError, remedy
from rdm_jax.runtime.files import parse_json

# 1: up to commit 46baa7f, which wrote no version. Increase it when an older release cannot read the
# saved values.
VERSION = 2
# The value of a field in configs saved before the field existed, if that is not its default: the
# first version with the field, and the value.
MEANT = {("Training", "checkpoint_minutes"): (2, 0.0), ("Data", "max_left_out"): (2, 1.0)}
# Renamed fields: (dataclass, old name) -> new name. Renamed kinds of processes, samplers and
# networks: old -> new.
RENAMED_FIELDS: dict[tuple[str, str], str] = {}
RENAMED_KINDS: dict[str, str] = {}


def save_config(config: Config, path: Path) -> None:
    """Writes a config.json; `path` is overwritten."""
    path.write_text(json.dumps({"version": VERSION, **to_dict(config)}, indent=2))


def read_saved(path: Path) -> dict[str, Any]:
    """The values of a config.json of any version, or of that in a folder, for `config.parse`.

    A file of another name is written by hand: missing fields have their defaults.

    Raises:
      InputError: the file is not a JSON object, or a newer version of this package wrote it.
    """
    path = path / "config.json" if path.is_dir() else path
    try:
        values = parse_json(path.read_text())
        if not isinstance(values, dict):
            raise ValueError("it holds no fields")
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} cannot be read as a config ({error})",
            remedy(error, "Use the config.json of a workdir."),
        ) from error
    version = values.pop("version", 1 if path.name == "config.json" else VERSION)
    check_version(version, str(path))
    stages = {name: values.pop(name) for name in list(values) if stage_number(name)}
    values = completed(Config, values | {"stages": ()}, version)
    del values["stages"]
    return values | {name: completed(Stage, stage, version) for name, stage in stages.items()}


def check_version(version: Any, where: str) -> None:
    """Raises InputError if the saved version is unknown to this code."""
    if type(version) is not int or not 1 <= version <= VERSION:
        raise InputError(
            f"{where} is of version {version!r}, and this rdm_jax reads 1 to {VERSION}",
            "Use a newer rdm_jax.",
        )


def about_now(about: dict[str, Any], where: str) -> dict[str, Any]:
    """A checkpoint's `about` with its stage upgraded. Raises InputError (`check_version`)."""
    version = about.get("version", 1)
    check_version(version, where)
    if "stage" not in about:
        return about
    trained = Autoencoder if about.get("autoencoder") else Stage
    return about | {"stage": completed(trained, about["stage"], version)}


def completed(cls: Any, value: Any, version: int = 1, default: Any = None) -> Any:
    """A saved value of the type `cls` under today's names, completed by newer fields, as JSON.

    Removed fields stay, for `config.parse` to refuse. `default` has the fields of a dataclass whose
    owner gives it other defaults than its own; None for these.
    """
    if isinstance(value, list | tuple) and choices(item_type(cls)):
        return [completed(item_type(cls), item, version) for item in value]
    if not isinstance(value, dict):
        return value
    if kinds := {kind_of(each): each for each in choices(cls)}:
        saved: Any = value.get("kind")
        kind = RENAMED_KINDS.get(saved, saved)
        if kind not in kinds:
            return value
        return _completed_fields(kinds[kind], value, version) | {"kind": kind}
    if not dataclasses.is_dataclass(cls):
        return value
    return _completed_fields(cls, value, version, default)


def completed_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Some fields of a stage, as saved with samples and evaluations, under today's names.

    Those that belong to a saved field and are younger than it get their defaults.
    """
    hints, settings = field_types(Stage), _with_list_of_guidance(settings)
    return {name: completed(hints.get(name), value) for name, value in settings.items()}


def _completed_fields(
    cls: Any, value: dict[str, Any], version: int, defaults: Any = None
) -> dict[str, Any]:
    hints, sections = field_types(cls), {}
    defaults = defaults or json.loads(json.dumps(to_plain(cls())))
    value = _with_list_of_guidance(value) if cls is Stage else value
    named = {RENAMED_FIELDS.get((cls.__name__, name), name): part for name, part in value.items()}
    for name, default in defaults.items():
        if dataclasses.is_dataclass(hints[name]):
            sections[name] = default
        if name not in named:
            since, meant = MEANT.get((cls.__name__, name), (0, None))
            # A missing section is completed like an empty one.
            default = {} if dataclasses.is_dataclass(hints[name]) else default
            named[name] = meant if version < since else default
    return {
        name: completed(hints.get(name), part, version, sections.get(name))
        for name, part in named.items()
    }


def _with_list_of_guidance(stage: dict[str, Any]) -> dict[str, Any]:
    """A stage's fields with `guidance` as a list of kinds.

    It was the weight of classifier-free guidance, with the field `guidance_interval` beside it.
    """
    weight, interval = stage.get("guidance"), stage.get("guidance_interval", [])
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        # Without a weight there was no guidance, whatever the interval.
        unused = ("guidance_interval",) if weight is None else ()
        return {name: value for name, value in stage.items() if name not in unused}
    entry = {"kind": "classifierfree", "weight": float(weight), "interval": list(interval)}
    others = {name: value for name, value in stage.items() if name != "guidance_interval"}
    return others | {"guidance": [] if weight == 1 else [entry]}
