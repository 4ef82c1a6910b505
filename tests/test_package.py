"""The package: what is imported when, its dependencies, its public names, its one address."""

import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import tomllib

import pytest

import rdm_jax
from rdm_jax.config import Config
from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.lazy import lazy_import
from tests.support.paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
# Libraries that take long to import, or that an extra installs.
LATE = (
    "array_record",
    "grain",
    "huggingface_hub",
    "matplotlib",
    "mlxtend",
    "orbax",
    "safetensors",
    "tensorboardX",
)
LATE += ("tensorflow_datasets", "tokenizers", "wandb")

IMPORTS = """
import json, sys
loaded = {}
for name in ("rdm_jax", "rdm_jax.modes", "rdm_jax.main"):
    __import__(name)
    loaded[name] = sorted(sys.modules)
print(json.dumps(loaded))
"""


@pytest.fixture(scope="module")
def loaded():
    """The modules that a fresh process has, after each of three imports."""
    command = [sys.executable, "-c", IMPORTS]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return {name: set(modules) for name, modules in json.loads(output).items()}


def test_the_package_imports_nothing_but_itself(loaded):
    ours = {name for name in loaded["rdm_jax"] if name.partition(".")[0] == "rdm_jax"}
    assert ours == {"rdm_jax"}
    assert not loaded["rdm_jax"] & {"jax", "flax", "numpy", "absl", "ml_collections", *LATE}


@pytest.mark.parametrize("name", ["rdm_jax.modes", "rdm_jax.main"])
def test_optional_and_slow_libraries_are_imported_at_their_first_use(loaded, name):
    assert {"jax", "flax"} <= loaded[name]
    assert not loaded[name] & set(LATE)
    assert not [module for module in loaded[name] if re.search(r"interop\.(torch|inert)", module)]


def test_a_missing_library_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    safetensors = lazy_import("safetensors", "weights")
    with pytest.raises(InputError, match="the package safetensors is not installed") as refusal:
        safetensors.safe_open("weights.safetensors")
    assert refusal.value.fix == "Run pip install 'rdm_jax[weights]'."


def test_a_missing_module_of_our_own_is_no_missing_library():
    with pytest.raises(ModuleNotFoundError, match="rdm_jax.nowhere"):
        _ = lazy_import("rdm_jax.nowhere", "weights").anything


def test_public_names_are_importable():
    assert set(rdm_jax.__all__) <= set(dir(rdm_jax))
    assert all(getattr(rdm_jax, name) is not None for name in rdm_jax.__all__)
    assert rdm_jax.Config is Config and callable(rdm_jax.run)
    with pytest.raises(AttributeError, match="module 'rdm_jax' has no attribute 'sample'"):
        _ = rdm_jax.sample


def requirements(name: str) -> set[str]:
    """The lines of a requirements file, spelt as in pyproject.toml."""
    lines = (ROOT / name).read_text().splitlines()
    return {line.replace('"', "'") for line in lines if line[:1] not in ("", "#", "-")}


def extras(*names: str) -> set[str]:
    """The requirements of extras, and of those that they name."""
    found = set()
    for requirement in [requirement for name in names for requirement in EXTRAS[name]]:
        inner = re.fullmatch(r"rdm_jax\[(.*)\]", requirement)
        found |= extras(*inner[1].split(",")) if inner else {requirement}
    return found


def test_requirements_files_are_the_packages_dependencies():
    everything = {*PROJECT["dependencies"], *extras("all")}
    assert requirements("requirements.txt") == everything
    assert requirements("requirements-dev.txt") == extras("dev") - everything


def test_oldest_versions_are_the_lower_bounds():
    """CI tests with the lower bounds that pyproject.toml promises."""
    pins = set(re.findall(r"(?m)^\S+==\S+$", (ROOT / ".ci/oldest.txt").read_text()))
    assert {each.replace(">=", "==") for each in {*PROJECT["dependencies"], *extras("all")}} <= pins


def test_table_of_versions_has_every_pin():
    """What the scripts of CI print at their end."""
    done = subprocess.run(
        [sys.executable, ROOT / ".ci/table.py"], capture_output=True, text=True, check=True
    )
    rows = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()[1:]}
    pins = re.findall(r"(?m)^(\S+)==(\S+)$", (ROOT / ".ci/oldest.txt").read_text())
    assert list(rows) == ["Python", *(name for name, _ in pins)] and {"jaxlib", "flax"} < {*rows}
    assert {name: oldest for name, (_, oldest) in rows.items() if name != "Python"} == dict(pins)
    assert rows["Python"] == [platform.python_version(), PROJECT["requires-python"][2:]]
    assert rows["jax"][0] == importlib.metadata.version("jax")
    for script in ("run", "versions"):
        assert re.search(r"trap '.*\.ci/table\.py.*' EXIT", (ROOT / ".ci" / script).read_text())


def run_script(*flags: str, **variables: str) -> tuple[int, list[str]]:
    """The exit status and the error lines of the command `rdm-jax`."""
    script = "from rdm_jax.cli.script import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", script, *flags],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", **variables},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stderr.splitlines()


def test_script_checks_the_environment_before_jax_is_imported():
    status, (line,) = run_script(JAX_NUM_CPU_DEVICES="abc")
    assert status == 2 and line.startswith("error: JAX_NUM_CPU_DEVICES='abc' cannot be used")


def test_script_refuses_flags_like_the_module():
    status, (line,) = run_script("--config", "digits", "--workdir", "w", "--mode", "tain")
    assert status == 2 and line.startswith("error: --mode=tain is not known")


def test_the_repository_has_one_address():
    """The placeholder in pyproject.toml, and whatever else leads to the repository."""
    address = PROJECT["urls"]["Repository"]
    owner = address.split("/")[-2]
    assert address == f"https://github.com/{owner}/rdm_jax"
    names = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "pyproject.toml", "mkdocs.yml")
    paths = [ROOT / name for name in names]
    paths += [*(ROOT / "docs").rglob("*.md"), *(ROOT / "experiments/notebooks").iterdir()]
    for path in paths:
        text = path.read_text()
        found = re.findall(r"github(?:\.com)?/([\w-]+)/rdm_jax", text)
        found += re.findall(r"([\w-]+)\.github\.io/rdm_jax", text)
        assert set(found) <= {owner}, path
        if path.suffix == ".ipynb":
            assert f'REPOSITORY = \\"{address}\\"' in text
