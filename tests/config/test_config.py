"""The config: round trips, overrides, and validation before any work."""

import dataclasses
import json
import pickle
from pathlib import Path

import jax.numpy as jnp
import pytest

from rdm_jax.config import Config, Parallel, Stage, parse, to_dict, validate
from rdm_jax.config.load import load as from_file
from rdm_jax.config.load import load_config, packaged
from rdm_jax.diffusion import schedules
from rdm_jax.diffusion.jump import JumpHeun
from rdm_jax.diffusion.preconditioning import (
    EDMPreconditioning,
    IDDPMPreconditioning,
    XPreconditioning,
)
from rdm_jax.diffusion.processes import CascadeProcess, GaussianProcess, RelayProcess
from rdm_jax.diffusion.samplers import CascadeHeun, Heun, RelayHeun
from rdm_jax.models.adm import ADM
from rdm_jax.runtime.errors import InputError
from rdm_jax.sampling.stage_functions import stage_levels

CONFIGS = list(packaged().values())


def load(path: Path, *args):
    return from_file(":".join([str(path), *args]))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_packaged_config_is_valid_and_documented(path, tmp_path):
    saved = tmp_path / "config.json"
    saved.write_text(json.dumps(to_dict(Config(seed=7))))
    config = parse(load(path, *([str(saved)] if path.stem == "saved" else [])))
    assert path.stem != "saved" or config == Config(seed=7)
    validate.check_config(config)
    assert parse(json.loads(json.dumps(to_dict(config)))) == config
    assert f"python -m rdm_jax.main --config configs/{path.name}" in path.read_text()


@pytest.mark.parametrize(
    "name", ["emoji", "emoji_latent", "emoji_small", "emoji_text", "openclipart"]
)
def test_tiny_config_is_valid(name):
    full, tiny = (parse(load(CONFIGS[0].parent / f"{name}.py", *args)) for args in ((), ("tiny",)))
    validate.check_config(tiny)
    assert [s.resolution for s in full.stages] == [s.resolution for s in tiny.stages]


def test_published_config_settings():
    """The published settings: levels after truncation, first level and NFE of sampling, and batch
    sizes, learning rates, half-lives and dropout of training."""
    imagenet, celebahq = (
        parse(load(CONFIGS[0].parent / f"{name}.py")) for name in ("imagenet", "celebahq")
    )
    walked = [
        (stage.nfe, float(stage_levels(stage).sigma[0]))
        for stage in (*imagenet.stages, *celebahq.stages)
    ]
    assert [count for count, _ in walked] == [511, 199, 239, 107]
    assert [sigma for _, sigma in walked] == pytest.approx([80, 0.8691, 80, 0.9219], abs=5e-5)
    ends = [
        float(stage.process.clock.sigma(jnp.ones(())))
        for stage in (imagenet.stages[1], celebahq.stages[1])
    ]
    assert ends == pytest.approx([1.770, 1.312], abs=5e-4)
    left = [
        float(stage.process.blur_weights(jnp.ones(1))[0, 0, 1])
        for stage in (imagenet.stages[1], celebahq.stages[1])
    ]
    assert left == pytest.approx([0.06, 0.29], abs=5e-3)
    for config, batch, half_lives in (
        (imagenet, 4096, (50e6, 0.5e6)),
        (celebahq, 1024, (0.5e6, 0.5e6)),
    ):
        assert [stage.training.batch_size for stage in config.stages] == [batch] * 2
        assert [stage.training.learning_rate for stage in config.stages] == [1e-4] * 2
        assert tuple(stage.training.ema_halflife for stage in config.stages) == half_lives
    assert [stage.network.dropout for stage in (*imagenet.stages, *celebahq.stages)] == [
        0.1,
        0.1,
        0.15,
        0.2,
    ]


def changed(**changes):
    """The default config with fields set by dotted path, '__' for a dot."""
    values = Config().to_config_dict()
    with values.ignore_type():
        values.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return values


def three_stages() -> Config:
    relay = {
        "process": RelayProcess(patch=2),
        "sampler": RelayHeun(),
        "network": ADM(channel_mult=(1, 2), attention_levels=(1,)),
    }
    sizes = ((24, 16), (48, 32), (96, 64))
    first = Stage(sizes[0], network=relay["network"])
    return Config(stages=(first, Stage(sizes[1], **relay), Stage(sizes[2], **relay)))


def test_stage_numbers():
    config = three_stages()
    assert [(s.number, s.name) for s in config.stages] == [
        (1, "stage1"),
        (2, "stage2"),
        (3, "stage3"),
    ]
    assert config.stage(2) is config.stages[1] and config.stages[1] == config.stages[1]._numbered(3)
    assert [s.number for s in dataclasses.replace(config, stages=config.stages[1:]).stages] == [
        1,
        2,
    ]
    assert "number" not in to_dict(config)["stage1"]
    again = pickle.loads(pickle.dumps(config))
    assert again == config and again.stage(3).number == 3
    for number in (0, 4):
        with pytest.raises(IndexError, match=f"stage {number} of 3"):
            config.stage(number)
    with pytest.raises(ValueError, match="only as one of Config.stages"):
        Stage().name  # noqa: B018


def test_with_stage_replaces_fields_and_parts():
    config = three_stages()
    sampler = RelayHeun(steps=5)
    changed = config.with_stage(2, training={"images": 9, "flip": True}, guidance=3.0)
    changed = changed.with_stage(2, sampler=sampler)
    assert changed.stages[::2] == config.stages[::2] and changed.stage(2).name == "stage2"
    expected = dataclasses.replace(
        config.stages[1],
        training=dataclasses.replace(config.stages[1].training, images=9, flip=True),
        guidance=3.0,
        sampler=sampler,
    )
    assert changed.stage(2) == expected and config == three_stages()


def test_three_stages_are_valid():
    config = parse(three_stages().to_config_dict())
    validate.check_config(config)
    assert config == three_stages() and len(config.stages) == 3


@pytest.mark.parametrize(
    "field, value, says",
    [
        ("stage1__resolution", (60, 60), "stage1.resolution=.60, 60.*divisible by 8"),
        ("stage2__resolution", (128, 128), "stage2.resolution=.128, 128.*256, 256"),
        ("stage2__process__patch", 1, "stage2.process.patch=1"),
        (
            "stage2__process__kind",
            "heat",
            "stage2.process.kind='heat'.*'gaussian' or 'vp' or 've' or 'relay'",
        ),
        ("stage2__process__clock__length", 1.0, "clock.length=1.0"),
        (
            "stage2__sampler__corrector",
            "both",
            "stage2.sampler.corrector='both'.*'slopes' or 'images'",
        ),
        ("stage2__sampler__eta", 1.5, "stage2.sampler.eta=1.5"),
        ("stage2__sampler__steps", 3, "stage2.sampler.steps=3.*more"),
        ("stage1__sampler__sigma_min", 100.0, "stage1.sampler.sigma_min=100.0"),
        ("stage1__network__dtype", "float16", "stage1.network.dtype='float16'.*bfloat16"),
        ("stage1__network__channels", "many", "stage1.network.channels='many'.*whole number"),
        ("stage1__network__attention_levels", (4,), "attention_levels=.4,.*0 to 3"),
        ("stage1__network__head_channels", 100, "head_channels=100.*divisor of 576"),
        ("stage1__training__accumulate", 3, "stage1.training.batch_size=256.*accumulate=3"),
        ("stage1__training__images", 0, "stage1.training.images=0"),
        ("stage1__training__beta1", 1.0, "stage1.training.beta1=1.0"),
        ("data__channels", 4, "data.channels=4.*1 .*or 3"),
        ("sampling__seeds", "5-1", "sampling.seeds='5-1'"),
        *(
            ("sampling__name", name, "sampling.name='")
            for name in ("../x", "", ".x", "a/b", "a\\b", "a b", "-x", "stage1")
        ),
        *(
            ("sampling__name", name, "sampling.name='")
            for name in ("report", "Report", "checkpoints", "config.json")
        ),
        ("sampling__low", "gs://b/x", "sampling.low='gs://b/x' is a URL"),
        ("sampling__low", "folder:gs://b/x", "sampling.low='gs://b/x' is a URL"),
        ("sampling__low", "emoji:x", "sampling.low='emoji:x'.*'tar:PATH'"),
        ("sampling__labels", "", "sampling.labels=''"),
        ("sampling__labels", "a,,b", "sampling.labels='a,,b'"),
        ("seed", -1, "seed=-1"),
        ("stage4", {}, "stage1, stage2, stage4"),
    ],
)
def test_check_config_refuses(field, value, says):
    with pytest.raises(InputError, match=says) as refusal:
        validate.check_config(parse(changed(**{field: value})))
    assert str(refusal.value).endswith(".") and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "field, value",
    [
        ("sampling__name", "my-run_2.5"),
        ("sampling__seeds", "0 - 3, 7"),
        ("sampling__labels", "polar bear, 0-3"),
        ("sampling__low", "tar:x.tar"),
        ("evaluation__name", "my-run"),
        ("evaluation__images", '["folder:/a, b", "tar:x.tar", "samples"]'),
    ],
)
def test_check_config_accepts(field, value):
    validate.check_config(parse(changed(evaluation__features="inception", **{field: value})))


def test_evaluation_is_checked_only_when_used():
    one_image = parse(changed(evaluation__features="classifier", sampling__seeds="7"))
    validate.check_config(one_image, evaluates=False)
    with pytest.raises(InputError, match="sampling.seeds='7' cannot be used. Use 4 or more seeds"):
        validate.check_config(one_image)
    validate.check_config(
        parse(
            changed(evaluation__features="classifier", sampling__seeds="7", evaluation__seeds="0-9")
        )
    )
    nothing_made = changed(
        evaluation__features="classifier", sampling__seeds="7", evaluation__images="zip:x.zip"
    )
    validate.check_config(parse(nothing_made))
    odd = parse(changed(evaluation__features="classifier", evaluation__batch_size=3))
    with pytest.raises(InputError, match="evaluation.batch_size=3"):
        validate.check_devices(odd, 4, 4)
    validate.check_devices(odd, 4, 4, evaluates=False)


@pytest.mark.parametrize(
    "fields, says",
    [
        ({"sampler": RelayHeun()}, "stage2.sampler.kind='relayheun'.*'cascadeheun'"),
        (
            {"sampler": CascadeHeun(augment=0.6)},
            "stage2.sampler.augment=0.6.*0 to 0.5 .process.augment_max",
        ),
        ({"process": CascadeProcess(patch=4, augment_max=-1.0)}, "stage2.process.augment_max=-1.0"),
        (
            {"process": GaussianProcess(), "sampler": Heun()},
            "stage2.process.kind='gaussian'.*'relay' or 'cascade'",
        ),
    ],
)
def test_check_config_refuses_cascade(fields, says):
    first, second = Config().stages
    usual = {"process": CascadeProcess(patch=4), "sampler": CascadeHeun()}
    validate.check_config(Config(stages=(first, dataclasses.replace(second, **usual))))
    with pytest.raises(InputError, match=says):
        validate.check_config(
            Config(stages=(first, dataclasses.replace(second, **{**usual, **fields})))
        )


def jumping(**changes) -> Config:
    """Two stages, the first of which stops where the second joins."""
    clock = schedules.Clock(blur_sigma_max=4.5)
    relay = RelayProcess(clock=clock, block_scale=0.0)
    parts = {
        "first": Heun(stop=0.4),
        "second": JumpHeun(sigma_max=1.6),
        "precondition": EDMPreconditioning(),
        "process": relay,
    } | changes
    config = Config().with_stage(1, sampler=parts["first"], precondition=parts["precondition"])
    return config.with_stage(2, process=parts["process"], sampler=parts["second"])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"first": Heun(stop=0.5)}, "stage1.sampler.stop=0.5 .*Use 0, or 0.4, where stage2 joins"),
        (
            {"second": RelayHeun()},
            "stage1.sampler.stop=0.4 .* a sampler of stage2 that joins, such as 'jumpheun'",
        ),
        ({"second": JumpHeun(sigma_max=1.6, stop=0.1)}, "stage2.sampler.stop=0.1 .*blurred"),
        (
            {"precondition": IDDPMPreconditioning(), "first": Heun(sigma_max=50.0, stop=0.4)},
            "stage1.sampler.stop=0.4 .*nearest level that the network knows",
        ),
        ({"process": RelayProcess()}, "stage2.process.block_scale=0.15 .*the noise .*is white"),
        ({"first": Heun(stop=90.0)}, "stage1.sampler.stop=90.0 is not below sigma_max=80.0"),
    ],
)
def test_check_config_refuses_jumps(changes, says):
    validate.check_config(jumping())
    validate.check_config(jumping(first=Heun()))  # finished images can be continued too
    with pytest.raises(InputError, match=says):
        validate.check_config(jumping(**changes))


def test_last_stage_may_not_stop():
    with pytest.raises(InputError, match="stage1.sampler.stop=0.4 .*no stage follows"):
        validate.check_config(Config(stages=(Stage(sampler=Heun(stop=0.4)),)))


@pytest.mark.parametrize(
    ("resolution", "channels", "says"), [((64, 60), 3, "whole blocks"), ((64, 64), 2, "2 channels")]
)
def test_dct_error_needs_blocks_of_grey_or_rgb(resolution, channels, says):
    def config(resolution, channels):
        training = dataclasses.replace(Stage().training, dct_quality=85)
        stage = Stage(resolution, ADM(32, (1, 2), attention_levels=()), training=training)
        return Config(stages=(stage,), data=dataclasses.replace(Config().data, channels=channels))

    validate.check_config(config((64, 64), 3))
    with pytest.raises(InputError, match=f"stage1.training.dct_quality=85 .*Use 0 .*{says}"):
        validate.check_config(config(resolution, channels))


def test_parse_names_unknown_and_missing_fields():
    values = Config().to_config_dict().to_dict()
    values["stage1"]["network"]["chanels"] = 3
    with pytest.raises(InputError, match="config.stage1.network.chanels=3.*channels"):
        parse(values)
    del values["stage1"]["network"]["chanels"], values["stage1"]["network"]["blocks"]
    with pytest.raises(InputError, match="config.stage1.network has no field 'blocks'"):
        parse(values)


def test_check_devices_refuses_indivisible_batches():
    stage = dataclasses.replace(
        Stage(), training=dataclasses.replace(Stage().training, batch_size=12, accumulate=2)
    )
    with pytest.raises(
        InputError, match="stage1.training.batch_size=12.*multiple of 8 .4 devices, accumulate=2"
    ):
        validate.check_devices(Config(stages=(stage,)), 4, 4)
    validate.check_devices(Config(stages=(stage,)), 2, 2)
    with pytest.raises(
        InputError, match="config.sampling.batch_size=16.*multiple of 3 .the devices of a process"
    ):
        validate.check_devices(Config(stages=(stage,)), 6, 3)


def test_check_devices_refuses_wrong_meshes():
    for parallel, named in (
        (Parallel(data=3), "config.parallel.data, fsdp=.3, 1.*product is 8"),
        (Parallel(data=-1, fsdp=3), "config.parallel.data, fsdp=.-1, 3"),
        (Parallel(data=-1, fsdp=-1), "config.parallel.data, fsdp=.-1, -1"),
        (Parallel(data=0), "config.parallel.data, fsdp=.0, 1"),
        (Parallel(mode="pmap", fsdp=2), "config.parallel.fsdp=2.*.pmap. shards batches only"),
        (Parallel(mode="shard"), "config.parallel.mode='shard'.*'pjit' or 'pmap'"),
    ):
        with pytest.raises(InputError, match=named):
            validate.check_devices(Config(parallel=parallel), 8, 8)
    validate.check_devices(Config(parallel=Parallel(data=2, fsdp=-1)), 8, 8)


def test_guidance_needs_labels():
    config = Config(stages=(dataclasses.replace(Stage(), guidance=2.0, sampler=Heun()),))
    validate.check_classes(config, ("a", "b"))
    with pytest.raises(InputError, match="stage1.guidance=2.0"):
        validate.check_classes(config, ())


def test_process_without_a_sampler_is_refused_with_a_remedy():
    class Doubling(GaussianProcess):
        enlarges = 2

    stages = (Stage(resolution=(32, 32)), Stage(resolution=(64, 64), process=Doubling()))
    with pytest.raises(InputError, match="stage2.sampler.kind='heun' cannot be used") as refusal:
        validate.check_config(Config(stages=stages))
    assert refusal.value.fix == "Use a sampler for this process (config.extend)."


@pytest.mark.parametrize("interval", [(5.0, 0.3), (1.0, 1.0), (-1.0, 2.0), (1.0,)])
def test_guidance_interval_is_refused(interval):
    entry = {"kind": "classifierfree", "weight": 2, "interval": interval}
    config = load_config("digits", stage1={"guidance": [1.5, entry]})
    with pytest.raises(
        InputError, match=r"config\.stage1\.guidance\[1\]\.interval=.* Use two noise"
    ):
        validate.check_config(config)


def test_other_path_of_the_network_is_refused():
    config = load_config("imagenet_jit:B32")
    validate.check_config(config)
    other = config.with_stage(1, precondition=XPreconditioning(schedules.Path(1.0)))
    with pytest.raises(InputError, match=r"noise_scale=1\.0 .* Use 2\.0 \(process\.path"):
        validate.check_config(other)
