"""Prints which versions are installed here, and the oldest that are supported."""

import importlib.metadata
import platform
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def rows() -> list[tuple[str, str, str]]:
    """Name, installed version and oldest supported one: of Python, then of what oldest.txt pins."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    python = ("Python", platform.python_version(), project["requires-python"].removeprefix(">="))
    pins = re.findall(r"(?m)^([\w.-]+)==(\S+)$", (ROOT / ".ci/oldest.txt").read_text())
    return [python, *((name, _installed(name), oldest) for name, oldest in pins)]


def _installed(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "-"


def main() -> None:
    """Prints the table."""
    for name, installed, oldest in [("", "installed", "oldest supported"), *rows()]:
        print(f"{name:24}{installed:16}{oldest}")


if __name__ == "__main__":
    main()
