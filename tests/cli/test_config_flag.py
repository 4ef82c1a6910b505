"""How flags and overrides of --config are read and refused."""

import re
import sys

import pytest
from absl.testing import flagsaver

from rdm_jax import main
from rdm_jax.cli.command import command
from rdm_jax.cli.config_flag import WholeNumber
from rdm_jax.config import parse
from rdm_jax.diffusion.guidance import Autoguidance, ClassifierFree
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
    "--config.stage1.training.learningrate=1": "learningrate=1 is not a field .*Use learning_rate.",
    "--config.learning_rate=1": "Use .*config.stage1.training.learning_rate or config.stage2.training",
    "--config.stage3.guidance=1": r"guidance=1 is not a field of the config \(config has no 'stage3'\)",
    "--config.stage1.training=5": "training=5: config.stage1.training is a section. Use one of its",
    "--config.stage1.resolution[0]=9": r"cannot be set. Use --config.stage1.resolution='\(1, 2\)'",
    "--config.stage1.resolution.x=9": "has no fields. Use --config.stage1.resolution=VALUE",
    "--config.stage1.training.images=1.5": "--config.*.images=1.5 is not an integer. Use .*1e3",
    "--config.stage1.training.learning_rate=fast": "learning_rate=fast is not a number. Use .*1e-4",
    "--config.stage1.training.flip=perhaps": "flip=perhaps is neither true nor false. Use True",
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
        ([f"--config={ROOT}/configs/digts.py"], "digts.py does not exist. Use .*digits.py."),
        (["--mode=tain"], "--mode=tain is not known. Use train"),
    ):
        monkeypatch.setattr(sys, "argv", ["compare", *given])
        with flagsaver.flagsaver(), pytest.raises(SystemExit, match="2"):
            command(lambda: pytest.fail("the work has begun"), config=f"{ROOT}/configs/digits.py")
        (line,) = capsys.readouterr().err.splitlines()
        assert re.search(says, line) and line.startswith("error: ")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1.5", (ClassifierFree(1.5),)),
        ("1", ()),
        (
            '[{"kind": "classifierfree", "weight": 1.5, "interval": [0.2, 3]}]',
            (ClassifierFree(1.5, (0.2, 3.0)),),
        ),
        (
            '[{"kind": "autoguidance", "weight": 1.4, "checkpoint": "runs/small/stage1"}, 2]',
            (Autoguidance(1.4, "runs/small/stage1"), ClassifierFree(2.0)),
        ),
    ],
)
def test_guidance_is_a_number_or_a_list(monkeypatch, tmp_path, text, expected):
    words = ["main", DIGITS, f"--workdir={tmp_path}", f"--config.stage1.guidance={text}"]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(main.modes, "run", lambda values, *_, **__: found.append(parse(values)))
    found = []
    with flagsaver.flagsaver():
        assert main.main() == 0
    assert found[0].stages[0].guidance == expected


def test_overrides_reach_the_config(monkeypatch, tmp_path):
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
