"""The encoder of T5 v1.1 computes what its published implementation does, from a folder's files.

The reference numbers were computed once with transformers in float64, of a small network with
random parameters (`text_files.draw`).
"""

import hashlib
import json

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from rdm_jax.runtime.errors import InputError
from rdm_jax.text import t5, t5_network
from tests.support import text_files
from tests.support.reference import cases, load

SIZES = t5_network.Sizes(20, 12, 2, 3, 5, 20, 8, 20, 1, 1e-6)


@pytest.fixture
def folder(tmp_path):
    text_files.write_t5(tmp_path / "t5", t5._shapes(SIZES))
    return tmp_path / "t5"


def outputs(folder, ids, mask):
    network = t5.open_network(folder, "config.field")
    return np.asarray(jax.jit(network.apply)(network.params, ids, mask))


@cases("text_t5")
def test_reference_t5(path, folder):
    _, case = load(path)
    assert t5.read_sizes(folder / "config.json") == SIZES
    mask = np.arange(40) < case["lengths"][:, None]
    found = outputs(folder, case["ids"], mask)
    atol = 1e-5 * np.abs(case["tokens"]).max()
    np.testing.assert_allclose(found[mask], case["tokens"][mask], atol=atol, rtol=0)
    assert found.dtype == np.float32


@cases("text_t5")
def test_reference_relative_buckets_of_the_published_size(path):
    """Of key minus query from -299 to 299."""
    _, case = load(path)
    found = t5_network.relative_buckets(300, 32, 128)
    np.testing.assert_array_equal(found[0], case["buckets"][299:])
    np.testing.assert_array_equal(found[:, 0][::-1], case["buckets"][:300])


def combined_hash(folder, *weights):
    names = (*weights, "tokenizer.json", "config.json")
    digests = [hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_hash_covers_all_that_tokens_depend_on(folder, name):
    before = t5.open_network(folder, "").weights_hash
    assert t5.open_network(folder, "").weights_hash == before
    path = folder / name
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"\x7f" if name.startswith("model") else content + b"\n")
    assert t5.open_network(folder, "").weights_hash != before


def test_weights_are_read_when_they_are_used(folder, monkeypatch):
    read = []
    monkeypatch.setattr(t5, "load", lambda *args: read.append(args))
    monkeypatch.setattr(t5, "digest", lambda path, fix: read.append(path) or "0")
    network = t5.open_network(folder, "")
    assert network.width == SIZES.width and not read
    assert [network.params, network.params] == [None, None] and len(read) == 1
    assert network.weights_hash and len(read) == 4


def test_shards_are_the_whole_file(folder):
    ids, mask = np.arange(12, dtype=np.int32).reshape(2, 6), np.ones((2, 6), bool)
    wanted = outputs(folder, ids, mask)
    whole = folder / "model.safetensors"
    assert t5.open_network(folder, "").weights_hash == combined_hash(folder, whole.name)
    tensors = safetensors.numpy.load_file(whole)
    whole.unlink()
    names = sorted(tensors)
    shards = {"b.safetensors": names[:9], "a.safetensors": names[9:]}
    for file, part in shards.items():
        safetensors.numpy.save_file({name: tensors[name] for name in part}, folder / file)
    index = {name: file for file, part in shards.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    np.testing.assert_array_equal(outputs(folder, ids, mask), wanted)
    assert t5.open_network(folder, "").weights_hash == combined_hash(folder, *sorted(shards))
    (folder / "a.safetensors").unlink()
    with pytest.raises(InputError, match="there is no .*a.safetensors, the weights of"):
        t5.open_network(folder, "")
    index[names[0]] = "../b.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    with pytest.raises(InputError, match="index.json has no weight_map with names of files beside"):
        t5.open_network(folder, "")


def test_half_precision_and_a_decoder_in_the_file(folder):
    """bfloat16 is exact in float32; a decoder's parameters are left out."""
    ids, mask = np.arange(12, dtype=np.int32).reshape(2, 6), np.ones((2, 6), bool)
    path = folder / "model.safetensors"
    halves = {
        name: tensor.astype(ml_dtypes.bfloat16)
        for name, tensor in safetensors.numpy.load_file(path).items()
    }
    safetensors.numpy.save_file(
        {name: tensor.astype(np.float32) for name, tensor in halves.items()}, path
    )
    wanted = outputs(folder, ids, mask)
    decoder = {"lm_head.weight": np.zeros((20, 12), np.float32)}
    safetensors.numpy.save_file(halves | decoder, path)
    np.testing.assert_array_equal(outputs(folder, ids, mask), wanted)
    network = t5.open_network(folder, "")
    assert {leaf.dtype.type for leaf in jax.tree.leaves(network.params)} == {ml_dtypes.bfloat16}


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"model_type": "bert"}, "model_type='bert', not 't5'"),
        ({"feed_forward_proj": "relu"}, "feed_forward_proj='relu', not 'gated-gelu'"),
        ({"d_model": 13}, r"'shared.weight' of shape \(20, 12\) and F32, not \(20, 13\)"),
        ({"d_model": 0}, "d_model=0, not a size"),
        ({"num_layers": "2"}, "num_layers='2', not a size"),
        ({"num_layers": 10**6}, "num_layers=1000000, not a size"),
        ({"num_layers": 3}, "no parameter 'encoder.block.2"),
        ({"layer_norm_epsilon": 2.0}, "layer_norm_epsilon=2.0, not between 0 and 1"),
        ({"relative_attention_num_buckets": 6}, "num_buckets=6, which do not divide"),
        ({"relative_attention_max_distance": 2}, "up to 2"),
        ({"vocab_size": 11}, "tokenizer.json has a token 11, and the network knows 11 tokens"),
        ({"eos_token_id": 2}, "tokenizer.json does not end a text with the token 2"),
    ],
)
def test_config_of_another_network_is_refused(folder, changes, words):
    (folder / "config.json").write_text(json.dumps(text_files.T5 | changes))
    with pytest.raises(InputError, match=words) as caught:
        t5.open_network(folder, "config.field")
    assert str(folder) in caught.value.problem and caught.value.fix == t5.FIX


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_missing_and_damaged_files_are_refused(folder, name):
    path = folder / name
    for content in (b"\xff{", b"", path.read_bytes()[:-2], b"[]"):
        path.write_bytes(content)
        with pytest.raises(InputError) as caught:
            t5.open_network(folder, "config.field")
        assert str(path) in caught.value.problem and caught.value.fix == t5.FIX
    path.unlink()
    with pytest.raises(InputError, match="there is no"):
        t5.open_network(folder, "config.field")
    path.mkdir()
    with pytest.raises(InputError, match=name):
        t5.open_network(folder, "config.field")


def test_missing_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="config.field=t5:.*nowhere is not a folder"):
        t5.open_network(tmp_path / "nowhere", "config.field")
