"""What the command refuses, each in one sentence, before any work."""

import fcntl
import re

import pytest

from rdm_jax.modes import run
from rdm_jax.runtime.errors import InputError
from tests.support.configs import LOW, tiny_config

REFUSED = {
    "unknown field": (["--config.stage1.network.chanels=8"], r"chanels.*channels"),
    "unknown flag": (["--wordkir=x"], "wordkir"),
    "wrong type": (["--config.stage1.training.images=many"], "images=many"),
    "not divisible by p": (
        ["--config.stage2.resolution=(9, 9)"],
        r"stage2.resolution=\(9, 9\).*divisible by 2",
    ),
    "not divisible by the stride": (
        ["--config.stage1.network.patch=3"],
        r"stage1.resolution=\(4, 6\).*stride",
    ),
    "stages that do not fit": (
        ["--config.stage1.resolution=(8, 8)"],
        r"stage2.resolution=\(8, 12\).*\(16, 16\)",
    ),
    "missing data": (
        ["--config.data.source=folder:/nowhere", "--config.data.directory={tmp}/new"],
        "/nowhere",
    ),
    "prepared otherwise": (["--config.data.channels=1"], r"images_prepared.*channels"),
    "missing config": (["--config=configs/nothing.py"], "nothing.py"),
    "class out of range": (["--config.sampling.labels=0,2"], r"labels='0,2'.*0 to 1"),
    "seed out of range": (["--config.sampling.seeds=0-4294967296"], "seeds='0-4294967296'"),
    "no seeds": (["--config.sampling.seeds=a-b"], "seeds='a-b'"),
    "stage that is not there": (["--mode=train", "--stage=3"], "--stage=3"),
    "stage without its mode": (["--stage=1"], "--stage=1 does not go with --mode=all"),
    "stray word": (["config.seed=5"], r"config.seed=5.*Use --config.seed=5\."),
    "checkpoint that is not there": (
        ["--config.stage2.checkpoint=/nowhere/9"],
        "config.stage2.checkpoint='/nowhere/9' is not a checkpoint",
    ),
    "start that is not there": (
        ["--config.stage1.training.start_from=/nowhere/9"],
        "config.stage1.training.start_from='/nowhere/9' is not .* Use the folder of a step",
    ),
    "checkpoint of no kind": (["--config.stage2.checkpoint=bset"], "checkpoint='bset'"),
    "nothing to sample from": (["--mode=sample"], r"/run' does not exist.*train first"),
    "guidance without dropout": (
        ["--config.stage1.guidance=2.0", "--config.stage1.training.label_dropout=0.0"],
        r"stage1.guidance=2.0.*label_dropout",
    ),
}


@pytest.fixture(scope="module")
def prepared(image_folder):
    """The folder of images, prepared."""
    values = tiny_config(image_folder, low=LOW).to_config_dict()
    run(values, str(image_folder.parent / "prepared"), mode="prepare")
    return image_folder


@pytest.mark.parametrize("case", REFUSED)
def test_input_is_refused_in_one_sentence(prepared, tmp_path, refused, case):
    flags, pattern = REFUSED[case]
    flags = [flag.replace("{tmp}", str(tmp_path)) for flag in flags]
    refused(prepared, tmp_path / "run", *flags, pattern=pattern)
    assert not list((tmp_path / "run").rglob("checkpoints"))


def test_refused_run_leaves_the_workdir_as_it_was(image_folder, tmp_path, refused):
    flags = ["--config.stage1.network.channels=16", "--config.sampling.labels=7"]
    refused(image_folder, tmp_path / "run", *flags, pattern=r"labels='7'")
    assert not (tmp_path / "run/config.json").exists()


def test_batch_that_devices_cannot_share_is_refused(image_folder, tmp_path, refused):
    flag = "--config.stage2.training.batch_size=12"
    pattern = r"stage2.training.batch_size=12.*multiple of 8"
    refused(image_folder, tmp_path / "run", flag, pattern=pattern)


def test_workdir_that_cannot_be_written_is_refused(image_folder, tmp_path, refused):
    (tmp_path / "file").write_text("in the way")
    refused(image_folder, tmp_path / "file" / "run", pattern="cannot be written")


def test_workdir_in_use_is_refused(image_folder, tmp_path, refused):
    (tmp_path / "run").mkdir()
    with (tmp_path / "run/.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused(image_folder, tmp_path / "run", pattern="in use by another run")


@pytest.mark.parametrize(
    ("workdir", "flags", "says"),
    [
        ("", {}, "--workdir='' names no folder"),
        ("s3://bucket/run", {}, "--workdir='s3://bucket/run' is a URL, and s3:// is not supported"),
        ("gs://bucket", {}, "'gs://bucket' is not a folder of a bucket"),
        ("file:///run", {"mode": "report"}, "--workdir='file:///run' is a URL"),
        (
            "run",
            {"mode": "import", "stage": 1, "weights": "s3://b/x.pkl"},
            "--weights='s3://b/x.pkl' is a URL",
        ),
        (
            "run",
            {"mode": "report", "evaluations": ["hdfs://x"]},
            "--evaluations='hdfs://x' is a URL",
        ),
        (
            "run",
            {"change": {"checkpoint": "s3://b/run/5"}},
            "config.stage1.checkpoint='s3://b/run/5' is a URL",
        ),
        (
            "run",
            {"change": {"training.start_from": "hdfs://b/5"}},
            "config.stage1.training.start_from='hdfs://b/5' is a URL",
        ),
    ],
)
def test_paths_that_are_none_are_refused_before_anything_is_made(
    image_folder, tmp_path, monkeypatch, workdir, flags, says
):
    monkeypatch.chdir(tmp_path)
    values = tiny_config(image_folder).to_config_dict()
    values.stage1.update_from_flattened_dict(flags.pop("change", {}))
    with pytest.raises(InputError, match=re.escape(says)):
        run(values, workdir, **flags)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mode", ["sample", "evaluate", "report", "export"])
def test_workdir_with_a_typo_is_refused_where_a_run_is_needed(image_folder, tmp_path, mode):
    flags = {"stage": 1, "weights": str(tmp_path / "x.safetensors")} if mode == "export" else {}
    values = tiny_config(image_folder).to_config_dict()
    values.evaluation.features = "classifier"
    (tmp_path / "runs/digits").mkdir(parents=True)
    for wrong in ("runs/digts", "run/digits"):
        says = (
            rf"{wrong}' does not exist, and --mode={mode}.*Use --workdir='{tmp_path}/runs/digits'\."
        )
        with pytest.raises(InputError, match=says):
            run(values, str(tmp_path / wrong), mode=mode, **flags)
    with pytest.raises(InputError, match="elsewhere' does not exist.*--mode=train"):
        run(values, str(tmp_path / "elsewhere"), mode=mode, **flags)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["digits", "runs"]


def test_new_workdir_that_is_spelt_almost_as_another_is_told(tmp_path, caplog):
    (tmp_path / "digits").mkdir()
    with pytest.raises(InputError, match="nowhere"):
        run(
            tiny_config("/nowhere").to_config_dict(), str(tmp_path / "digts"), mode="train", stage=2
        )
    assert f"--workdir='{tmp_path}/digts' is a new run; '{tmp_path}/digits' exists" in caplog.text


def test_run_without_checkpoints_says_what_is_missing(image_folder, tmp_path):
    with pytest.raises(InputError, match=r"no checkpoint in .*stage1/checkpoints.*--mode=train"):
        run(tiny_config(image_folder).to_config_dict(), str(tmp_path), mode="sample")
