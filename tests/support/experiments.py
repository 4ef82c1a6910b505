"""Experiments as commands: their configs, their smallest runs, and the tables that they print."""

import re
from pathlib import Path

from rdm_jax.config import Config
from rdm_jax.config.load import load_config
from tests.support.commands import python
from tests.support.configs import write_images
from tests.support.paths import ROOT


def config_of(path: str, *arguments: str) -> Config:
    return load_config(":".join([str(ROOT / path), *arguments]))


def run(*arguments: str) -> str:
    done = python(*arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def tables(printed: str) -> dict[str, list[list[str]]]:
    found = re.findall(r"^(.+)\n\n((?:\|.*\|\n)+)", printed, re.MULTILINE)
    return {
        title: [[cell.strip() for cell in line[1:-1].split("|")] for line in body.splitlines()]
        for title, body in found
    }


def smallest(folder: Path, labelled: bool = True) -> list[str]:
    """Arguments for a whole experiment at the smallest size: one seed, a few steps, four images."""
    write_images(folder / "images", count=16)
    if not labelled:
        for path in (folder / "images").glob("*/*.png"):
            path.rename(folder / "images" / path.name)
        (folder / "images" / "a").rmdir()
        (folder / "images" / "b").rmdir()
    arguments = [
        f"--config=tests/support/configs.py:{folder / 'images'}",
        f"--workdir={folder / 'runs'}",
        "--seeds=0",
    ]
    arguments += [
        "--config.data.held_out=4",
        "--config.evaluation.features=classifier",
        "--config.evaluation.seeds=0-3",
    ]
    for number in (1, 2):
        arguments += [
            f"--config.stage{number}.training.{field}"
            for field in ("images=40", "checkpoint_every=8", "validation=4")
        ]
    return arguments
