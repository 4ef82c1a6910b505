"""Configs of earlier versions: completed, renamed, or refused; and which fields may change within a
run."""

import copy
import dataclasses
import json

import pytest

from rdm_jax.config import Config, Data, Stage, Training, changes, parse, saved, to_dict
from rdm_jax.diffusion.guidance import Autoguidance, ClassifierFree
from rdm_jax.diffusion.processes import RelayProcess
from rdm_jax.runtime.errors import InputError


def without(values: dict, *path: str) -> dict:
    """A deep copy without one field."""
    values = json.loads(json.dumps(values))
    *sections, field = path
    part = values
    for section in sections:
        part = part[section]
    del part[field]
    return values


def read(tmp_path, values: dict) -> Config:
    (tmp_path / "config.json").write_text(json.dumps(values))
    return parse(saved.read_saved(tmp_path / "config.json"))


def fields(values: dict, *path: str):
    for name, value in values.items():
        if isinstance(value, dict):
            yield from fields(value, *path, name)
        elif name != "kind":
            yield (*path, name)


def test_saved_config_without_a_field(tmp_path):
    """A missing field has the value that it had before it was added: its default, or that in the
    table."""
    default = to_dict(Config())
    values = json.loads(json.dumps(default))
    for path in fields(values):
        found, field = to_dict(read(tmp_path, without(values, *path))), path[-1]
        meant = {"checkpoint_minutes": 0.0, "max_left_out": 1.0}.get(field)
        expected = copy.deepcopy(default)
        part = expected
        for name in path[:-1]:
            part = part[name]
        part[field] = part[field] if meant is None else meant
        if field not in (
            "resolution",
            "process",
            "sampler",
        ):  # the second stage's values are not the defaults
            assert found == expected, path
            now = json.loads(json.dumps(expected))
            assert not changes.incompatible_changes(json.loads(json.dumps(found)), now), path
            assert saved.completed(Stage, without(values, *path)["stage1"]) == now["stage1"], path
    assert len(list(fields(values))) > 100


def test_saved_config_without_a_section(tmp_path):
    assert read(tmp_path, without(to_dict(Config()), "parallel")) == Config()
    assert (
        read(tmp_path, without(to_dict(Config()), "stage1", "training"))
        .stages[0]
        .training.checkpoint_minutes
        == 0
    )
    assert read(tmp_path, without(to_dict(Config()), "stage2", "process", "clock")) == Config()


def test_handwritten_config_has_current_defaults(tmp_path):
    values = json.loads(json.dumps({"stage1": {}, "data": {"source": "digits"}}))
    (tmp_path / "mine.json").write_text(json.dumps(values))
    config = parse(saved.read_saved(tmp_path / "mine.json"))
    assert (
        config == Config(data=Data(source="digits"), stages=(Stage(),))
        and config.stages[0].training.checkpoint_minutes == 30
    )
    old = read(tmp_path, values)  # the same as a run of the first version has it
    assert old.stages[0].training.checkpoint_minutes == 0 and old.data.max_left_out == 1


def test_renamed_fields_and_kinds(tmp_path, monkeypatch):
    monkeypatch.setitem(saved.RENAMED_FIELDS, ("Training", "mini_batch"), "batch_size")
    monkeypatch.setitem(saved.RENAMED_KINDS, "blurring", "relay")
    values = json.loads(json.dumps(to_dict(Config())))
    values["stage1"]["training"]["mini_batch"] = values["stage1"]["training"].pop("batch_size") * 2
    values["stage2"]["process"]["kind"] = "blurring"
    config = read(tmp_path, values)
    assert config.stages[0].training.batch_size == 512 and isinstance(
        config.stages[1].process, RelayProcess
    )


@pytest.mark.parametrize(
    ("was", "now"),
    [
        ({"guidance": 1.0, "guidance_interval": []}, ()),
        ({"guidance": 1.0, "guidance_interval": [0.3, 5.0]}, ()),
        ({"guidance": 2, "guidance_interval": []}, (ClassifierFree(2.0),)),
        ({"guidance": 2.5, "guidance_interval": [0.3, 5]}, (ClassifierFree(2.5, (0.3, 5.0)),)),
        ({"guidance": 2.5}, (ClassifierFree(2.5),)),
        ({"guidance_interval": [0.3, 5.0]}, ()),
        (
            {"guidance": [{"kind": "autoguidance", "checkpoint": "a/1"}]},
            (Autoguidance(1.0, "a/1"),),
        ),
        ({"guidance": [1, 1.5, {"kind": "classifierfree"}]}, None),
    ],
)
def test_guidance_of_earlier_configs_is_a_list(tmp_path, was, now):
    now = (ClassifierFree(1.5), ClassifierFree()) if now is None else now
    values = json.loads(json.dumps(to_dict(Config())))
    del values["stage1"]["guidance"]
    config = read(tmp_path, {**values, "stage1": values["stage1"] | was})
    assert config == Config().with_stage(1, guidance=now)
    saved_now = json.loads(json.dumps(to_dict(config)["stage1"]["guidance"]))
    if not isinstance(was.get("guidance"), list):
        assert saved.completed_settings(was).get("guidance", []) == saved_now
    with pytest.raises(InputError, match="guidance_interval=.* is not a field"):
        read(tmp_path, {"stage1": {"guidance": [], "guidance_interval": [0.3, 5.0]}})


def test_version_newer_or_invalid_is_refused(tmp_path):
    saved.save_config(Config(), tmp_path / "config.json")
    assert json.loads((tmp_path / "config.json").read_text())["version"] == saved.VERSION
    assert parse(saved.read_saved(tmp_path / "config.json")) == Config()
    for version in (saved.VERSION + 1, 0, "2", None):
        with pytest.raises(
            InputError, match=f"config.json is of version {version!r}.*Use a newer rdm_jax"
        ):
            read(tmp_path, {"version": version, **to_dict(Config())})
        with pytest.raises(InputError, match="checkpoint 7 is of version"):
            saved.about_now({"version": version, "stage": {}}, "checkpoint 7")
    with pytest.raises(InputError, match="config.nonsense=1 is not a field"):
        read(tmp_path, {**to_dict(Config()), "nonsense": 1})


def test_about_of_checkpoint_is_completed():
    stage = json.loads(json.dumps(to_dict(Config())["stage1"]))
    found = saved.about_now(
        {"stage": without({"stage1": stage}, "stage1", "network", "emb_mult")["stage1"], "seed": 3},
        "it",
    )
    assert found["stage"] == stage and found["seed"] == 3


def test_changes_free_allowed_and_forbidden():
    config = Config()
    before = to_dict(config)

    def now(**stage):
        return to_dict(
            dataclasses.replace(
                config, stages=(dataclasses.replace(config.stages[0], **stage), config.stages[1])
            )
        )

    training = config.stages[0].training
    assert not changes.incompatible_changes(
        before, now(guidance=3.0, training=dataclasses.replace(training, images=5, accumulate=2))
    )
    found = changes.incompatible_changes(
        before, now(training=dataclasses.replace(training, beta1=0.5))
    )
    changes.check_allowed(found, ["beta1"], "it")
    changes.check_allowed(found, ["training"], "it")
    changes.check_allowed(found, ["stage1.training.beta1"], "it")
    with pytest.raises(
        InputError, match="config.stage1.training.beta1 was 0.9 and is 0.5.*--allow_changes=beta1"
    ):
        changes.check_allowed(found, ["stage2.training.beta1"], "it")
    found = changes.incompatible_changes(before, now(resolution=(32, 32)))
    with pytest.raises(InputError, match="Use another workdir\\."):
        changes.check_allowed(found, ["resolution"], "it")


def test_changes_free_only_training_images():
    """training.images may change freely, other fields named `images` may not."""
    assert changes.incompatible_changes({"data": {"images": 1}}, {"data": {"images": 2}})
    assert not changes.incompatible_changes(
        {"stage1": {"training": {"images": 1}}}, {"stage1": {"training": {"images": 2}}}
    )


def test_changes_check_names():
    changes.check_names(["learning_rate", "stage2.training.batch_size", "data", "dtype"], Config())
    for name, says in (
        ("learningrate", "--allow_changes=learningrate is not a field.*learning_rate"),
        ("stage3.training.batch_size", "is not a field"),
        ("channel_mult", "stage1.network.channel_mult cannot change within a run.*start_from"),
        ("seed", "config.seed cannot change"),
    ):
        with pytest.raises(InputError, match=says):
            changes.check_names([name], Config())


def test_meant_defaults_name_fields():
    """An entry of the table that names no field would have no effect."""
    for cls, field in saved.MEANT:
        known = {each.__name__: each for each in (Data, Training)}
        assert field in {each.name for each in dataclasses.fields(known[cls])}
