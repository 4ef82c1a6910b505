"""README and docs: length, links, settings and flags that exist, and commands that run."""

import ast
import dataclasses
import importlib
import importlib.util
import json
import re
import shlex
import sys
import tomllib
import typing
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from PIL import Image

from rdm_jax import main
from rdm_jax.config import Config, Stage
from rdm_jax.config.codec import field_types
from tests.support.paths import ROOT

PAGES = sorted((ROOT / "docs").rglob("*.md"))
# In the order in which their commands are run: those of later ones need the run of the first.
GUIDE = ("index", "configuration", "data", "training", "sampling", "python", "evaluation")
GUIDE_PAGES = [ROOT / "docs" / f"{name}.md" for name in GUIDE]
DOCUMENTS = [ROOT / "README.md", *GUIDE_PAGES, *(page for page in PAGES if page not in GUIDE_PAGES)]
OTHERS = [ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
OTHERS += [*(ROOT / "experiments").rglob("README.md"), *(ROOT / "tests").rglob("README.md")]

MARKER = re.compile(r"<!-- (test|needs): (.+) -->")
LINK = re.compile(r"\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`\n]+)`")
FLAG = re.compile(r"--([a-z_]+)((?:\.\w+)*)")
SETTING = re.compile(
    r"(?:config\.)?((?:data|sampling|evaluation|parallel|stage[N\d]|training|network|process|sampler"
    r"|precondition)(?:\.[a-z_\d]+)+)(?:=.*)?"
)


class Block(NamedTuple):
    """A fenced block: where it stands, its language, the comment before it, its lines."""

    where: str
    language: str
    marker: str
    text: str


def blocks(path: Path) -> list[Block]:
    found, marker, lines = [], "", path.read_text().splitlines()
    number = 0
    while number < len(lines):
        line = lines[number]
        if line.startswith("```"):
            end = lines.index("```", number + 1)
            where = f"{path.relative_to(ROOT)}:{number + 1}"
            found.append(Block(where, line[3:], marker, "\n".join(lines[number + 1 : end])))
            number, marker = end, ""
        elif line.strip():
            marker = line.strip()
        number += 1
    return found


BLOCKS = [block for path in DOCUMENTS for block in blocks(path)]


def marked(name: str) -> list[Block]:
    """The blocks that a test of this module runs."""
    return [
        block for block in BLOCKS if block.marker == f"<!-- test: tests/test_docs.py::{name} -->"
    ]


def commands(text: str) -> list[str]:
    """The commands of a block, one line each."""
    return [line for line in text.replace("\\\n", " ").splitlines() if line.strip()]


def test_readme_has_at_most_150_lines():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.where)
def test_blocks_are_run_by_a_test_or_say_what_they_need(block):
    assert block.language in ("bash", "python", "bibtex")
    if block.language == "bibtex" or block.marker == "<!-- tests -->":  # which .ci/run runs
        return
    match = MARKER.fullmatch(block.marker)
    assert match, f"{block.where} has no line <!-- test: ... --> or <!-- needs: ... --> before it"
    if match[1] == "test":
        file, _, function = match[2].partition("::")
        source = (ROOT / file).read_text()
        assert not function or f"\ndef {function}(" in source
        for module in re.findall(r"-m (experiments\.[\w.]+)", block.text):
            assert module.rpartition(".")[2] in source, f"{file} does not run {module}"


def config_fields() -> set[str]:
    """All fields of a config by their dotted paths, from `stageN` and from the stage's sections."""

    def walk(cls: type, path: str) -> typing.Iterator[str]:
        hints = field_types(cls)
        for field in dataclasses.fields(cls):
            name = f"{path}.{'stageN' if field.name == 'stages' else field.name}".lstrip(".")
            yield name
            for hint in (hints[field.name], *typing.get_args(hints[field.name])):
                if dataclasses.is_dataclass(hint):
                    yield from walk(hint, name)

    found = set(walk(Config, ""))
    sections = {name.removeprefix("stageN.") for name in found}
    kinds = ("network", "precondition", "process", "sampler")
    return found | sections | {f"{stage}{kind}.kind" for stage in ("", "stageN.") for kind in kinds}


FIELDS = config_fields()


def is_field(path: str) -> bool:
    return re.sub(r"^stage\d", "stageN", path) in FIELDS


@pytest.mark.parametrize(
    "path", [*DOCUMENTS, *OTHERS], ids=lambda path: str(path.relative_to(ROOT))
)
def test_settings_exist(path):
    for code in CODE.findall(path.read_text()):
        match = SETTING.fullmatch(code)
        if match and not re.search(r"\.(py|json|npz|safetensors)\b|^data\.sources", code):
            assert is_field(match[1]), code
    for name, field in FLAG.findall(path.read_text()):
        assert name != "config" or not field or field[1:].isupper() or is_field(field[1:]), field


def defined_flags(module: str) -> set[str]:
    """The flags of a script, as its source defines them."""
    path = ROOT / module.replace(".", "/")
    source = (path / "__main__.py" if path.is_dir() else path.with_suffix(".py")).read_text()
    return set(re.findall(r"DEFINE_\w+\(\s*\"(\w+)\"", source))


@pytest.mark.parametrize(
    "path", [*DOCUMENTS, *OTHERS], ids=lambda path: str(path.relative_to(ROOT))
)
def test_flags_exist(path):
    of_main = {flag.name for flag in flags.FLAGS.get_key_flags_for_module(main)} | {"config"}
    assert {"mode", "workdir", "target"} <= of_main
    for line in commands(path.read_text()):
        scripts = r"-m (rdm_jax\.main|experiments\.\w+\.\w+|experiments\.\w+(?=\s))([^`|]*)"
        for module, rest in re.findall(scripts, line):
            known = of_main if module == "rdm_jax.main" else defined_flags(module) | {"config"}
            for name, _ in FLAG.findall(rest):
                assert name in known, f"{module} has no flag --{name}"


def slug(title: str) -> str:
    """The anchor of a heading, on a public host and on the site alike."""
    return re.sub(r"[^\w\- ]", "", title.lower().replace("`", "")).strip().replace(" ", "-")


@pytest.mark.parametrize(
    "path", [*DOCUMENTS, *OTHERS], ids=lambda path: str(path.relative_to(ROOT))
)
def test_links_lead_somewhere(path):
    text = path.read_text()
    prose = re.sub(r"```.*?```|\$\$.*?\$\$|\$[^$\n]+\$", "", text, flags=re.DOTALL)
    for words, target in LINK.findall(prose):
        if target.startswith(("http:", "https:")):
            continue
        name, _, anchor = target.partition("#")
        found = (path.parent / name).resolve() if name else path
        assert found.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", found.read_text(), re.MULTILINE)
            assert anchor in map(slug, headings), target
        if found.suffix == ".py" and (code := CODE.fullmatch(words)):
            defined = re.search(rf"^\s*(?:def|class) {code[1]}\b", found.read_text(), re.MULTILINE)
            assert defined, f"{name} does not define {code[1]}"
    labels = set(re.findall(r"^\[([\w-]+)\]: \S+$", text, re.MULTILINE))
    assert set(re.findall(r"\]\[([\w-]+)\]", text)) <= labels


def test_named_tests_exist():
    text = (ROOT / "docs/reliability.md").read_text()
    named = set(re.findall(r"`((?:\w+/)*test_\w+\.py)`", text))
    assert len(named) > 20
    assert not [name for name in named if not (ROOT / "tests" / name).is_file()]


def test_the_address_is_that_of_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    owner, name = project["urls"]["Repository"].split("/")[-2:]
    hosts = r"(?:github\.com|colab\.research\.google\.com/github)/([\w.-]+/[\w.-]+)"
    for path in ("README.md", "mkdocs.yml"):
        text = (ROOT / path).read_text()
        assert set(re.findall(hosts, text)) == {f"{owner}/{name}"}
        assert set(re.findall(r"https://([\w-]+)\.github\.io", text)) == {owner}


def test_configuration_lists_every_field_with_its_default():
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs/hooks.py")
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    assert hooks.FIELDS in (ROOT / "docs/configuration.md").read_text().splitlines()
    section, listed = "", set()
    for line in hooks.config_reference().splitlines():
        if heading := re.fullmatch(r"### `config\.?([\w.]*)`.*", line):
            section = heading[1]
        if row := re.match(r"\| `(\w+)` \| `(.+?)` \| `(.+?)` \| (.*?) \| (.*) \|$", line):
            listed.add(f"{section}.{row[1]}".lstrip("."))
            symbols = section.endswith(("process", "published"))  # named as in their paper
            assert row[5] or symbols, f"{section}.{row[1]}"
    sections = {field.rpartition(".")[0] for field in FIELDS}
    repeated = {f for f in FIELDS if re.search(r"(schedule|path)\.", f)}  # one class, in two places
    expected = {
        f for f in FIELDS if re.match(r"(stageN|data|sampling|evaluation|parallel|seed)", f)
    }
    kinds = {f for f in FIELDS if f.endswith(".kind")}
    assert expected - sections - kinds - repeated <= listed


# The guide's commands as they stand, in one folder, one after the other, but for these sizes.
SMALLER = {"=0-4999": "=0-31", "=0-99": "=0-15", "=76800": "=256", "=6_400": "=192"}
SMALL_STAGE = {
    "network.channels": 8,
    "network.channel_mult": "(1,)",
    "network.blocks": 1,
    "network.attention_levels": "()",
    "network.head_channels": 8,
    "training.images": 192,
    "training.batch_size": 16,
    "training.warmup": 16,
    "training.checkpoint_every": 96,
    "training.preview_every": 0,
    "training.evaluate_every": 0,
    "training.log_every": 48,
    "training.validation": 16,
    "sampler.steps": 4,
}
SMALL = [f"--config.stage{n}.{name}={value}" for n in (1, 2) for name, value in SMALL_STAGE.items()]
SMALL += ["--config.sampling.seeds=0-15", "--config.sampling.batch_size=16"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the commands find: the repository's configs, a folder of photographs, small images."""
    folder = tmp_path_factory.mktemp("guide")
    for name in ("configs", "experiments"):
        (folder / name).symlink_to(ROOT / name)
    random = np.random.default_rng(0)
    photograph = (300, 280, 3)
    sizes = {"photographs/cats": photograph, "photographs/dogs": photograph}
    sizes |= {"small": (8, 8), "large": (32, 32)}
    for place, size in sizes.items():
        (folder / place).mkdir(parents=True)
        for number in range(8):
            image = random.integers(0, 256, size, np.uint8)
            Image.fromarray(image).save(folder / place / f"{number}.png")
    return folder


def in_small(command: str) -> list[str]:
    """The arguments of a documented command, with small networks and few images."""
    _, _, flags_given = command.partition("-m rdm_jax.main ")
    words = shlex.split(flags_given)
    for large, small in SMALLER.items():
        words = [word.replace(large, small) if word.endswith(large) else word for word in words]
    named = {word.partition("=")[0] for word in words}
    added = [word for word in SMALL if word.partition("=")[0] not in named]
    return words[:2] + added + words[2:]


@pytest.fixture(scope="module")
def own_kinds():
    """Takes back what `extend` adds."""
    kinds = [field.metadata.get("kinds", []) for field in dataclasses.fields(Stage)]
    before = [list(each) for each in kinds]
    yield
    for each, known in zip(kinds, before, strict=True):
        each[:] = known


@pytest.fixture(scope="module")
def guide(folder, own_kinds):
    """Runs the commands of the guide, in their order; what each returned, by the block."""
    for library in ("grain", "tensorflow_datasets"):
        importlib.import_module(library)  # their flags would be taken back with the command's
    statuses = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for block in marked("test_commands"):
            if block.language == "python":  # a config file, with its name in the first line
                (folder / block.text.split()[1]).write_text(block.text)
                continue
            for command in commands(block.text):
                patch.setattr(sys, "argv", ["main", *in_small(command)])
                with flagsaver.flagsaver():
                    statuses[f"{block.where}: {command}"] = main.main()
    return statuses


@pytest.mark.second
def test_commands(guide, folder):
    assert len(guide) > 10
    assert not {command: status for command, status in guide.items() if status}
    run = folder / "runs/digits"
    for path in ("samples/samples.npz", "samples/grid.png", "evaluation/evaluation.json"):
        assert (run / path).is_file(), path
    assert np.load(run / "threes/samples.npz")["labels"].tolist() == [3] * 16
    sampled = json.loads((run / "midpoint/samples.json").read_text())
    assert sampled["stages"]["stage1"]["sampler"]["kind"] == "midpoint"
    assert (folder / "runs/mine/samples/samples.npz").is_file()


@pytest.mark.second
@pytest.mark.parametrize("block", marked("test_python"), ids=lambda block: block.where)
def test_python(guide, folder, monkeypatch, block):
    monkeypatch.chdir(folder)
    names: dict = {}
    exec(compile(ast.parse(block.text), block.where, "exec"), names)
    if "images" in names and isinstance(names["images"], np.ndarray):
        assert names["images"].shape[1:] == (32, 32, 1) and names["images"].dtype == np.uint8
    if "result" in names:
        metrics = names["result"]["results"]["samples"]["metrics"]
        assert np.isfinite(metrics["frechet_distance"])
