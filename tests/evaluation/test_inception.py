"""Inception-v3 resizes and pools as the graph of FID does, and takes its parameters from nothing
but the file it knows."""

import hashlib
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rdm_jax.evaluation import inception, inception_weights, published_weights
from rdm_jax.runtime.errors import InputError
from tests.support import inception_file
from tests.support.torch_standins import Call, Named, View, dump_legacy, dump_pt, state_dict

# Resizing and pooling. That the rest of the network is right, `tests/test_reference.py` shows.


def resized(image: np.ndarray, size: int) -> np.ndarray:
    """TensorFlow 1's bilinear resizing, pixel by pixel."""
    height, width, _ = image.shape
    out = np.zeros((size, size, image.shape[-1]), np.float32)
    for i in range(size):
        for j in range(size):
            y, x = (
                np.float32(i) * np.float32(height / size),
                np.float32(j) * np.float32(width / size),
            )
            top, left = int(y), int(x)
            bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
            upper = image[top, left] + (image[top, right] - image[top, left]) * (x - left)
            lower = image[bottom, left] + (image[bottom, right] - image[bottom, left]) * (x - left)
            out[i, j] = upper + (lower - upper) * (y - top)
    return out


@pytest.mark.parametrize(
    "shape, size", [((5, 7, 3), 11), ((16, 16, 1), 47), ((32, 32, 3), 9), ((1, 13, 2), 13)]
)
def test_resize(shape, size):
    images = np.random.default_rng(0).integers(0, 256, (2, *shape), dtype=np.uint8)
    found = inception.resize(jnp.asarray(images), size)
    assert found.dtype == np.float32
    np.testing.assert_allclose(
        found, [resized(image.astype(np.float32), size) for image in images], atol=1e-4, rtol=0
    )
    np.testing.assert_array_equal(inception.resize(jnp.asarray(images, jnp.float32), size), found)


def test_resize_at_the_edges():
    """The first pixel stays where it is, and the last one is repeated, unlike in other libraries'
    resizing."""
    row = jnp.asarray([0, 90], jnp.uint8).reshape(1, 1, 2, 1)
    np.testing.assert_allclose(inception.resize(row, 4)[0, 0, :, 0], [0, 45, 90, 90])
    images = jnp.arange(299 * 299, dtype=jnp.float32).reshape(1, 299, 299, 1)
    np.testing.assert_array_equal(inception.resize(images), images)


def test_preprocess():
    grey = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 20, 30, 1)), jnp.uint8)
    found = inception.preprocess(grey)
    assert found.shape == (2, 299, 299, 3)
    assert np.ptp(found, axis=-1).max() == 0
    np.testing.assert_array_equal(
        found[:, 0, 0, 0], (grey[:, 0, 0, 0].astype(np.float32) - 128) / 128
    )
    with pytest.raises(ValueError, match="broadcast"):
        inception.preprocess(jnp.zeros((1, 8, 8, 2), jnp.uint8))


def test_pooling():
    x = np.random.default_rng(0).normal(size=(2, 5, 6, 3)).astype(np.float32)

    def window(i, j):
        return x[:, max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2]

    for kind, over in (
        ("mean", np.mean),
        ("max", np.max),
    ):  # of what is inside of the image, however little that is
        found = np.stack(
            [np.stack([over(window(i, j), (1, 2)) for j in range(6)], 1) for i in range(5)], 1
        )
        np.testing.assert_allclose(inception._pool(kind, jnp.asarray(x)), found, atol=1e-6)
    found = np.stack([np.stack([window(i, j).max((1, 2)) for j in (1, 3)], 1) for i in (1, 3)], 1)
    np.testing.assert_array_equal(inception._pool("halve", jnp.asarray(x)), found)


def test_network_pools_by_maximum_in_the_last_block():
    pools = [branches[-1][0] for branches in inception.NETWORK if isinstance(branches, tuple)]
    assert pools == ["mean"] * 3 + ["halve"] + ["mean"] * 4 + ["halve"] + ["mean", "max"]


# The file.


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Makes the network one of two layers; returns (a path, its parameters by the port's names)."""
    monkeypatch.setattr(
        inception_weights, "LAYERS", {"stem": (1, 3, 2, 4), "top.branch": (1, 1, 4, 3)}
    )
    monkeypatch.setattr(inception_weights, "SIZES", {"pool": 3, "logits": 5})
    parameters = {
        name: inception_file.draw(name, list(shape), 0)
        for name, shape in inception_weights._shapes().items()
    }
    return tmp_path / "weights.pth", parameters


def refuse(path, *words, sha256=""):
    """Asserts that the file is refused in one sentence which has these words in it, and says where
    to get the right one."""
    with pytest.raises(InputError) as caught:
        inception_weights.load(path, sha256=sha256)
    message = str(caught.value)
    assert "\n" not in message
    assert "TypeCheckError" not in message
    if caught.value.fix.startswith("Download"):
        assert f"`curl -L --create-dirs -o {path} https://" in caught.value.fix
    else:
        assert message.endswith(".")  # the remedy; a problem alone has no final stop
    for word in (str(path), *words):
        assert word in message, message


@pytest.mark.second
def test_load_and_apply(tmp_path):
    """The whole network: a file as the published one is, read and used on grey images of another
    size."""
    shapes = inception_weights._shapes()
    assert len(shapes) == 472
    parameters = {name: inception_file.draw(name, list(shape), 1) for name, shape in shapes.items()}
    digest = inception_file.write(tmp_path / "weights.pth", parameters)
    params, found = inception_weights.load(tmp_path / "weights.pth", sha256=digest[:8])
    assert found == digest
    assert {array.dtype for array in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    kernel = parameters["Mixed_6b.branch7x7_2.conv.weight"]
    np.testing.assert_array_equal(
        params["Mixed_6b.branch7x7_2"]["kernel"][0, 5, 7, 11], kernel[11, 7, 0, 5]
    )
    np.testing.assert_array_equal(params["fc"]["kernel"], parameters["fc.weight"].T)

    grey = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 32, 24, 1)), jnp.uint8)
    features = jax.jit(inception.apply)(params, grey)
    assert {name: array.shape for name, array in features.items()} == {
        k: (2, size) for k, size in inception.SIZES.items()
    }
    assert all(np.abs(array[0] - array[1]).max() > 1e-3 for array in features.values())
    np.testing.assert_allclose(
        features["logits"], features["pool"] @ parameters["fc.weight"].T, atol=1e-4
    )


def test_space(monkeypatch, tmp_path):
    def zeros(params, images):
        return {name: jnp.zeros((len(images), size)) for name, size in inception.SIZES.items()}

    monkeypatch.setattr(inception_weights, "load", lambda path: ({"fc": {}}, "6726825d0"))
    monkeypatch.setattr(inception_weights, "apply", zeros)
    space = inception_weights.inception_space(tmp_path)
    assert (space.name, space.digest, space.params) == ("inception", "6726825d0", {"fc": {}})
    assert space.sizes == {"features": 2048, "spatial": 2023, "logits": 1008}
    found = space.apply(space.params, jnp.zeros((2, 8, 8, 3), jnp.uint8))
    assert {name: array.shape[1] for name, array in found.items()} == space.sizes


@pytest.mark.parametrize("dump", [dump_legacy, dump_pt])
def test_load_folds_batch_normalisation(small, dump):
    path, parameters = small
    dump(path, state_dict(parameters))
    params, _ = inception_weights.load(path, "")
    x = np.random.default_rng(0).normal(size=(10, 4))
    weight, bias, mean, variance = (
        parameters[f"stem.bn.{part}"] for part in ("weight", "bias", "running_mean", "running_var")
    )
    wanted = (x - mean) / np.sqrt(variance + 0.001) * weight + bias
    np.testing.assert_allclose(
        x * params["stem"]["scale"] + params["stem"]["shift"], wanted, rtol=1e-5
    )
    assert params["stem"]["kernel"].shape == (1, 3, 2, 4)
    assert params["fc"]["kernel"].shape == (3, 5)


def test_default_path(monkeypatch, tmp_path):
    name = "rdm_jax/pt_inception-2015-12-05-6726825d.pth"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert inception_weights.default_path() == tmp_path / name
    monkeypatch.setenv("HOME", str(tmp_path))
    for unset in (
        lambda: monkeypatch.setenv("XDG_CACHE_HOME", ""),
        lambda: monkeypatch.delenv("XDG_CACHE_HOME"),
    ):
        unset()
        assert inception_weights.default_path() == tmp_path / ".cache" / name


def test_load_needs_a_file(tmp_path):
    refuse(tmp_path / "missing.pth", "there is no ", inception_weights.URL)
    with pytest.raises(InputError, match="'.*/with space.pth' https"):
        inception_weights.load(tmp_path / "with space.pth")
    refuse(tmp_path, "is not a file")
    os.mkfifo(tmp_path / "pipe")
    refuse(tmp_path / "pipe", "is not a file")


def test_load_refuses_another_file(small, monkeypatch):
    path, parameters = small
    digest = inception_file.write(path, parameters)

    def opened(path):
        raise AssertionError("it was looked into before its SHA-256 was known")

    with monkeypatch.context() as patched:
        patched.setattr(published_weights.torch_files, "open_state_dict", opened)
        refuse(path, digest[:8], "not 6726825d", sha256=inception_weights.SHA256)
        refuse(path, digest[:8], sha256=hashlib.sha256(b"").hexdigest())
    assert inception_weights.load(path, digest)[1] == digest


def test_load_refuses_other_parameters(small):
    path, parameters = small

    def check(changed, *words):
        inception_file.write(path, changed)
        refuse(path, *words)

    check(
        {k: v for k, v in parameters.items() if k != "stem.bn.bias"}, "no parameter 'stem.bn.bias'"
    )
    check({}, "no parameter 'fc.weight'")
    check(
        parameters | {"AuxLogits.fc.bias": np.zeros(2, np.float32)},
        "'AuxLogits.fc.bias', which Inception-v3 does not have",
    )
    check(
        parameters | {"stem.bn.weight": np.zeros(3, np.float32)},
        "'stem.bn.weight' of shape (3,)",
        "(4,)",
    )
    turned = parameters["stem.conv.weight"].transpose(1, 0, 2, 3)
    check(
        parameters | {"stem.conv.weight": turned},
        "'stem.conv.weight' of shape (2, 4, 1, 3)",
        "(4, 2, 1, 3)",
    )
    check(parameters | {"fc.bias": np.zeros(5, np.float16)}, "'fc.bias' of shape (5,) and float16")
    for name in parameters:
        for wrong in (np.nan, np.inf, -1.0):
            if wrong != -1 or "running_var" in name:
                array = parameters[name].copy()
                array.flat[1] = wrong
                check(parameters | {name: array}, repr(name), "not finite")


@pytest.mark.parametrize("dump", [dump_legacy, dump_pt])
def test_load_refuses_objects(small, dump, tmp_path):
    path, parameters = small
    runs = Call(Named("posix", "system"), (f"touch {tmp_path / 'canary'}",))
    dump(path, dict(state_dict(parameters)) | {"hook": runs})
    refuse(path, "it names 'posix.system'")
    dump(path, {"state_dict": {name: View.of(array) for name, array in parameters.items()}})
    refuse(path, "tensor 'state_dict' is damaged")
    assert not (tmp_path / "canary").exists()
