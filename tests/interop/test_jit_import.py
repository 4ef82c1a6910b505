"""JiT's published files in, and out again; with stand-ins in the published format."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from safetensors.numpy import load_file, save_file

from rdm_jax.checkpoints.store import Checkpoints
from rdm_jax.config import Config, Stage
from rdm_jax.diffusion import preconditioning, processes, samplers, schedules
from rdm_jax.diffusion.linear_path import LinearHeun, LinearProcess
from rdm_jax.interop import formats, jit_names
from rdm_jax.interop.settings import Described
from rdm_jax.interop.torch_files import open_torch
from rdm_jax.models.song import Song
from rdm_jax.models.transformer import JiT
from rdm_jax.modes import run
from rdm_jax.runtime.errors import InputError
from tests.support.jit_stages import ARGUMENTS, config_with, import_file
from tests.support.published_files import FOUR, write_pth
from tests.support.reference import cases, draw_parameter, load
from tests.support.refusals import refuse
from tests.support.torch_standins import View, dump_legacy, dump_pt


def restored(workdir, config: Config, classes: int):
    checkpoints = Checkpoints(workdir / "stage1/checkpoints", read_only=True)
    network = config.stages[0].build(config.data.channels, classes)
    ema, about = checkpoints.restore_ema(0, network.abstract)
    checkpoints.close()
    return network, ema, about


def arguments_of(original) -> dict:
    """The training command's arguments for a case of the original's network."""
    names = {"img_size": "input_size", "class_num": "num_classes"}
    return ARGUMENTS | {
        **{name: original[theirs] for name, theirs in names.items()},
        "model": "JiT-Tiny",
        "in_context_start": original["in_context_start"],
    }


def tensors_of(meta, case) -> dict[str, np.ndarray]:
    """All that a state_dict of a case has, with the original's own positions."""
    shapes = json.loads(str(case["param_shapes"]))
    named = zip(case["param_names"].tolist(), shapes, strict=True)
    tensors = {f"net.{name}": draw_parameter(name, shape, meta["seed"]) for name, shape in named}
    return {"net.pos_embed": case["pos_embed"][None].astype(np.float32)} | tensors


@cases("jit_network")
def test_imported_network_is_the_original(path, tmp_path):
    meta, case = load(path)
    original = meta["config"]
    write_pth(tmp_path / "x.pth", arguments_of(original), tensors_of(meta, case))
    config = import_file(tmp_path / "x.pth", tmp_path / "run")
    stage, side = config.stages[0], original["input_size"]
    linear = schedules.Path(2.0)
    assert stage == Stage(
        resolution=(side, side),
        network=JiT(
            patch=original["patch_size"],
            hidden=original["hidden_size"],
            depth=original["depth"],
            heads=original["num_heads"],
            bottleneck=original["bottleneck_dim"],
            class_tokens=original["in_context_len"],
            class_tokens_from=original["in_context_start"],
            dropout=0.2,
        ),
        precondition=preconditioning.XPreconditioning(linear),
        process=LinearProcess(linear, -0.6, 0.9, 0.04),
        sampler=LinearHeun(steps=2, t_eps=0.04),
    )
    classes = original["num_classes"]
    network, ema, about = restored(tmp_path / "run", config, classes)
    assert about["classes"] == [str(number) for number in range(classes)]
    assert about["imported"]["class_name"] == "Denoiser"
    assert about["imported"]["settings"]["noise_scale"] == 2.0
    labels = jax.nn.one_hot(case["labels"], classes)  # all zero for the null class
    y = jax.jit(network.apply)(ema, jnp.asarray(case["x"]), jnp.asarray(case["t"]), labels)
    np.testing.assert_allclose(y, case["y"], atol=2e-5 * np.abs(case["y"]).max(), rtol=0)


@pytest.mark.second
def test_imported_stage_is_sampled_without_data(small, tmp_path):
    write_pth(tmp_path / "x.pth", *small)
    config = import_file(tmp_path / "x.pth", tmp_path / "run", config_with(guidance=2.0))
    run(config.to_config_dict(), str(tmp_path / "run"), mode="sample")
    samples = np.load(tmp_path / "run/samples/samples.npz")
    assert samples["images"].shape == (8, 8, 8, 3)
    assert samples["labels"].tolist() == [0, 1, 2, 0, 1, 2, 0, 1]


@pytest.mark.parametrize("dump", [dump_pt, dump_legacy], ids=["zip", "legacy"])
def test_a_key_selects_the_network(small, dump, tmp_path):
    arguments, tensors = small
    name = "net.final_layer.linear.bias"
    keys = ("model", "model_ema1", "model_ema2")
    states = {
        key: {n: View.of(a + i if n == name else a, False) for n, a in tensors.items()}
        for i, key in enumerate(keys)
    }
    write_pth(tmp_path / "x.pth", arguments, tensors, dump=dump, **states)
    for key, index in {None: 1, "model": 0, "model_ema1": 1, "model_ema2": 2}.items():
        with open_torch(tmp_path / "x.pth", key) as original:
            np.testing.assert_array_equal(
                original.tensors[name].read(), tensors[name] + np.float32(index)
            )
    refuse(tmp_path / "x.pth", "no 'ema', only 'model', 'model_ema1', 'model_ema2'", key="ema")
    refuse(tmp_path / "x.pth", "its 'epoch' is an int instead of a state_dict", key="epoch")
    refuse(tmp_path / "x.pth", "tensor 'state' is damaged: it is a dict", key="optimizer")
    if dump is dump_pt:
        config = import_file(tmp_path / "x.pth", tmp_path / "run", weights_key="model_ema2")
        _, ema, _ = restored(tmp_path / "run", config, 3)
        np.testing.assert_array_equal(ema["out"]["bias"], tensors[name] + np.float32(2))


def test_key_needs_an_import_of_several_networks(small, tmp_path):
    save_file({"a": FOUR}, tmp_path / "x.safetensors")
    for mode, message in (
        ("import", "--weights_key=model does not go with .*x.safetensors"),
        ("export", "--weights_key=model does not go with --mode=export"),
    ):
        with pytest.raises(InputError, match=message):
            run(
                config_with().to_config_dict(),
                str(tmp_path / "run"),
                mode=mode,
                stage=1,
                weights=str(tmp_path / "x.safetensors"),
                weights_key="model",
            )


def test_other_kinds_of_process_stay(small, tmp_path):
    write_pth(tmp_path / "x.pth", *small)
    config = config_with(process=processes.GaussianProcess(), sampler=Stage().sampler)
    saved = import_file(tmp_path / "x.pth", tmp_path / "run", config).stages[0]
    assert (saved.process, saved.sampler) == (config.stages[0].process, config.stages[0].sampler)
    assert saved.precondition == preconditioning.XPreconditioning(schedules.Path(2.0))


@pytest.mark.second
def test_import_of_two_stages(small, tmp_path):
    """What the weights of stage 1 have determined stays; stage 2 stays a relay."""
    arguments, tensors = small
    write_pth(tmp_path / "one.pth", *small)
    del (larger := dict(tensors))["net.pos_embed"]
    write_pth(tmp_path / "two.pth", arguments | {"img_size": 16, "noise_scale": 1.5}, larger)
    relay = Stage(process=processes.RelayProcess(patch=2), sampler=samplers.RelayHeun())
    config = dataclasses.replace(config_with(), stages=(config_with().stages[0], relay))
    import_file(tmp_path / "one.pth", tmp_path / "run", config)
    saved = import_file(tmp_path / "two.pth", tmp_path / "run", config, stage=2)
    first, second = saved.stages
    assert first.process == LinearProcess(schedules.Path(2.0), -0.6, 0.9, 0.04)
    assert (second.resolution, second.process, second.sampler) == (
        (16, 16),
        relay.process,
        relay.sampler,
    )
    assert second.precondition == preconditioning.XPreconditioning(schedules.Path(1.5))


def test_changes_are_logged_by_field(small, tmp_path, caplog):
    caplog.set_level("INFO", logger="rdm_jax")
    write_pth(tmp_path / "x.pth", *small)
    import_file(tmp_path / "x.pth", tmp_path / "run", config_with(network=JiT(), guidance=2.0))
    logged = caplog.text
    for line in (
        "config.stage1.resolution: (64, 64) -> (8, 8), as in the weights",
        "config.stage1.network.hidden: 768 -> 16, as in the weights",
        "config.stage1.process.path.noise_scale: 1.0 -> 2.0, as in the weights",
        "config.stage1.process.p_mean: -0.8 -> -0.6, as in the weights",
        "config.stage1.sampler.t_eps: 0.05 -> 0.04, as in the weights",
    ):
        assert line in logged, logged
    assert "guidance" not in logged


@pytest.mark.parametrize("name", ["JiT-B/32", "JiT-H/16"])
def test_published_models(name):
    """Sizes of the shapes, and the ones that shapes do not show, by the model's name."""
    network = jit_names.PUBLISHED[name]
    side = 16 * network.patch
    path = schedules.Path(side / 256)
    stage = Stage(
        (side, side), network, preconditioning.XPreconditioning(path), LinearProcess(path)
    )
    published, shapes = formats.format_of(stage), {}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(stage.build(3, 1000).abstract)[0]:
        theirs = published.original_name(tuple(key.key for key in keys))
        shape = np.broadcast_to(np.int8(0), leaf.shape)
        shapes[theirs] = published.to_theirs(theirs, shape).shape
    total = sum(int(np.prod(shape)) for shape in shapes.values())
    assert total == {"JiT-B/32": 133_190_400, "JiT-H/16": 952_514_368}[name]
    settings = {"model": name, "img_size": side, "noise_scale": side / 256}
    found = formats.describe("Denoiser", settings, shapes, Stage(process=LinearProcess()))
    assert found == Described(stage, 3, 1000)
    assert published.settings_of(3, 1000)[1]["model"] == name
    wrong = settings | {"model": "JiT-L/16"}
    with pytest.raises(InputError, match=r"have patch=32, and|have hidden=1280, and .* has 1024"):
        formats.describe("Denoiser", wrong, shapes, stage)


# Export.


@pytest.mark.second
def test_export_round_trip(small, tmp_path):
    arguments, tensors = small
    write_pth(tmp_path / "x.pth", arguments, tensors)
    first = import_file(tmp_path / "x.pth", tmp_path / "one")
    file = tmp_path / "x.safetensors"
    run(
        first.to_config_dict(),
        str(tmp_path / "one"),
        mode="export",
        stage=1,
        weights=str(file),
    )
    exported = load_file(file)
    assert exported.keys() == tensors.keys()
    for name, value in exported.items():
        np.testing.assert_array_equal(value, tensors[name], err_msg=name, strict=True)
    with safetensors.safe_open(file, framework="np") as opened:
        about = opened.metadata()
    assert about["class_name"] == "Denoiser"
    kept = arguments.keys() - ARGUMENTS.keys() - {"model"}
    settings = json.loads(about["settings"])
    assert {name: settings[name] for name in kept} == {name: arguments[name] for name in kept}
    again = import_file(file, tmp_path / "two")
    assert again == first
    (_, ours, _), (_, theirs, _) = (restored(tmp_path / name, first, 3) for name in ("one", "two"))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    save_file(exported, tmp_path / "plain.safetensors")  # no metadata: as the config says
    assert import_file(tmp_path / "plain.safetensors", tmp_path / "three", first) == first


@dataclasses.dataclass(frozen=True)
class OtherJiT(JiT):
    """A network from outside the package."""


LINEAR = Stage((8, 8), JiT(4, 16, 3, 2, 8), preconditioning.XPreconditioning(), LinearProcess())


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"resolution": (8, 4)}, "resolution=(8, 4)"),
        *(
            ({"network": dataclasses.replace(LINEAR.network, **{name: value})}, f"network.{name}")
            for name, value in {
                "stem_blocks": 1,
                "head_blocks": 1,
                "multiple": 128,
                "augment_labels": 9,
            }.items()
        ),
        ({"network": OtherJiT()}, "network.kind='otherjit'"),
        ({"precondition": preconditioning.EDMPreconditioning()}, "precondition.kind='edm'"),
        ({"process": processes.CascadeProcess()}, "process.kind='cascade'"),
    ],
)
def test_export_refuses_what_is_not_published(changes, field):
    stage = dataclasses.replace(LINEAR, **changes)
    with pytest.raises(InputError, match=re.escape(field) + ".*cannot be exported.*as it is"):
        formats.format_of(stage).settings_of(3, 0)
    assert formats.format_of(LINEAR).settings_of(3, 0)


def test_x_preconditioning_is_not_the_format_of_other_networks():
    stage = dataclasses.replace(LINEAR, network=Song())
    with pytest.raises(InputError, match=r"precondition.kind='x' cannot be exported"):
        formats.format_of(stage).settings_of(3, 0)
