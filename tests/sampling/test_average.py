"""Which average of the parameters a stage samples with: loaded, named, exported, or refused."""

import copy
import dataclasses
import json

import jax
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

from rdm_jax.checkpoints import averages, profiles, store
from rdm_jax.config import Config, parse, to_dict
from rdm_jax.config.load import load_config
from rdm_jax.loading import load
from rdm_jax.modes import run
from rdm_jax.runtime.errors import InputError
from rdm_jax.sampling import earlier
from rdm_jax.sampling.made_with import describe, differences, same_settings
from rdm_jax.sampling.pipeline import RelayPipeline
from rdm_jax.training.step import init_state
from rdm_jax.workdir import Workdir
from tests.support.configs import tiny_config, write_images
from tests.support.sampled import contents

KEPT, STEPS, BATCH, EVERY = (0.05, 0.1), 64, 8, 4
PATH = 1 + np.sin(np.arange(STEPS + 1) / 20)  # per step, from 0 on


def average(step: int, width: float) -> float:
    ends = (np.arange(step + 1) / step) ** (profiles.exponent(width) + 1)
    return float(np.diff(ends) @ PATH[1 : step + 1])


def save_stage(config: Config, number: int, workdir) -> None:
    """Checkpoints and snapshots as of a training in which all parameters follow `PATH`."""
    stage, folder = config.stage(number), workdir / f"stage{number}/checkpoints"
    abstract = stage.build(3, 2).abstract

    def params(value: float):
        return jax.tree.map(lambda leaf: np.full(leaf.shape, value, np.float32), abstract)

    first = init_state(params(0.0), optax.adam(1e-3), KEPT)
    checkpoints = store.Checkpoints(folder, keep_newest=9)
    snapshots = store.Checkpoints(averages.snapshots_of(folder))
    about = {"stage": to_dict(config)[stage.name], "classes": ["a", "b"], "seed": 0, "version": 2}
    for step in range(EVERY, STEPS + 1, EVERY):
        about["images_seen"] = BATCH * step
        of_widths = {
            name: params(average(step, width))
            for name, width in profiles.average_names(KEPT).items()
        }
        snapshots.save_averages(step, of_widths, about)
        if step in (8, STEPS):
            state = first.replace(
                step=np.int32(step), params=params(PATH[step]), ema=params(7.0), averages=of_widths
            )
            checkpoints.save(state, about)
    checkpoints.close()
    snapshots.close()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run in which stage 1 has averages, and stage 2 has EMA parameters alone."""
    folder = tmp_path_factory.mktemp("run")
    write_images(folder / "images")
    config = tiny_config(folder / "images", averages=KEPT, snapshot_every=BATCH * EVERY)
    config = config.with_stage(1, network={"head_channels": 64})  # as published, to export it
    save_stage(config, 1, folder / "run")
    second = config.stage(2)
    about = {"stage": to_dict(config)["stage2"], "classes": ["a", "b"], "seed": 0}
    checkpoints = store.Checkpoints(folder / "run/stage2/checkpoints")
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), second.build(3, 2).abstract)
    checkpoints.save_ema(0, zeros, about)
    checkpoints.close()
    Workdir(folder / "run").write_config(config)
    return folder / "run"


def loaded(workdir, **stage1) -> RelayPipeline:
    return load(workdir, stage1=stage1)


def value_of(relay: RelayPipeline) -> float:
    """The one value that all of stage 1's parameters have."""
    leaves = jax.tree.leaves(relay._stages[0][1])
    values = {float(value) for leaf in leaves for value in np.unique(leaf)}
    assert len(values) == 1 and {leaf.dtype for leaf in leaves} == {np.dtype("float32")}
    return values.pop()


@pytest.mark.second
@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("ema", 7.0),
        ("raw", PATH[STEPS]),
        ("0.05", average(STEPS, 0.05)),
        (0.1, average(STEPS, 0.1)),
        ("0.15", average(STEPS, 0.15)),
        (0.04, average(STEPS, 0.04)),
    ],
    ids=str,
)
def test_load_reads_the_average(trained, given, wanted):
    relay = loaded(trained, average=given)
    assert value_of(relay) == pytest.approx(wanted, rel=1e-4)
    others = {7.0, PATH[STEPS], *(average(STEPS, width) for width in KEPT)} - {wanted}
    assert min(abs(wanted - other) for other in others) > 1e-3
    reconstructed = str(given) in ("0.15", "0.04")
    assert ("snapshots" in relay.checkpoints[0]) == reconstructed
    if reconstructed:
        assert relay.checkpoints[0]["snapshots"][-1] == STEPS


@pytest.mark.second
def test_load_reads_the_average_of_an_earlier_step(trained):
    """Snapshots after the checkpoint do not matter."""
    relay = loaded(trained, average="0.07", checkpoint="8")
    assert value_of(relay) == pytest.approx(average(8, 0.07), rel=5e-3)
    assert relay.checkpoints[0]["snapshots"] == [4, 8]


@pytest.mark.second
def test_samples_name_the_average(trained):
    """Equal averages have equal records; those of earlier versions are of the EMA."""
    records = {
        name: describe(relay.config, relay)
        for name, relay in {
            "ema": loaded(trained),
            "raw": loaded(trained, average="raw"),
            "0.1": loaded(trained, average=0.1),
            "0.10": loaded(trained, average="0.10"),
        }.items()
    }
    assert same_settings(records["0.1"], records["0.10"])
    assert differences(records["ema"], records["0.1"]) == [
        "stages.stage1.average was 'ema' and is 0.1"
    ]
    assert not same_settings(records["raw"], records["0.1"])
    old = copy.deepcopy(records["ema"])
    for stage in old["stages"].values():
        del stage["average"]
    assert same_settings(old, records["ema"]) and not same_settings(old, records["raw"])


@pytest.mark.second
def test_samples_of_another_average_are_refused(trained, tmp_path):
    relay = loaded(trained)
    folder = tmp_path / "samples"
    (folder / "images").mkdir(parents=True)
    (folder / "images/0000000000.png").touch()
    record = json.dumps(describe(relay.config, relay))
    (folder / "samples.json").write_text(record)
    other = load_config(str(trained), stage1={"average": 0.1})
    with pytest.raises(InputError, match=r"stage1.average was 'ema' and is 0.1.*sampling.name"):
        earlier.check_settings(other, 1, tmp_path)
    with pytest.raises(InputError, match="average was 'ema'"):
        earlier.find(loaded(trained, average=0.1), folder)
    assert (folder / "samples.json").read_text() == record


REFUSED = [
    (
        1,
        {"average": "0.01"},
        r"average='0.01' cannot be reconstructed.* Use a width of 0.03 to 0.23",
    ),
    (1, {"average": "0.2", "checkpoint": "8"}, r"at 2 times miss 45% .* 0.045 to 0.11, or 'ema'"),
    (1, {"average": "0.5"}, r"average='0.5' cannot be used. Use 'ema', 'raw' or a width from"),
    (1, {"average": "mean"}, r"average='mean' cannot be used. Use 'ema', 'raw' or a width from"),
    (2, {"average": "raw"}, r"stage2.average='raw' .*/0 has EMA parameters alone. Use 'ema'\."),
    (2, {"average": 0.1}, r"stage2.average='0.1' .*/0 has EMA parameters alone. Use 'ema'\."),
]


@pytest.mark.second
@pytest.mark.parametrize(("number", "changes", "says"), REFUSED, ids=str)
def test_modes_refuse_an_average_that_there_is_not(trained, number, changes, says, monkeypatch):
    """Before anything is read from the data or compiled."""
    monkeypatch.setattr("rdm_jax.modes.RelayPipeline", None)
    monkeypatch.setattr("rdm_jax.modes.Evaluator", None)
    config = load_config(str(trained), **{f"stage{number}": changes})
    evaluation = dataclasses.replace(config.evaluation, features="classifier", images="samples")
    before = contents(trained)
    for mode in ("sample", "evaluate"):
        with pytest.raises(InputError, match=says):
            run(dataclasses.replace(config, evaluation=evaluation), trained, mode=mode)
    with pytest.raises(InputError, match=says):
        run(config, trained, mode="export", stage=number, weights=str(trained / "new.safetensors"))
    assert contents(trained).keys() - before.keys() <= {".lock"}


@pytest.mark.second
def test_workdir_refuses_averages_that_were_not_kept(tmp_path):
    """As of a training before there were any."""
    config = tiny_config("images")
    save_stage(config, 1, tmp_path)
    with pytest.raises(InputError, match="/64 was trained without averages.*or train with"):
        Workdir(tmp_path).check_averages([config.with_stage(1, average=0.1).stage(1)])
    Workdir(tmp_path).check_averages([config.with_stage(1, average="raw").stage(1)])


@pytest.mark.second
@pytest.mark.parametrize(
    ("training", "width", "says"),
    [
        ({}, 0.1, r"'0.1' cannot be used: training.averages is empty\. .*averages=\(0.1,\)"),
        ({"averages": KEPT}, 0.2, "cannot be reconstructed after this training: .* at 1 times"),
        ({"averages": KEPT, "snapshot_every": 10}, 0.2, ""),
        ({"averages": KEPT, "snapshot_every": 10}, 0.28, "at 16 times miss"),
        ({"averages": KEPT}, 0.1, ""),
    ],
)
def test_all_refuses_an_average_before_training(tmp_path, training, width, says, monkeypatch):
    config = tiny_config(tmp_path, **training).with_stage(2, average=width)
    monkeypatch.setattr("rdm_jax.modes._all", lambda job: None)
    if not says:
        return run(parse(config.to_config_dict()), tmp_path / "run")
    with pytest.raises(InputError, match=f"config.stage2.average=.*{says}"):
        run(parse(config.to_config_dict()), tmp_path / "run")
    assert not (tmp_path / "run/stage1").exists()


@pytest.mark.second
@pytest.mark.parametrize(("given", "wanted"), [("raw", PATH[STEPS]), (0.05, average(STEPS, 0.05))])
def test_export_writes_the_average(trained, tmp_path, given, wanted):
    config = load_config(str(trained), stage1={"average": given})
    run(config, trained, mode="export", stage=1, weights=str(tmp_path / "exported.safetensors"))
    tensors = load_file(tmp_path / "exported.safetensors")
    count = len(jax.tree.leaves(config.stage(1).build(3, 2).abstract))
    found = [tensor for tensor in tensors.values() if np.allclose(tensor, wanted, rtol=1e-6)]
    assert len(found) == count
