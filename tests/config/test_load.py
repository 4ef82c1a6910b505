"""What --config and `load_config` accept: files, names of packaged configs, a run's folder."""

import json
import re
import warnings
from pathlib import Path

import pytest

from rdm_jax.config import Config, parse, to_dict, validate
from rdm_jax.config.load import load, load_config, packaged
from rdm_jax.config.validate import check_config
from rdm_jax.diffusion.processes import CascadeProcess
from rdm_jax.diffusion.samplers import CascadeHeun
from rdm_jax.runtime.errors import InputError
from tests.support.paths import ROOT


@pytest.fixture
def saved(tmp_path):
    """The folder of a run with nothing but its config.json."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text(json.dumps(to_dict(Config(seed=7))))
    return tmp_path / "run"


@pytest.mark.parametrize(
    "form",
    ["{0}", "{0}/config.json", "{1}/configs/saved.py:{0}", "{1}/configs/saved.py:{0}/config.json"],
)
def test_load_finds_saved_config(saved, form):
    assert parse(load(form.format(saved, ROOT))) == Config(seed=7)


def test_load_accepts_integral_floats(saved):
    values = to_dict(Config())
    values["stage1"]["training"]["images"], values["stage1"]["resolution"] = 2e6, [64.0, 64.0]
    (saved / "config.json").write_text(json.dumps(values))
    first = parse(load(str(saved))).stages[0]
    assert (
        first.training.images == 2_000_000
        and type(first.training.images) is int
        and first.resolution == (64, 64)
    )
    values["stage1"]["training"]["images"] = 2.5
    (saved / "config.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match="config.stage1.training.images=2.5 is not a whole number"):
        load(str(saved))


def test_a_number_for_a_part_is_refused_with_the_kinds():
    with pytest.raises(InputError, match=r"sampler=3 is a single value\. Use .* kind 'heun' or"):
        load_config("digits", stage1={"sampler": 3})


def test_a_number_for_a_text_is_refused_with_the_text():
    with pytest.raises(InputError, match=r"labels=3 is not a text\. Use a text, such as '3'\."):
        load_config("digits", sampling={"labels": 3})


def test_a_number_may_stand_for_its_text_where_a_width_does(tmp_path):
    """In a config it is always a text, so that the command line can replace one by another."""
    found = load_config("digits", stage1={"average": 0.10}, stage2={"average": "raw"})
    assert [stage.average for stage in found.stages] == ["0.1", "raw"]
    assert [stage.width for stage in found.stages] == [0.1, None]
    direct = found.with_stage(1, average=0.1)
    assert direct.stage(1).width == 0.1
    assert direct.to_config_dict().stage1.average == "0.1"
    assert parse(direct.to_config_dict()) == found
    with pytest.raises(InputError, match="stage1.average=True is not a text"):
        load_config("digits", stage1={"average": True})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("averages", (0.1, 0.05)),
        ("averages", (0.05, 0.05)),
        ("averages", (0.0,)),
        ("averages", (0.1, 0.3)),
        ("snapshot_every", 0),
    ],
)
def test_averages_out_of_bounds_are_refused(field, value):
    config = load_config("digits", stage1={"training": {field: value}})
    with pytest.raises(InputError, match=rf"config.stage1.training.{field}=.* Use [\dw].*\."):
        validate.check_config(config)


def test_load_with_warnings_as_errors(tmp_path):
    """Under `python -W error`, warnings within the library do not fail a config; a warning raised
    by a config surfaces as itself."""
    (tmp_path / "old.py").write_text(
        "import warnings\ndef get_config(): warnings.warn('old', DeprecationWarning)"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert parse(load(str(ROOT / "configs/digits.py")))
        with pytest.raises(DeprecationWarning, match="old"):
            load(str(tmp_path / "old.py"))


def test_get_config_returns_config_or_dict(tmp_path):
    (tmp_path / "x.py").write_text(
        "from rdm_jax.config import Config, to_dict\nget_config = lambda plain='': eval(plain or 'Config()')"
    )
    assert (
        parse(load(str(tmp_path / "x.py")))
        == parse(load(f"{tmp_path}/x.py:to_dict(Config())"))
        == Config()
    )


UNUSABLE = {
    "syntax": ("def get_config(:\n", "fails (*x.py, line 1: SyntaxError: invalid syntax)"),
    "encoding": (b"x = '\xff'\n", "fails (*x.py*SyntaxError*utf-8*"),
    "import": (
        "def get_config():\n    import nothing_here\n",
        "fails (*x.py, line 2: ModuleNotFoundError: *nothing_here*",
    ),
    "no function": ("x = 1\n", "x.py has no function get_config. Add one. Return*"),
    "nothing returned": ("def get_config():\n    pass\n", "get_config returns NoneType. Return*"),
    "argument": ("def get_config(x):\n    pass\n", "x.py takes an argument. Use *x.py:ARGUMENT*"),
    "type": ("def get_config():\n    len(3)\n", "fails (*x.py, line 2: TypeError: object of type*"),
    "refused": (
        "from rdm_jax.runtime.errors import InputError\ndef get_config():\n    raise InputError('no', 'Yes.')",
        "no. Yes.",
    ),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_load_refuses_unusable_file(tmp_path, case):
    content, says = UNUSABLE[case]
    (tmp_path / "x.py").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=re.escape(says).replace(r"\*", ".*")) as refusal:
        load(str(tmp_path / "x.py"))
    assert refusal.value.fix.endswith(".") and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("", "--config='' names no config"),
        ("gs://bucket/config.json", "is a URL"),
        (f"{ROOT}/configs/saved.py:gs://bucket/run", "is a URL"),
        (f"{ROOT}/configs/digts.py", "digts.py does not exist. Use .*/configs/digits.py."),
        (f"{ROOT}/configs", "is a folder without a config.json"),
        (
            f"{ROOT}/configs/digits.py:tiny",
            "digits.py takes no argument. Use .*digits.py.",
        ),
        (f"{ROOT}/configs/saved.py:/nowhere", "/nowhere cannot be read as a config"),
        ("/nowhere.json", "/nowhere.json cannot be read as a config"),
    ],
)
def test_load_refuses_missing_config(given, says):
    with pytest.raises(InputError, match=says):
        load(given)


@pytest.mark.parametrize("name", [name for name in packaged() if name != "saved"])
def test_load_finds_packaged_config(monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    assert load(name) == load(str(ROOT / "configs" / f"{name}.py"))


def test_packaged_config_takes_argument(monkeypatch, tmp_path, saved):
    monkeypatch.chdir(tmp_path)
    assert parse(load(f"saved:{saved}")) == Config(seed=7)
    assert load("emoji:tiny") == load(f"{ROOT}/configs/emoji.py:tiny")


@pytest.mark.parametrize(
    "name", ["emoji", "emoji_latent", "emoji_small", "emoji_text", "openclipart"]
)
def test_a_packaged_config_refuses_an_unknown_argument(name):
    with pytest.raises(InputError, match=r"the size 'tny' .* unknown\. Use 'full' or 'tiny'\."):
        load(f"{name}:tny")


def test_load_prefers_run_or_file_to_packaged_config(monkeypatch, tmp_path, saved):
    monkeypatch.chdir(tmp_path)
    digits = load("digits")
    Path("digits").mkdir()
    assert load("digits") == digits  # a folder without a config
    saved.joinpath("config.json").rename("digits/config.json")
    assert parse(load("digits")) == Config(seed=7)
    Path("emoji").write_text(
        "from rdm_jax.config import Config\nget_config = lambda: Config(seed=8)"
    )
    assert parse(load("emoji")) == Config(seed=8)


@pytest.mark.parametrize(
    ("given", "fix"),
    [
        ("digts", "Use digits."),
        ("configs/digits.py", "Use digits."),
        ("none_of_them", f"Use a config file, a run's folder, or one of {', '.join(packaged())}."),
    ],
)
def test_load_refuses_unknown_name(monkeypatch, tmp_path, given, fix):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"--config={given!r}: {given} does not exist") as refusal:
        load(given)
    assert refusal.value.fix == fix


def test_config_file_imports_neighbours(tmp_path):
    for folder, seed in (("a", 1), ("b", 2)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "other.py").write_text(f"seed = {seed}")
        (tmp_path / folder / "mine.py").write_text(
            "from rdm_jax.config import Config\n"
            "from . import other\n"
            "get_config = lambda: Config(seed=other.seed)"
        )
    seeds = [load(str(tmp_path / folder / "mine.py")).seed for folder in "aba"]
    assert seeds == [1, 2, 1]


def test_load_config_overrides_fields():
    config = load_config("digits", seed=3, stage2={"sampler": {"steps": 8}})
    usual = load_config("digits")
    assert config.seed == 3 and config.stages[0] == usual.stages[0]
    assert config.stages[1].sampler.steps == 8
    assert config.stages[1].sampler.rho == usual.stages[1].sampler.rho
    with pytest.raises(InputError, match=r"config.stage1.guidence=2 is not a field"):
        load_config("digits", stage1={"guidence": 2})


def test_load_config_of_another_kind_has_its_own_fields():
    process = {"kind": "cascade", "augment_max": 0.25}
    config = load_config("digits", stage2={"process": process, "sampler": {"kind": "cascadeheun"}})
    assert config.stages[1].process == CascadeProcess(augment_max=0.25)
    assert config.stages[1].sampler == CascadeHeun()


def test_a_config_without_stages_is_refused():
    with pytest.raises(InputError, match="the config has no stages"):
        check_config(Config(stages=()))
