"""Captions: found beside images, in metadata or names; prepared with their embeddings."""

import json
import pickle

import numpy as np
import pytest

from rdm_jax.data import image_sets, write_text
from rdm_jax.data.image_sets import open_direct, open_prepared
from rdm_jax.data.images import ImageSpec
from rdm_jax.data.prepare import prepare
from rdm_jax.data.sources import open_source
from rdm_jax.data.text_table import Embedding, folder_of
from rdm_jax.data.write_text import add_text
from rdm_jax.runtime.errors import InputError
from tests.support.configs import write_images
from tests.support.fake_encoder import FakeEncoder

FORM = ImageSpec(8, 12)
FAKE = Embedding("fake", 8)
CAPTIONS = {"a": "a red apple", "b": "a  sleeping\ncat", "c": "a red apple"}


@pytest.fixture
def folder(tmp_path):
    """Three images, a.png to c.png."""
    from PIL import Image

    folder = tmp_path / "images"
    folder.mkdir()
    for number, name in enumerate(CAPTIONS):
        Image.new("RGB", (12, 8), (80 * number, 0, 0)).save(folder / f"{name}.png")
    return folder


@pytest.fixture
def encoder(monkeypatch):
    fake = FakeEncoder()
    for module in (image_sets, write_text):
        monkeypatch.setattr(module, "open_encoder", lambda spec, tokens: fake)
    return fake


def in_texts(folder):
    for name, caption in CAPTIONS.items():
        (folder / f"{name}.txt").write_text(caption)


def in_jsonl(folder):
    rows = [{"file_name": f"{name}.png", "text": text} for name, text in CAPTIONS.items()]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


def in_csv(folder):
    rows = [f'{name}.png,"{text}",1' for name, text in CAPTIONS.items()]
    (folder / "metadata.csv").write_text("\n".join(["file_name,caption,score", *rows]))


def in_dataset_json(folder):
    captions = [[f"{name}.png", text] for name, text in CAPTIONS.items()]
    (folder / "dataset.json").write_text(json.dumps({"captions": captions}))


@pytest.mark.parametrize("write", [in_texts, in_jsonl, in_csv, in_dataset_json])
def test_captions_are_found(folder, write):
    write(folder)
    source = open_source(f"folder:{folder}", captions="auto")
    assert list(source.captions) == ["a red apple", "a sleeping cat", "a red apple"]
    assert source.class_names == () and not open_source(f"folder:{folder}").captions


def test_captions_are_the_words_of_names(tmp_path):
    write_images(tmp_path / "images")
    (tmp_path / "images/Class-0").mkdir(exist_ok=True)
    source = open_source(f"folder:{tmp_path / 'images'}", captions="names", skip_bad=True)
    assert len(source.captions) == len(source.names) and all(source.captions)


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (lambda f: (f / "b.txt").write_text("  \n"), "'b.png' .* has an empty caption"),
        (lambda f: (f / "b.txt").write_bytes(b"caf\xe9"), r"'b.png' .* not UTF-8 \(b.txt\)"),
        (lambda f: (f / "b.txt").unlink(), "'b.png' .* has no caption in a .txt"),
        (lambda f: (f / "x.txt").write_text("x"), "'x.txt' .* is a caption without an image"),
        (lambda f: (f / "b.txt").write_text("x" * 70_000), "has 70,000 bytes"),
    ],
    ids=["empty", "encoding", "missing", "no image", "long"],
)
def test_bad_captions_are_refused_by_name(folder, break_it, says):
    in_texts(folder)
    break_it(folder)
    with pytest.raises(InputError, match=says):
        open_source(f"folder:{folder}", captions="txt")
    kept = open_source(f"folder:{folder}", captions="txt", skip_bad=True)
    assert len(kept) == len(kept.captions) >= 2 and kept.skipped


def test_encoding_of_all_captions_is_named(folder):
    for name in CAPTIONS:
        (folder / f"{name}.txt").write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match=r"'a.png' .* not UTF-8 \(a.txt\)"):
        open_source(f"folder:{folder}", captions="auto")


def test_lines_of_jsonl_end_at_newlines_only(folder):
    rows = [{"file_name": "a.png"}, *({"file_name": f"{n}.png", "text": "x\u2028y"} for n in "bc")]
    lines = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (folder / "metadata.jsonl").write_bytes(lines.encode())
    source = open_source(f"folder:{folder}", captions="auto", skip_bad=True)
    assert list(source.captions) == ["x y", "x y"]
    assert "empty caption" in source.skipped["a.png"].reason


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("metadata.jsonl", "5", "row 1 has no file_name"),
        ("metadata.jsonl", '["a.png", "x"]', "row 1 has no file_name"),
        ("metadata.jsonl", "[" * 100_000, "nested too deep"),
        ("dataset.json", '{"captions": 5}', "captions is not a list"),
        ("dataset.json", '{"captions": [1]}', "1 is not a name and a caption"),
        ("dataset.json", '{"captions": [["a.png", "x", "y"]]}', "is not a name and a caption"),
    ],
)
def test_metadata_of_another_form_is_refused(folder, name, content, says):
    (folder / name).write_text(content)
    with pytest.raises(InputError, match=f"{name} cannot be read .*{says}"):
        open_source(f"folder:{folder}", captions="metadata")


def test_folders_of_text_are_of_one_encoder_each(tmp_path):
    specs = ["minilm", "t5:/m/t5-small", "t5:/m/t5_small"]
    assert len({folder_of(tmp_path, Embedding(spec, 32)) for spec in specs}) == 3


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("file_name\na.png\n", "no column text or caption"),
        ("name,text\na.png,x\n", "cannot be read"),
        ("file_name,text\na.png,x\na.png,y\n", "two captions for 'a.png'"),
        ("file_name,text\nz.png,x\n", "'z.png' .* is listed in metadata.csv but missing"),
        (b"file_name,text\na.png,\xff\n", "cannot be read"),
    ],
)
def test_bad_metadata_is_refused(folder, content, says):
    data = content if isinstance(content, bytes) else content.encode()
    (folder / "metadata.csv").write_bytes(data)
    with pytest.raises(InputError, match=says):
        open_source(f"folder:{folder}", captions="metadata")


def test_captions_that_are_not_there_are_refused(folder):
    for rule in ("auto", "txt", "metadata"):
        with pytest.raises(InputError, match=f"captions='{rule}', but .* has no captions"):
            open_source(f"folder:{folder}", captions=rule)
    with pytest.raises(
        InputError, match="captions='auto' is not supported for the source 'digits'"
    ):
        open_source("digits", captions="auto")


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
    for found in (images, images.of_cells(2), pickle.loads(pickle.dumps(images))):
        batch = found.batch([2, 1])
        np.testing.assert_array_equal(batch["text"], wanted.tokens[[2, 1]])
        assert batch["text"].dtype == np.float16 and batch["text_length"].tolist() == [3, 3]
    learnt, held_out = images.split(1)
    assert (
        learnt.caption(np.arange(len(learnt))) + held_out.caption(np.arange(len(held_out))) != []
        and len(held_out.caption(np.arange(len(held_out)))) == 1
    )
    np.testing.assert_array_equal(
        held_out[0]["text"], encoder(held_out.caption(np.arange(len(held_out)))).tokens[0]
    )
    assert images.text == ("fake", "0" * 64, 8, 6)


def test_captions_are_part_of_the_content(folder, tmp_path, encoder):
    in_jsonl(folder)
    spec, form = f"folder:{folder}", FORM
    one = open_prepared(prepare(spec, tmp_path / "one", form, captions="auto")).identity
    without = open_prepared(prepare(spec, tmp_path / "two", form)).identity
    direct = open_direct(spec, form, cache_bytes=2**20, captions="auto", embedding=FAKE)
    assert one != without and direct.identity == one
    text = (folder / "metadata.jsonl").read_text().replace("sleeping", "running")
    (folder / "metadata.jsonl").write_text(text)
    prepare(spec, tmp_path / "one", form, captions="auto", update=True)
    assert open_prepared(tmp_path / "one").identity not in (one, without)
    add_text(tmp_path / "one", FAKE, lambda: None)
    found = open_prepared(tmp_path / "one", embedding=FAKE)
    assert found.caption([1])[0] == "a running cat"


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


def test_caption_of_too_many_tokens_is_refused(folder, tmp_path, encoder):
    (folder / "a.txt").write_text("one two three four five six seven eight nine")
    for name in "bc":
        (folder / f"{name}.txt").write_text("short")
    directory = prepare(f"folder:{folder}", tmp_path / "data", FORM, captions="txt")
    with pytest.raises(InputError, match="'one two .* nine' has 9 tokens"):
        add_text(directory, FAKE, lambda: None)


def test_emoji_have_their_names(tmp_path):
    pytest.importorskip("emoji")
    from PIL import Image

    wales = "1f3f4-e0067_e0062_e0077_e006c_e0073"
    for name in ("1f34e", "1f44d-1f3fd", "2764-fe0f", "1f9d1-200d-1f680", wales, "10ffff"):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{name}.png")
    source = open_source(f"emoji:{tmp_path}", skin_tones="mark", captions="auto", skip_bad=True)
    found = {
        name.partition(".")[0]: text
        for name, text in zip(source.names, source.captions, strict=True)
    }
    assert found == {
        "1f34e": "red apple",
        "1f44d-1f3fd": "thumbs up medium skin tone",
        "2764-fe0f": "red heart",
        "1f9d1-200d-1f680": "astronaut",
        wales: "Wales",
    }
    assert "without a name" in source.skipped["10ffff.png"].reason
