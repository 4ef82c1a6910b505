"""The flag --config: what it takes, and how its overrides are read and refused."""

import json
import re
import sys
import warnings

import pytest
from absl.testing import flagsaver

from rdm_jax import main
from rdm_jax.cli.command import command
from rdm_jax.cli.config_flag import WholeNumber, load
from rdm_jax.config import Config, parse, to_dict
from rdm_jax.runtime.errors import InputError
from tests.support.paths import ROOT

DIGITS = f"--config={ROOT}/configs/digits.py"


@pytest.fixture
def saved(tmp_path):
    """The folder of a run, with its config.json alone."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text(json.dumps(to_dict(Config(seed=7))))
    return tmp_path / "run"


@pytest.mark.parametrize(
    "form",
    ["{0}", "{0}/config.json", "{1}/configs/saved.py:{0}", "{1}/configs/saved.py:{0}/config.json"],
)
def test_a_saved_config_is_found(saved, form):
    assert parse(load(form.format(saved, ROOT))) == Config(seed=7)


def test_whole_numbers_in_json_may_have_a_fraction_of_zero(saved):
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
    with pytest.raises(
        InputError, match="config.stage1.training.images=2.5 is no int; a whole number would do"
    ):
        load(str(saved))


def test_warnings_as_errors_are_no_fault_of_a_config(tmp_path):
    """`python -W error`: what the library warns of passes, what a config warns of surfaces as the
    warning that it is."""
    (tmp_path / "old.py").write_text(
        "import warnings\ndef get_config(): warnings.warn('old', DeprecationWarning)"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert parse(load(str(ROOT / "configs/digits.py")))
        with pytest.raises(DeprecationWarning, match="old"):
            load(str(tmp_path / "old.py"))


def test_a_config_or_a_plain_dict_may_be_returned(tmp_path):
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
    "no function": ("x = 1\n", "x.py has no function get_config; one that returns*"),
    "nothing returned": ("def get_config():\n    pass\n", "get_config returns NoneType; *"),
    "argument": ("def get_config(x):\n    pass\n", "x.py takes an argument; *x.py:ARGUMENT*"),
    "type": ("def get_config():\n    len(3)\n", "fails (*x.py, line 2: TypeError: object of type*"),
    "refused": (
        "from rdm_jax.runtime.errors import InputError\ndef get_config():\n    raise InputError('no; yes would do.')",
        "no; yes",
    ),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_config_file_that_cannot_be_used_is_refused(tmp_path, case):
    content, says = UNUSABLE[case]
    (tmp_path / "x.py").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=re.escape(says).replace(r"\*", ".*")) as refusal:
        load(str(tmp_path / "x.py"))
    assert str(refusal.value).endswith("would do.") and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("", "--config='' names no file"),
        ("gs://bucket/config.json", "is a URL"),
        (f"{ROOT}/configs/saved.py:gs://bucket/run", "is a URL"),
        (f"{ROOT}/configs/digts.py", "digts.py does not exist; .*/configs/digits.py would do"),
        (f"{ROOT}/configs", "is a folder without a config.json"),
        (
            f"{ROOT}/configs/digits.py:tiny",
            "digits.py takes no argument; .*digits.py alone would do",
        ),
        (f"{ROOT}/configs/saved.py:/nowhere", "/nowhere cannot be read as a config"),
        ("/nowhere.json", "/nowhere.json cannot be read as a config"),
    ],
)
def test_config_that_is_not_there_is_refused(given, says):
    with pytest.raises(InputError, match=says):
        load(given)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("12", 12),
        ("1e3", 1000),
        ("1_000", 1000),
        ("2.5e6", 2_500_000),
        ("-1", -1),
        ("0x10", 16),
        (" 8", 8),
    ],
)
def test_whole_number_parses(text, number):
    found = WholeNumber().parse(text)
    assert found == number and type(found) is int


@pytest.mark.parametrize(
    "text", ["", "many", "1.5", "1e-3", "nan", "inf", "1e99", "1e999999999", "1,000", True]
)
def test_whole_number_refuses(text):
    with pytest.raises((ValueError, TypeError)):
        WholeNumber().parse(text)


REFUSED = {
    "--config.stage1.training.learningrate=1": "config.stage1.training.learningrate=1 is not a field .*Use learning_rate.",
    "--config.learning_rate=1": "Use config.stage1.training.learning_rate or config.stage2.training.learning_rate.",
    "--config.stage3.guidance=1": r"config.stage3.guidance=1 is not a field of the config \(config has no 'stage3'\)",
    "--config.stage1.training=5": "config.stage1.training=5: config.stage1.training is a section. Use one of its fields",
    "--config.stage1.resolution[0]=9": r"a single element cannot be set. Use --config.stage1.resolution='\(1, 2\)'",
    "--config.stage1.resolution.x=9": "config.stage1.resolution has no fields. Use --config.stage1.resolution=VALUE",
    "--config.stage1.training.images=1.5": "--config.stage1.training.images=1.5 is not an integer. Use .*1e3",
    "--config.stage1.training.learning_rate=fast": "learning_rate=fast is not a number. Use .*1e-4",
    "--config.stage1.training.flip=perhaps": "flip=perhaps is neither true nor false. Use True or False",
    "--config.seed": "Missing value for flag --config.seed",
    "--foo": "--foo is not a flag. Use one of the flags that --helpshort lists",
    "--wordkir=x": "--wordkir is not a flag. Use --workdir",
    "--batch_size=8": "--batch_size is not a flag. Use --config.*batch_size",
    "--mode=tain": "--mode=tain is not known. Use train",
    "--mode=fly": "--mode=fly is not known. Use all or prepare or train or",
    "--stage=abc": "--stage=abc is not an integer of at least 1. Use .*1e3",
    "--stage=0": "--stage=0 is not an integer of at least 1",
    "--utilisation=x": "--utilisation=x is not a number. Use .*1e-4",
    "--skip_bad=maybe": "--skip_bad=maybe is neither true nor false. Use True or False",
    "configs/digits.py:x": "'configs/digits.py:x' is not a flag. Use --config=configs/digits.py:x",
    "word": "'word' is not a flag. Put quotes around a value with spaces",
}


@pytest.mark.parametrize("flag", REFUSED)
def test_parse_flags_refuses_in_one_line(monkeypatch, capsys, tmp_path, flag):
    monkeypatch.setattr(sys, "argv", ["main", DIGITS, f"--workdir={tmp_path}/run", flag])
    with flagsaver.flagsaver():
        assert main.main() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(REFUSED[flag], line) and line.startswith("error: ")
    assert not list(tmp_path.iterdir())


def test_command_refuses_in_one_line(monkeypatch, capsys):
    for given, says in (
        (
            ["--config.stage1.guidence=2"],
            "config.stage1.guidence=2 is not a field of the config .*Use guidance",
        ),
        ([f"--config={ROOT}/configs/digts.py"], "digts.py does not exist; .*digits.py would do"),
        (["--mode=tain"], "--mode=tain is not known. Use train"),
    ):
        monkeypatch.setattr(sys, "argv", ["compare", *given])
        with flagsaver.flagsaver(), pytest.raises(SystemExit, match="2"):
            command(lambda: pytest.fail("the work has begun"), config=f"{ROOT}/configs/digits.py")
        (line,) = capsys.readouterr().err.splitlines()
        assert re.search(says, line) and line.startswith("error: ")


def test_overrides_reach_the_config(monkeypatch, tmp_path):
    given = [
        "--config.stage1.training.images=1e3",
        "--config.stage1.training.learning_rate=1",
        "--noconfig.stage1.training.flip",
    ]
    given += ["--config.stage1.resolution=(16, 8)", "--config.seed=1", "--config.seed=2"]
    monkeypatch.setattr(sys, "argv", ["main", DIGITS, f"--workdir={tmp_path}", *given])
    monkeypatch.setattr(main.run, "run", lambda values, *_, **__: found.append(parse(values)))
    found = []
    with flagsaver.flagsaver():
        assert main.main() == 0
    first = found[0].stages[0]
    assert (first.training.images, first.training.learning_rate, first.training.flip) == (
        1000,
        1.0,
        False,
    )
    assert first.resolution == (16, 8) and found[0].seed == 2
