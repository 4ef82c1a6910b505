"""Published autoencoders in and out again; their encoder and decoder against diffusers' numbers."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rdm_jax.interop import autoencoder_files
from rdm_jax.interop.autoencoder_files import CONFIG, OLD_ATTENTION, WEIGHTS
from rdm_jax.models.autoencoder import AutoencoderKL
from rdm_jax.runtime.errors import InputError
from tests.support.autoencoders import SMALL, published, small_params
from tests.support.reference import cases, draw_parameter, load


def write_case(meta, case, folder, old_names=False):
    """Writes a case as it would be published; returns the tensors by the new names."""
    tensors = {}
    for name, shape, total in zip(
        case["param_names"].tolist(),
        json.loads(str(case["param_shapes"])),
        case["param_abs_sums"],
        strict=True,
    ):
        tensors[name] = draw_parameter(name, shape, meta["seed"])
        np.testing.assert_allclose(np.abs(tensors[name]).sum(dtype=np.float64), total, rtol=1e-6)
    folder.mkdir(exist_ok=True)
    (folder / CONFIG).write_text(json.dumps({"_class_name": "AutoencoderKL"} | meta["config"]))
    written = tensors
    if old_names:
        written = {}
        for name, array in tensors.items():
            for new, old in OLD_ATTENTION.items():
                name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
            written[name] = array
        assert any(".proj_attn." in name for name in written)
    save_file({name: np.ascontiguousarray(a) for name, a in written.items()}, folder / WEIGHTS)
    return tensors


@cases("vae")
def test_autoencoder_reference(path, tmp_path):
    meta, case = load(path)
    theirs = write_case(meta, case, tmp_path / "a")
    config, params, _ = autoencoder_files.load(tmp_path / "a")
    model = config.build()
    moments = jax.jit(model.encode)(params, jnp.asarray(case["x"]))
    images = jax.jit(model.decode)(params, jnp.asarray(case["z"]))
    for ours, name in (
        (moments.mean, "mean"),
        (moments.log_variance, "logvar"),
        (images, "y"),
    ):
        assert ours.dtype == jnp.float32
        np.testing.assert_allclose(ours, case[name], atol=2e-5 * np.abs(case[name]).max(), rtol=0)
    autoencoder_files.save(config, params, tmp_path / "b")
    written = load_file(tmp_path / "b" / WEIGHTS)
    assert written.keys() == theirs.keys()
    for name, array in written.items():
        np.testing.assert_array_equal(array, theirs[name], strict=True, err_msg=name)
    saved = json.loads((tmp_path / "b" / CONFIG).read_text())
    assert saved.items() >= meta["config"].items()


@cases("vae")
def test_old_names_are_read(path, tmp_path):
    meta, case = load(path)
    write_case(meta, case, tmp_path / "new")
    write_case(meta, case, tmp_path / "old", old_names=True)
    new, old = (autoencoder_files.load(tmp_path / name) for name in ("new", "old"))
    jax.tree.map(np.testing.assert_array_equal, new.params, old.params)
    assert new.digest != old.digest
    # As 1x1 kernels, in which some files have them.
    tensors = load_file(tmp_path / "old" / WEIGHTS)
    for name, array in tensors.items():
        if ".attentions." in name and array.ndim == 2:
            tensors[name] = array[..., None, None]
    save_file(tensors, tmp_path / "old" / WEIGHTS)
    jax.tree.map(
        np.testing.assert_array_equal, new.params, autoencoder_files.load(tmp_path / "old").params
    )


@pytest.mark.parametrize(
    "config", [SMALL, dataclasses.replace(SMALL, quantize=False, scale=1.5305, shift=0.0609)]
)
def test_export_and_import_are_exact(config, tmp_path):
    params = small_params(config)
    autoencoder_files.save(config, params, tmp_path)
    found = autoencoder_files.load(tmp_path)
    assert found.config == config
    jax.tree.map(np.testing.assert_array_equal, found.params, params)
    assert any("quant" in name for name in load_file(tmp_path / WEIGHTS)) == config.quantize


def test_stable_diffusions_has_its_published_size():
    leaves = jax.tree.leaves(AutoencoderKL().build().parts.abstract)
    assert sum(leaf.size for leaf in leaves) == 83_653_863


@pytest.mark.parametrize(
    ("changed", "pattern"),
    [
        ({"_class_name": "VQModel"}, "_class_name='VQModel'"),
        ({"act_fn": "relu"}, "act_fn='relu'"),
        ({"block_out_channels": [8, 2**20]}, "block_out_channels="),
        ({"block_out_channels": "wide"}, "block_out_channels='wide'"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"] * 2}, "down_block_types="),
        ({"latent_channels": 2.5}, "latent_channels=2.5"),
        ({"latent_channels": 3}, "decoder.conv_in.weight' of shape .16, 4, 3, 3., not .16, 3,"),
        ({"layers_per_block": 2}, "no parameter 'decoder.up_blocks.0.resnets.2"),
        ({"norm_num_groups": 3}, "groups=3 does not divide the width 8"),
        ({"out_channels": 1}, "out_channels=1"),
        ({"use_quant_conv": False}, "use_quant_conv=False"),
        ({"use_quant_conv": False, "use_post_quant_conv": False}, "'post_quant_conv.bias', which"),
        ({"scaling_factor": 0}, "scaling_factor=0"),
        ({"latents_mean": [0.0]}, "latents_mean="),
    ],
)
def test_other_configs_are_refused(changed, pattern, tmp_path):
    published(tmp_path)
    settings = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(settings | changed))
    with pytest.raises(InputError, match=pattern):
        autoencoder_files.load(tmp_path)


def test_damaged_files_are_refused(tmp_path):
    published(tmp_path)
    content = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(content[:-100])
    with pytest.raises(InputError, match="cannot be used"):
        autoencoder_files.load(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(InputError, match="there is no"):
        autoencoder_files.load(tmp_path)
    (tmp_path / CONFIG).write_text("[")
    with pytest.raises(InputError, match="config.json cannot be read"):
        autoencoder_files.load(tmp_path)


def test_values_must_be_finite(tmp_path):
    published(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    tensors["decoder.conv_in.bias"][1] = np.nan
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(InputError, match="'decoder.conv_in.bias' that are not finite"):
        autoencoder_files.load(tmp_path)


@pytest.mark.parametrize("dtype", ["float16", "bf16", "int8"])
def test_other_dtypes_are_refused(tmp_path, dtype):
    published(tmp_path)
    with pytest.raises(InputError, match=f"autoencoder.dtype='{dtype}' cannot be used. Use"):
        autoencoder_files.load(tmp_path, dtype=dtype)
