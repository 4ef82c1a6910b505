"""How overrides of --config are read and refused."""

import re
import sys

import pytest
from absl.testing import flagsaver

from rdm_jax import main
from rdm_jax.cli.command import command
from rdm_jax.cli.config_flag import WholeNumber
from rdm_jax.config import parse
from tests.support.paths import ROOT

DIGITS = f"--config={ROOT}/configs/digits.py"


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
def test_whole_numbers(text, number):
    found = WholeNumber().parse(text)
    assert found == number and type(found) is int


@pytest.mark.parametrize(
    "text", ["", "many", "1.5", "1e-3", "nan", "inf", "1e99", "1e999999999", "1,000", True]
)
def test_what_is_no_whole_number_is_refused(text):
    with pytest.raises((ValueError, TypeError)):
        WholeNumber().parse(text)


REFUSED = {
    "--config.stage1.training.learningrate=1": "config.stage1.training.learningrate=1 is not a field .*; learning_rate would do",
    "--config.learning_rate=1": "; config.stage1.training.learning_rate or config.stage2.training.learning_rate would do",
    "--config.stage3.guidance=1": r"config.stage3.guidance=1 is not a field of the config \(config has no 'stage3'\)",
    "--config.stage1.training=5": "config.stage1.training=5: this is a section; one of its fields",
    "--config.stage1.resolution[0]=9": "an element cannot be set alone; all of them, as in --config.stage1.resolution=",
    "--config.stage1.resolution.x=9": "config.stage1.resolution has no fields; --config.stage1.resolution=VALUE",
    "--config.stage1.training.images=1.5": "--config.stage1.training.images=1.5: it is not a whole number; .*1e3 would do",
    "--config.stage1.training.learning_rate=fast": "learning_rate=fast: it is not a number; .*1e-4 would do",
    "--config.stage1.training.flip=perhaps": "flip=perhaps: it is neither true nor false; True or False would do",
    "--config.seed": "Missing value for flag --config.seed",
    "--foo": "--foo is not a flag; one of those that --helpshort lists would do",
    "--wordkir=x": "--wordkir is not a flag; --workdir would do",
    "--batch_size=8": "--batch_size is not a flag; --config.*batch_size would do",
    "--mode=tain": "--mode=tain is not known; train would do",
    "--mode=fly": "--mode=fly is not known; all or prepare or train or",
    "--stage=abc": "--stage=abc: it is not a whole number",
    "--stage=0": "--stage=0: 0 is not a positive integer",
    "--utilisation=x": "--utilisation=x: it is not a number; .*1e-4 would do",
    "--skip_bad=maybe": "--skip_bad=maybe: it is neither true nor false; True or False would do",
    "configs/digits.py:x": "'configs/digits.py:x' is no flag; --config=configs/digits.py:x would do",
    "word": "'word' is no flag; quotes around a value with spaces",
}


@pytest.mark.parametrize("flag", REFUSED)
def test_flags_that_cannot_be_used_are_refused_in_one_sentence(monkeypatch, capsys, tmp_path, flag):
    monkeypatch.setattr(sys, "argv", ["main", DIGITS, f"--workdir={tmp_path}/run", flag])
    with flagsaver.flagsaver():
        assert main.main() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(REFUSED[flag], line) and line.startswith("error: ")
    assert not list(tmp_path.iterdir())


def test_commands_of_experiments_refuse_in_the_same_way(monkeypatch, capsys):
    for given, says in (
        (
            ["--config.stage1.guidence=2"],
            "config.stage1.guidence=2 is not a field of the config .*; guidance would do",
        ),
        ([f"--config={ROOT}/configs/digts.py"], "digts.py does not exist. Use .*digits.py."),
        (["--mode=tain"], "--mode=tain is not known; train would do"),
    ):
        monkeypatch.setattr(sys, "argv", ["compare", *given])
        with flagsaver.flagsaver(), pytest.raises(SystemExit, match="2"):
            command(lambda: pytest.fail("it has begun"), config=f"{ROOT}/configs/digits.py")
        (line,) = capsys.readouterr().err.splitlines()
        assert re.search(says, line) and line.startswith("error: ")


def test_overrides_arrive(monkeypatch, tmp_path):
    given = [
        "--config.stage1.training.images=1e3",
        "--config.stage1.training.learning_rate=1",
        "--noconfig.stage1.training.flip",
    ]
    given += ["--config.stage1.resolution=(16, 8)", "--config.seed=1", "--config.seed=2"]
    monkeypatch.setattr(sys, "argv", ["main", DIGITS, f"--workdir={tmp_path}", *given])
    monkeypatch.setattr(main.modes, "run", lambda values, *_, **__: found.append(parse(values)))
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
