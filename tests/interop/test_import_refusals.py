"""Imports and exports that are refused, or fail."""

import dataclasses
import json
import re

import numpy as np
import pytest
import safetensors
from safetensors.numpy import save_file

from rdm_jax.config import Stage
from rdm_jax.diffusion import preconditioning
from rdm_jax.interop import formats, import_export, pytorch_names
from rdm_jax.models.adm import ADM
from rdm_jax.models.conditions import Text
from rdm_jax.modes import run
from rdm_jax.runtime.errors import InputError
from tests.support.published_files import write_pkl, write_pt
from tests.support.torch_stages import NETWORK, config_for, settings_for, values_of


@dataclasses.dataclass(frozen=True)
class OtherNetwork(ADM):
    """A network from outside the package."""


@dataclasses.dataclass(frozen=True)
class OtherFamily:
    """A network that inherits from none of the package's."""

    condition_parameters = ()
    augment_labels = 0
    dtype = "float32"
    remat = "none"
    stride = 1
    build = ADM.build
    check = ADM.check


@dataclasses.dataclass(frozen=True)
class OtherPreconditioning(preconditioning.EDMPreconditioning):
    """A preconditioning from outside the package."""


def change(tensors, **changes):
    """Replaces some tensors, or removes them for None."""
    named = {name.replace("__", "."): value for name, value in changes.items()}
    return {name: value for name, value in {**tensors, **named}.items() if value is not None}


REFUSED = {
    "missing": ({"model__out_norm__bias": None}, {}, "has no parameter 'model.out_norm.bias'"),
    "unknown": (
        {"model__map_more__weight": np.zeros((2, 2), np.float32)},
        {},
        "has a parameter 'model.map_more.weight'",
    ),
    "shape": (
        {"model__out_norm__bias": np.zeros(9, np.float32)},
        {},
        r"'model.out_norm.bias' of shape \(9,\) instead of \(8,\)",
    ),
    "family": (
        {},
        {"model_type": "VisionTransformer"},
        "model_type='VisionTransformer' is unknown",
    ),
    "text": ({}, {"model_channels": "192"}, "model_channels='192' cannot be used"),
    "absurd": (
        {},
        {"num_blocks": 10**6},
        "num_blocks=1000000 cannot be used. Use an integer from 1 to 64[.]",
    ),
    "levels": ({}, {"channel_mult": [1, None]}, "channel_mult=.*cannot be used"),
    "negative": ({}, {"label_dim": -1}, "label_dim=-1 cannot be used"),
    "infinite": ({}, {"sigma_data": float("inf")}, "sigma_data=inf cannot be used"),
    "huge": ({}, {"dropout": 10**400}, "dropout=1000.*cannot be used"),
    "word": ({}, {"embedding_type": [1]}, "embedding_type=.*cannot be used. Use a string[.]"),
    "encoder": ({}, {"model_type": "SongUNet", "encoder_type": "skip"}, "encoder_type='skip'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_import_refuses_other_weights(case, imported, tmp_path):
    _, config, tensors = imported
    changes, settings, message = REFUSED[case]
    class_name, theirs = settings_for(config.stages[0])
    write_pkl(tmp_path / "x.pkl", class_name, {**theirs, **settings}, change(tensors[0], **changes))
    with pytest.raises(InputError, match=message) as refused:
        run(
            values_of(config),
            str(tmp_path / "run"),
            mode="import",
            stage=1,
            weights=str(tmp_path / "x.pkl"),
        )
    assert refused.value.fix.startswith("Use ") and refused.value.fix.endswith(".")
    assert not (tmp_path / "run/config.json").exists()


def test_import_refuses_unknown_preconditioning(imported, tmp_path):
    _, config, tensors = imported
    write_pt(tmp_path / "x.pt", "FlowPrecond", settings_for(config.stages[0])[1], tensors[0])
    with pytest.raises(InputError, match="'FlowPrecond' is unknown. Use EDMPrecond or"):
        run(
            values_of(config),
            str(tmp_path / "run"),
            mode="import",
            stage=1,
            weights=str(tmp_path / "x.pt"),
        )


def test_import_overwrites_nothing(imported):
    folder, config, _ = imported
    with pytest.raises(InputError, match="already has checkpoints. Use another --workdir"):
        run(
            values_of(config),
            str(folder / "run"),
            mode="import",
            stage=1,
            weights=str(folder / "one.pkl"),
        )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"mode": "import", "stage": 1}, "--weights=None does not go with --mode=import"),
        (
            {"mode": "import", "weights": "x.pkl"},
            "x.pkl is not a shared relay: it has no relay.json",
        ),
        ({"mode": "export", "stage": 3, "weights": "x"}, "--stage=3"),
        ({"mode": "train", "weights": "x.pkl"}, "--weights=x.pkl does not go with --mode=train"),
        ({"mode": "import", "stage": 1, "weights": "no/such.pkl"}, "no/such.pkl"),
    ],
    ids=["no-file", "no-stage", "no-such-stage", "train", "no-such-file"],
)
def test_flags_are_checked(tmp_path, flags, message):
    with pytest.raises(InputError, match=re.escape(message)):
        run(values_of(config_for(tmp_path)), str(tmp_path / "run"), **flags)


@pytest.mark.parametrize("damage", ["cut", "header", "no-json", "no-dict", "deep"])
def test_import_refuses_damaged_safetensors(tmp_path, damage):
    path = tmp_path / "x.safetensors"
    settings = {"no-json": "{", "no-dict": "[1]", "deep": "[" * 100_000}.get(damage, "{}")
    save_file({"a": np.zeros(100, np.float32)}, path, metadata={"settings": settings})
    data = path.read_bytes()
    path.write_bytes(
        {"cut": data[:-50], "header": data[:8] + b"{" + bytes(len(data))}.get(damage, data)
    )
    with pytest.raises(InputError, match="x.safetensors cannot be used"):
        run(
            values_of(config_for(tmp_path)),
            str(tmp_path / "run"),
            mode="import",
            stage=1,
            weights=str(path),
        )


def test_export_to_a_full_disk_raises_os_error(imported, tmp_path, monkeypatch):
    folder, config, _ = imported

    def full(*_, **__):
        raise safetensors.SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        )

    monkeypatch.setattr("safetensors.numpy.save_file", full)
    with pytest.raises(OSError, match="No space left on device.*x.safetensors"):
        run(
            values_of(config),
            str(folder / "run"),
            mode="export",
            stage=1,
            weights=str(tmp_path / "x.safetensors"),
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("dtype", "size", "says"),
    [
        ("F8_E4M3", 1, "x is of dtype F8_E4M3.*F16"),
        # safetensors 0.5 does not know it, and refuses the whole file.
        ("C64", 8, "x is of dtype C64.*F16|Error while deserializing header"),
    ],
)
def test_safetensors_of_lossy_dtypes_are_refused(tmp_path, dtype, size, says):
    header = json.dumps(
        {"x": {"dtype": dtype, "shape": [2], "data_offsets": [0, 2 * size]}}
    ).encode()
    (tmp_path / "x.safetensors").write_bytes(
        len(header).to_bytes(8, "little") + header + bytes(2 * size)
    )
    with (
        pytest.raises(InputError, match=f"x.safetensors cannot be used .({says})"),
        import_export.open_weights(tmp_path / "x.safetensors") as opened,
    ):
        opened.read("x")


@pytest.mark.parametrize(
    ("stage", "field"),
    [
        (Stage(resolution=(8, 4), network=NETWORK), "resolution=(8, 4)"),
        (Stage(network=dataclasses.replace(NETWORK, patch=4)), "network.patch=4"),
        (Stage(network=dataclasses.replace(NETWORK, head_channels=8)), "network.head_channels=8"),
        (
            Stage(precondition=preconditioning.EDMPreconditioning(noise_scale=1.0)),
            "precondition.noise_scale=1.0",
        ),
        (Stage(network=OtherNetwork()), "network.kind='othernetwork'"),
        (Stage(precondition=OtherPreconditioning()), "precondition.kind='other'"),
    ],
    ids=["not-square", "patch", "heads", "noise-scale", "network", "precondition"],
)
def test_export_refuses_unpublished_networks(stage, field):
    with pytest.raises(
        InputError,
        match=re.escape(f"{field} cannot be exported")
        + ".*only format so far.*checkpoint as it is",
    ):
        pytorch_names.settings_of(stage, 3, 0)


def test_other_families_have_no_format():
    stage = Stage(network=OtherFamily())
    with pytest.raises(
        InputError, match=r"^network.kind='otherfamily' has no .* Use 'adm' or 'song' or 'jit'[.]"
    ):
        formats.format_of(stage)
    assert formats.determined(stage) == ("resolution", "network", "precondition")


def test_captions_have_no_format():
    with pytest.raises(InputError, match=r"^condition.kind='text' has no .* 'classlabels' or"):
        formats.format_of(Stage(condition=Text()))


def test_export_names_the_stage(imported, tmp_path):
    folder, config, _ = imported
    first = dataclasses.replace(
        config.stages[0], network=dataclasses.replace(NETWORK, head_channels=8)
    )
    changed = dataclasses.replace(config, stages=(first, config.stages[1]))
    with pytest.raises(
        InputError, match="^config.stage1.network.head_channels=8 cannot be exported: .* it is 64. "
    ):
        run(
            values_of(changed),
            str(folder / "run"),
            mode="export",
            stage=1,
            weights=str(tmp_path / "x.safetensors"),
        )
    assert not (tmp_path / "x.safetensors").exists()
