"""The rooms of the package: which may import which, and how long a file may be."""

import ast
from pathlib import Path

import pytest

from tests.support.paths import ROOT

PACKAGE = ROOT / "rdm_jax"
LINES = 400
# A room imports from itself and from rooms before it, not from those beside or behind it.
ORDER = [
    {"runtime"},
    {"text"},
    {"diffusion", "models", "data"},
    {"config"},
    {"checkpoints", "render"},
    {"workdir"},
    {"interop"},
    {"stage_datasets"},
    {"training", "sampling"},
    {"loading", "evaluation"},
    {"plan"},
]
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
ALLOWED = {
    room: {room} | {other for other in LEVEL if LEVEL[other] < LEVEL[room]} for room in LEVEL
}
ALLOWED["cli"] = {"runtime", "config", "cli"}
ALLOWED["modes"] = {*LEVEL, "cli", "modes"} - {"plan"}
ALLOWED["main"] = {*LEVEL, "cli", "modes"}
ALLOWED["__init__"] = {*LEVEL, "modes"}


def imported(source: str) -> set[str]:
    """The modules that a source imports anywhere in it, at once or at their first use."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                found |= {name.name for name in names}
            case ast.ImportFrom(module=module, names=names):
                found |= {f"{module}.{name.name}" for name in names}
            case ast.Call(func=ast.Name(id="lazy_import"), args=[ast.Constant(value=name), *_]):
                found.add(name)
    return found


def rooms(source: str) -> set[str]:
    """The rooms of the package that a source imports from."""
    names = {name.split(".")[1] for name in imported(source) if name.startswith("rdm_jax.")}
    return names - {"__version__"}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("room", sorted({room_of(path) for path in PACKAGE.rglob("*.py")}))
def test_room_imports_from_rooms_before_it(room):
    for path in PACKAGE.rglob("*.py"):
        if room_of(path) == room:
            assert rooms(path.read_text()) <= ALLOWED[room], path


def test_imports_of_every_kind_are_seen():
    source = """
import rdm_jax.training.loop
from rdm_jax import plan
def at_its_first_use():
    from rdm_jax.sampling.labels import parse
weights = lazy_import("rdm_jax.interop.import_export", "weights")
"""
    assert rooms(source) == {"training", "plan", "sampling", "interop"}


@pytest.mark.parametrize("folder", ["rdm_jax", "tests", "experiments", "configs"])
def test_file_has_at_most_400_lines(folder):
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines())
        for path in (ROOT / folder).rglob("*.py")
    }
    assert not {name for name, length in lengths.items() if length > LINES}


def test_no_test_module_is_imported():
    for path in (ROOT / "tests").rglob("*.py"):
        names = {name for name in imported(path.read_text()) if name.startswith("tests.")}
        assert not {name for name in names if ".test_" in name}, path
