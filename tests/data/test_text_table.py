"""Captions embedded once, in a table beside prepared images, and read in batches."""

import pickle
import shutil

import numpy as np
import pytest

from rdm_jax.data import text_table
from rdm_jax.data.image_sets import open_direct, open_prepared
from rdm_jax.data.prepare import prepare
from rdm_jax.data.text_table import Embedding, folder_of
from rdm_jax.data.write_text import add_text
from rdm_jax.runtime.errors import InputError
from rdm_jax.text import encoders
from tests.support.captioned_files import (
    FORM,
    LONG,
    in_jsonl,
    in_texts,
    with_long_captions,
    write_pictures,
)
from tests.support.fake_encoder import FakeEncoder

FAKE = Embedding("fake", 8)


@pytest.fixture
def folder(tmp_path):
    return write_pictures(tmp_path / "images")


@pytest.fixture
def encoder(monkeypatch):
    fake = FakeEncoder()
    monkeypatch.setattr(encoders, "open_encoder", lambda spec, tokens: fake)
    return fake


def test_folders_of_text_are_of_one_encoder_each(tmp_path):
    specs = ["minilm", "t5:/m/t5-small", "t5:/m/t5_small"]
    assert len({folder_of(tmp_path, Embedding(spec, 32)) for spec in specs}) == 3


def test_prepared_captions_are_embedded_once(folder, tmp_path, encoder):
    in_jsonl(folder)
    directory = prepare(f"folder:{folder}", tmp_path / "data", FORM, captions="auto", cells=[2])
    plain = open_prepared(directory)
    assert plain.text is None and plain.batch([0]).keys() == {"image", "label"}
    with pytest.raises(InputError, match="no captions embedded by 'fake' with 8 tokens"):
        open_prepared(directory, embedding=FAKE)
    for _ in range(2):
        add_text(directory, FAKE, lambda: None)
    assert encoder.calls == [["a red apple", "a sleeping cat"]]

    images = open_prepared(directory, embedding=FAKE, cells=[2])
    assert images.caption(np.arange(len(images))) == [
        "a red apple",
        "a sleeping cat",
        "a red apple",
    ]
    wanted = encoder(images.caption(np.arange(len(images))))
    sent = pickle.loads(pickle.dumps(images))
    for found in (images, images.of_cells(2), sent):
        assert found.batch([2, 1]).keys() == {"image", "label"}
        batch = found.batch([2, 1], text=True)
        np.testing.assert_array_equal(batch["text"], wanted.tokens[[2, 1]])
        assert batch["text"].dtype == np.float16 and batch["text_length"].tolist() == [3, 3]
    learnt, held_out = images.split(1)
    assert (
        learnt.caption(np.arange(len(learnt))) + held_out.caption(np.arange(len(held_out))) != []
        and len(held_out.caption(np.arange(len(held_out)))) == 1
    )
    np.testing.assert_array_equal(
        held_out.batch([0], text=True)["text"], encoder(held_out.caption([0])).tokens
    )
    with pytest.raises(IndexError):  # workers need no captions
        sent.caption([0])
    assert images.text == ("fake", "0" * 64, 8, 6)


@pytest.mark.parametrize("file", ["tokens.bin", "text.npz", "manifest.json"])
def test_damaged_embeddings_are_refused(folder, tmp_path, encoder, file):
    in_jsonl(folder)
    directory = prepare(f"folder:{folder}", tmp_path / "data", FORM, captions="auto")
    add_text(directory, FAKE, lambda: None)
    path = folder_of(directory, FAKE) / file
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(InputError, match="Delete .* and run --mode=prepare"):
        open_prepared(directory, embedding=FAKE)


def test_verification_covers_embeddings(folder, tmp_path, encoder):
    in_jsonl(folder)
    spec = f"folder:{folder}"
    directory = prepare(spec, tmp_path / "data", FORM, captions="auto")
    add_text(directory, FAKE, lambda: None)
    prepare(spec, directory, FORM, captions="auto", verify=True)
    path = folder_of(directory, FAKE) / "tokens.bin"
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="tokens.bin"):
        prepare(spec, directory, FORM, captions="auto", verify=True)


def test_recorded_captions_of_too_many_tokens_are_refused_before_any_is_embedded(
    folder, tmp_path, encoder
):
    directory = prepare(with_long_captions(folder), tmp_path / "data", FORM, captions="txt")
    with pytest.raises(InputError, match=rf"image 'a.png' of .* {LONG} .1 other captions cannot"):
        add_text(directory, FAKE, lambda: None)
    assert encoder.calls == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "images"]


def stop_after(count):
    """A check that stops the work when it is called for the last of these times."""
    calls = iter(range(count - 1))

    def check():
        if next(calls, None) is None:
            raise KeyboardInterrupt

    return check


def test_interrupted_embedding_is_resumed(folder, tmp_path, monkeypatch):
    """From the captions whose tokens and lengths are whole; with another encoder from the start."""
    monkeypatch.setattr(text_table, "CHUNK", 1)
    names = [f"{name} {'long ' * number}word" for number, name in enumerate("abc")]
    for name in names:
        (folder / f"{name[0]}.txt").write_text(name)
    directory = prepare(f"folder:{folder}", tmp_path / "data", FORM, captions="txt")
    texts = {}
    staged = tmp_path / ".data.incomplete" / folder_of(directory, FAKE).name
    for case, calls in {
        "whole": [names],
        "resumed": [names[:2], names[2:]],
        "torn": [names[:2], names[1:]],
        "another encoder": [names[:2], names],
    }.items():
        for number, wanted in enumerate(calls):
            used = FakeEncoder(weights_hash=("01"[case == "another encoder" and not number]) * 64)
            monkeypatch.setattr(encoders, "open_encoder", lambda spec, tokens, used=used: used)
            if number < len(calls) - 1:
                with pytest.raises(KeyboardInterrupt):
                    add_text(directory, FAKE, stop_after(len(names) + len(wanted)))
            else:
                # As the next run begins, which keeps what can be resumed.
                prepare(f"folder:{folder}", directory, FORM, captions="txt")
                if case == "torn":
                    tokens = (staged / "tokens.bin").read_bytes()
                    (staged / "tokens.bin").write_bytes(tokens[:-1])
                add_text(directory, FAKE, lambda: None)
            assert [text for call in used.calls for text in call] == wanted, case
        made = folder_of(directory, FAKE)
        texts[case] = {path.name: path.read_bytes() for path in made.iterdir()}
        assert open_prepared(directory, embedding=FAKE).text.weights_hash == "0" * 64
        shutil.rmtree(made)
    assert list(texts.values()) == [texts["whole"]] * 4
    assert texts["whole"].keys() == {"tokens.bin", "text.npz", "manifest.json"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "images"]


def test_embedding_again_does_not_change_tokens_in_use(folder, tmp_path, encoder, monkeypatch):
    in_texts(folder)
    directory = prepare(f"folder:{folder}", tmp_path / "data", FORM, captions="txt")
    add_text(directory, FAKE, lambda: None)
    used, late = (open_prepared(directory, embedding=FAKE) for _ in range(2))
    before = used.batch([0, 1, 2], text=True)["text"]
    shutil.rmtree(folder_of(directory, FAKE))
    other = FakeEncoder(weights_hash="1" * 64)
    monkeypatch.setattr(FakeEncoder, "__call__", lambda self, texts: halved(encoder, texts))
    monkeypatch.setattr(encoders, "open_encoder", lambda spec, tokens: other)
    add_text(directory, FAKE, lambda: None)
    np.testing.assert_array_equal(used.batch([0, 1, 2], text=True)["text"], before)
    with pytest.raises(InputError, match="tokens.bin was written again while it was used"):
        late.batch([0], text=True)
    now = open_prepared(directory, embedding=FAKE).batch([0, 1, 2], text=True)["text"]
    np.testing.assert_array_equal(now, before / 2)


CALL = FakeEncoder.__call__


def halved(encoder, texts):
    made = CALL(encoder, texts)
    return made._replace(tokens=made.tokens / 2)


def test_fingerprint_is_that_of_captions_and_not_of_tokens(folder, encoder):
    in_texts(folder)

    def fingerprint(width):
        used = FakeEncoder(width=width)
        images = open_direct(
            f"folder:{folder}", FORM, cache_bytes=2**20, captions="txt", encoder=used
        )
        return images.fingerprint

    assert fingerprint(6) == fingerprint(5)
    before = fingerprint(6)
    (folder / "b.txt").write_text("a running cat")
    assert fingerprint(6) != before


def test_embeddings_whose_manifest_leads_elsewhere_are_refused(folder, tmp_path, encoder):
    in_jsonl(folder)
    directory = prepare(f"folder:{folder}", tmp_path / "data", FORM, captions="auto")
    add_text(directory, FAKE, lambda: None)
    path = folder_of(directory, FAKE) / "manifest.json"
    path.write_text(path.read_text().replace('"tokens.bin"', '"../tokens.bin"'))
    with pytest.raises(InputError, match="'../tokens.bin' is not a file beside it"):
        open_prepared(directory, embedding=FAKE)
