"""Captions: found beside images, in metadata or names; and those that are refused."""

import json

import pytest

from rdm_jax.data import captions
from rdm_jax.data import source as source_lib
from rdm_jax.data.image_sets import open_direct, open_prepared
from rdm_jax.data.prepare import prepare
from rdm_jax.data.sources import open_source
from rdm_jax.data.text_table import Embedding
from rdm_jax.data.write_text import add_text
from rdm_jax.runtime.errors import InputError
from rdm_jax.text import encoders
from tests.support.captioned_files import (
    CAPTIONS,
    FORM,
    LONG,
    in_csv,
    in_dataset_json,
    in_jsonl,
    in_texts,
    with_long_captions,
    write_pictures,
)
from tests.support.configs import write_images
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


def test_captions_are_part_of_the_content(folder, tmp_path, encoder):
    in_jsonl(folder)
    spec, form = f"folder:{folder}", FORM
    one = open_prepared(prepare(spec, tmp_path / "one", form, captions="auto")).identity
    without = open_prepared(prepare(spec, tmp_path / "two", form)).identity
    direct = open_direct(spec, form, cache_bytes=2**20, captions="auto", encoder=encoder)
    assert one != without and direct.identity == one
    text = (folder / "metadata.jsonl").read_text().replace("sleeping", "running")
    (folder / "metadata.jsonl").write_text(text)
    prepare(spec, tmp_path / "one", form, captions="auto", update=True)
    assert open_prepared(tmp_path / "one").identity not in (one, without)
    add_text(tmp_path / "one", FAKE, lambda: None)
    found = open_prepared(tmp_path / "one", embedding=FAKE)
    assert found.caption([1])[0] == "a running cat"


def test_captions_of_too_many_tokens_are_refused_before_images_are_read(
    folder, tmp_path, encoder, monkeypatch
):
    spec = with_long_captions(folder)
    with monkeypatch.context() as patch:
        patch.setattr(source_lib.Source, "decode", None)
        with pytest.raises(InputError, match=rf"'a.png' of .* {LONG} .1 more like it.") as caught:
            prepare(spec, tmp_path / "data", FORM, captions="txt", encoder=encoder)
        assert "the longest caption has 12 tokens" in caught.value.fix
        with pytest.raises(InputError, match=LONG):
            open_direct(spec, FORM, cache_bytes=2**20, captions="txt", encoder=encoder)
    skipping = {"captions": "txt", "encoder": encoder, "skip_bad": True, "max_left_out": 1.0}
    directory = prepare(spec, tmp_path / "data", FORM, **skipping)
    direct = open_direct(spec, FORM, cache_bytes=2**20, **skipping)
    assert direct.caption([0]) == ["word"] and len(direct) == 1
    skipped = json.loads((directory / "manifest.json").read_text())["skipped"]
    assert skipped.keys() == {"a.png", "c.png"}
    add_text(directory, FAKE, lambda: None)
    assert open_prepared(directory, embedding=FAKE).caption([0]) == ["word"]


def test_caption_without_tokens_is_refused(folder, encoder, monkeypatch):
    in_texts(folder)
    monkeypatch.setattr(FakeEncoder, "lengths", lambda _, texts: [3 * ("cat" in t) for t in texts])
    with pytest.raises(InputError, match="'a.png' of .* has a caption without tokens"):
        open_source(f"folder:{folder}", captions="txt", encoder=encoder)


@pytest.mark.parametrize("table", ["metadata.jsonl", "dataset.json"])
def test_caption_that_is_not_unicode_is_refused(folder, tmp_path, table):
    """JSON may have lone surrogates, in names, too."""
    {"metadata.jsonl": in_jsonl, "dataset.json": in_dataset_json}[table](folder)
    path = folder / table
    path.write_text(path.read_text().replace("sleeping", "\\ud800"))
    spec = f"folder:{folder}"
    with pytest.raises(InputError, match="'b.png' of .* has a caption .* not valid Unicode"):
        prepare(spec, tmp_path / "data", FORM, captions="auto")
    options = {"captions": "auto", "skip_bad": True, "max_left_out": 1.0}
    assert len(open_prepared(prepare(spec, tmp_path / "data", FORM, **options))) == 2
    path.write_text(path.read_text().replace("c.png", "\\ud800.png"))
    source = open_source(spec, captions="auto", skip_bad=True)
    assert list(source.names) == ["a.png"] and "?.png" in source.skipped


def test_metadata_that_is_too_large_is_named(folder, monkeypatch):
    in_csv(folder)
    monkeypatch.setattr(captions, "ROW_BYTES", -(2**20) // 3)
    with pytest.raises(InputError, match="metadata.csv has [0-9]+ bytes"):
        open_source(f"folder:{folder}", captions="metadata", skip_bad=True)


def test_captions_alone_in_dataset_json_leave_the_classes_of_folders(tmp_path):
    folder = tmp_path / "images"
    write_images(folder, count=4)
    names = sorted(str(path.relative_to(folder)) for path in folder.glob("*/*.png"))
    found = {"captions": [[name, f"picture {name}"] for name in names]}
    (folder / "dataset.json").write_text(json.dumps(found))
    for rule in ("none", "auto"):
        source = open_source(f"folder:{folder}", captions=rule)
        assert source.class_names == ("a", "b") and list(source.labels) == [0, 0, 1, 1]
    (folder / "dataset.json").write_text(json.dumps(found | {"labels": None}))
    assert open_source(f"folder:{folder}").class_names == ()
    (folder / "dataset.json").unlink()
    part = {"captions": [["000.png", "x"]]}
    (folder / "a" / "dataset.json").write_text(json.dumps(part))
    assert open_source(f"folder:{folder}").class_names == ("a", "b")


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
