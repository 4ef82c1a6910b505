"""Encoders: texts in batches, and the texts and names that are refused; with a small T5."""

import dataclasses
import sys

import numpy as np
import pytest

from rdm_jax.runtime.errors import InputError
from rdm_jax.text import encoders, minilm, t5, t5_network
from rdm_jax.text.encoders import NetworkEncoder, open_encoder
from tests.support import text_files

SIZES = t5_network.Sizes(20, 12, 2, 3, 5, 20, 8, 20, 1, 1e-6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("encoders") / "t5"
    text_files.write_t5(path, t5._shapes(SIZES))
    return path


@pytest.fixture(scope="module")
def encoder(folder):
    return open_encoder(f"t5:{folder}", 6)


def test_encoder_returns_tokens_and_lengths(encoder):
    assert (encoder.name, encoder.width, encoder.tokens) == ("t5", 12, 6)
    tokens, lengths = encoder(["a red apple", "cat", "the sleeping cat on apple"])
    assert tokens.shape == (3, 6, 12) and tokens.dtype == np.float16
    np.testing.assert_array_equal(lengths, np.int32([4, 2, 6]))  # each ends with </s>
    behind = np.arange(6) >= lengths[:, None]
    assert not tokens[behind].any() and tokens[~behind].any(-1).all()


def test_encoding_does_not_depend_on_the_batch(encoder):
    texts = [f"{size} {colour} {thing}" for size in ("a", "the") for colour in ("red", "blue")
             for thing in ("cat", "apple")]  # fmt: skip
    many = encoder([texts[n % 8] for n in range(2 * encoders.BATCH_SIZE + 3)])
    for n, text in enumerate(texts):
        one = encoder([text])
        for index in range(n, len(many.lengths), 8):
            np.testing.assert_array_equal(many.tokens[index], one.tokens[0])
            assert many.lengths[index] == one.lengths[0]
    assert len({many.tokens[n].tobytes() for n in range(8)}) == 8


def test_lengths_need_no_weights(folder, monkeypatch):
    """And are those of encoded texts, also of texts that are too long."""
    monkeypatch.setattr(encoders, "TOKENISED", 3)
    monkeypatch.setattr(t5, "load", lambda *args: pytest.fail("weights were read"))
    texts = ["a red apple", "", "cat", " \n", "a red cat on the apple", "cat"]
    assert open_encoder(f"t5:{folder}", 6).lengths(texts) == [4, 0, 2, 0, 7, 2]
    assert open_encoder(f"t5:{folder}", 6).lengths([]) == []


def test_no_texts_are_encoded(encoder):
    tokens, lengths = encoder([])
    assert tokens.shape == (0, 6, 12) and lengths.shape == (0,)


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "the text '' is empty"),
        (" \n", r"the text ' \\n' is empty"),
        ("a red cat on the apple", "the text 'a red cat on the apple' has 7 tokens, more than 6"),
        ("cat " * 100, r"the text '(cat ){20}\.\.\.' has 101 tokens, more than 6"),
        ("cat \ud800", r"the text 'cat \\ud800' is not valid Unicode"),
    ],
)
def test_text_that_cannot_be_used_is_quoted(encoder, text, words):
    with pytest.raises(InputError, match=words):
        encoder(["a cat", text])


def test_tokens_that_are_not_finite_are_refused(folder):
    network = t5.open_network(folder, "")
    params = network.params | {"norm": network.params["norm"] * 1e6}
    with pytest.raises(InputError, match="encoder t5 gives tokens that are not finite .* 'a cat'"):
        NetworkEncoder(dataclasses.replace(network, load=lambda: params), 6)(["a cat"])


@pytest.mark.parametrize("spec", ["", "minilm:x", "t5", "t5:", "bert"])
def test_unknown_encoder_is_refused(spec):
    with pytest.raises(InputError, match=f"config.field='{spec}' is not known") as caught:
        open_encoder(spec, 6, "config.field")
    assert caught.value.fix == "Use minilm or t5:PATH."


def test_network_with_few_positions_is_refused(folder, monkeypatch):
    network = dataclasses.replace(t5.open_network(folder, ""), longest=16)
    monkeypatch.setattr(minilm, "open_network", lambda field: network)
    assert open_encoder("minilm", 16).tokens == 16
    with pytest.raises(InputError, match="config.field=minilm takes at most 16 tokens, not 17"):
        open_encoder("minilm", 17, "config.field")


@pytest.mark.parametrize("library", ["tokenizers", "safetensors"])
def test_missing_library_is_named_with_its_extra(folder, library, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(InputError, match=f"the package {library} is not installed") as caught:
        open_encoder(f"t5:{folder}", 6)
    assert caught.value.fix == "Run pip install 'rdm_jax[text]'."
