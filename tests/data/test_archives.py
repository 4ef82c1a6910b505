"""Zips and EDM's dataset.json: the same images as in a folder, and nothing from a hostile one."""

import io
import json
import pickle
import zipfile

import numpy as np
import pytest
from PIL import Image

from rdm_jax.data.images import Form
from rdm_jax.data.sources import open_source
from rdm_jax.errors import BadImage, InputError

FORM = Form(4, 4)


def png(value):
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (value, 0, 0)).save(file, "png")
    return file.getvalue()


def write_zip(path, members, compression=zipfile.ZIP_STORED):
    """Members by name, or by ZipInfo."""
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in members.items() if isinstance(members, dict) else members:
            file.writestr(name, content)
    return f"zip:{path}"


EDM = {f"{i // 2:05d}/img{i:08d}.png": png(i) for i in range(5)}
LABELS = [[name, i % 3] for i, name in enumerate(EDM)]


def with_labels(labels, members=EDM):
    return {**members, "dataset.json": json.dumps({"labels": labels})}


@pytest.fixture(params=["zip", "folder"])
def written(request, tmp_path):
    """A function that writes members as a zip or as a folder, and gives its spec."""

    def write(members):
        if request.param == "zip":
            return write_zip(tmp_path / "set.zip", members)
        for name, content in members.items():
            file = tmp_path / "set" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content.encode() if isinstance(content, str) else content)
        return f"folder:{tmp_path}/set"

    return write


def values(source):
    """The red of every image, by which it is known."""
    return [int(source.read(i, FORM)[0, 0, 0]) for i in range(len(source))]


def test_edms_layout_with_labels(written):
    source = open_source(written(with_labels(LABELS[::-1])))
    assert values(source) == [0, 1, 2, 3, 4] and source.class_names == ("0", "1", "2")
    assert [source.label(i) for i in range(5)] == [0, 1, 2, 0, 1]


@pytest.mark.parametrize("labels", [None, []])
def test_edms_layout_without_labels(written, labels):
    source = open_source(written(with_labels(labels)))
    assert values(source) == [0, 1, 2, 3, 4] and source.class_names == ()


def test_class_folders_and_none(written):
    source = open_source(written({"b/1.png": png(1), "a/2.png": png(2), ".hidden": b"", "__MACOSX/a/._2.png": b""} | {}))
    assert (source.class_names, values(source)) == (("a", "b"), [2, 1])


def test_no_folders_are_no_classes(written):
    source = open_source(written({"b.png": png(1), "a.png": png(2)}))
    assert (source.class_names, values(source)) == ((), [2, 1])


def test_a_source_can_be_sent_to_another_process(written):
    source = open_source(written(with_labels(LABELS)))
    sent = pickle.loads(pickle.dumps(source.part([3, 1])))
    assert values(sent) == [3, 1] and [sent.label(i) for i in range(2)] == [0, 1]


def test_the_stamp_of_an_image_changes_with_it(written):
    before = open_source(written({"a.png": png(1), "b.png": png(2)})).reader
    stamps = [before.stamp(name) for name in ("a.png", "b.png")]
    after = open_source(written({"a.png": png(1), "b.png": png(3) + b"\0"})).reader
    assert after.stamp("b.png") != stamps[1]


NAMED = next(iter(EDM))
SLIPS = {
    "a label for a file that is not there": ([*LABELS, ["gone.png", 0]], "gone.png"),
    "a file without a label": (LABELS[1:], NAMED),
    "a negative class number": ([[NAMED, -1], *LABELS[1:]], NAMED),
}
REFUSED = {
    "two labels for a file": ([*LABELS, [NAMED, 1]], NAMED),
    "class numbers with gaps": ([[name, 2 * label] for name, label in LABELS], "no 1"),
    "class numbers that do not begin at 0": ([[name, label + 1] for name, label in LABELS], "no 0"),
    "a huge class number": ([[NAMED, 10**9], *LABELS[1:]], "1000000000"),
    "a vector": ([[NAMED, [0.0, 1.0]], *LABELS[1:]], NAMED),
    "a fraction": ([[NAMED, 0.5], *LABELS[1:]], NAMED),
    "true": ([[NAMED, True], *LABELS[1:]], NAMED),
    "no name": ([[0, 0], *LABELS[1:]], r"\[0, 0\]"),
    "a dict": ({NAMED: 0}, "dataset.json"),
    "a number": (7, "dataset.json"),
}


@pytest.mark.parametrize("labels, named", [*SLIPS.values(), *REFUSED.values()], ids=[*SLIPS, *REFUSED])
def test_labels_that_do_not_fit_are_refused_by_name(written, labels, named):
    with pytest.raises(InputError, match=named):
        open_source(written(with_labels(labels)))


@pytest.mark.parametrize("labels, named", SLIPS.values(), ids=SLIPS)
def test_labels_that_do_not_fit_are_left_out_where_that_is_asked_for(written, labels, named):
    source = open_source(written(with_labels(labels)), skip_bad=True)
    assert list(source.skipped) == [named]
    assert source.class_names == ("0", "1", "2") and len(source) == (5 if named == "gone.png" else 4)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"labels"', "null", '{"label": []}', "[" * 100_000, "\udcff"])
def test_a_damaged_labels_file_is_refused(written, text):
    with pytest.raises(InputError, match="dataset.json"):
        open_source(written({**EDM, "dataset.json": text.encode("utf8", "surrogateescape")}))


def hostile(name, **fields):
    member = zipfile.ZipInfo(name)
    for field, value in fields.items():
        setattr(member, field, value)
    return member


HOSTILE = {
    "up": (hostile("../evil.png"), "leads out"),
    "up, further down": (hostile("a/../../evil.png"), "leads out"),
    "absolute": (hostile("/etc/evil.png"), "leads out"),
    "a drive": (hostile("C:/evil.png"), "leads out"),
    "backslashes": (hostile("..\\evil.png"), "backslash"),
    "a link": (hostile("evil.png", external_attr=0o120777 << 16), "link"),
    "encrypted": (hostile("evil.png", flag_bits=1), "encrypted"),
    "not an image": (hostile("evil.sh"), "not an image"),
}


@pytest.mark.parametrize("member, reason", HOSTILE.values(), ids=HOSTILE)
def test_hostile_members_are_refused_by_name_or_left_out(tmp_path, member, reason):
    spec = write_zip(tmp_path / "set.zip", [("good.png", png(1)), (member, png(2))])
    if reason == "encrypted":  # which the library does not write, but in the directory of the zip
        content = bytearray((tmp_path / "set.zip").read_bytes())
        content[content.rindex(b"PK\x01\x02") + 8] |= 1
        (tmp_path / "set.zip").write_bytes(content)
    with pytest.raises(InputError, match=f"evil.*{reason}"):
        open_source(spec)
    source = open_source(spec, skip_bad=True)
    assert values(source) == [1] and len(source.skipped) == 1
    assert list(tmp_path.parent.glob("evil*")) == []


def test_a_name_with_nul_is_refused(tmp_path):
    spec = write_zip(tmp_path / "set.zip", {"good.png": png(1), "evil.sh#.png": png(2)})
    content = (tmp_path / "set.zip").read_bytes().replace(b"evil.sh#.png", b"evil.sh\0.png")
    (tmp_path / "set.zip").write_bytes(content)
    with pytest.raises(InputError, match="NUL"):
        open_source(spec)
    assert values(open_source(spec, skip_bad=True)) == [1]


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_members_of_one_name_are_refused(tmp_path):
    spec = write_zip(tmp_path / "set.zip", [("a.png", png(1)), ("b.png", png(2)), ("a.png", png(3))])
    with pytest.raises(InputError, match="a.png.*twice"):
        open_source(spec)


@pytest.mark.parametrize("length", [0, 10, 200, -1, -30])
def test_a_truncated_zip_is_refused(tmp_path, length):
    spec = write_zip(tmp_path / "set.zip", EDM)
    (tmp_path / "set.zip").write_bytes((tmp_path / "set.zip").read_bytes()[:length])
    with pytest.raises(InputError, match=r"set\.zip cannot be read as a zip"):
        open_source(spec)


def test_what_is_no_zip_is_refused(tmp_path):
    (tmp_path / "set.zip").write_bytes(b"no zip at all")
    for path in ("set.zip", "none.zip", ""):
        with pytest.raises(InputError, match="cannot be read as a zip" if path == "set.zip" else "there is no zip"):
            open_source(f"zip:{tmp_path}/{path}")


def test_a_damaged_member_is_refused_by_name(tmp_path):
    spec = write_zip(tmp_path / "set.zip", EDM)
    content = bytearray((tmp_path / "set.zip").read_bytes())
    content[content.index(b"IDAT") + 6] ^= 1
    (tmp_path / "set.zip").write_bytes(content)
    with pytest.raises(BadImage, match=f"{NAMED}.*CRC"):
        open_source(spec).read(0, FORM)


def test_a_bomb_is_refused_by_name_before_it_unpacks(tmp_path, monkeypatch):
    file = io.BytesIO()
    Image.new("RGB", (1000, 1000)).save(file, "bmp")
    spec = write_zip(tmp_path / "set.zip", {"bomb.bmp": file.getvalue()}, zipfile.ZIP_DEFLATED)
    assert (tmp_path / "set.zip").stat().st_size * 900 < len(file.getvalue())
    monkeypatch.setattr(zipfile.ZipFile, "read", None)
    with pytest.raises(BadImage, match="bomb.bmp"):
        open_source(spec).read(0, FORM)


def test_a_member_that_promises_too_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("rdm_jax.data.readers.MAX_BYTES", 50)
    spec = write_zip(tmp_path / "set.zip", EDM)
    with pytest.raises(BadImage, match=f"{NAMED}.*at most 50"):
        open_source(spec).read(0, FORM)


def test_a_zip_without_images_is_refused(tmp_path):
    with pytest.raises(InputError, match="no image"):
        open_source(write_zip(tmp_path / "set.zip", with_labels(None, {})))
    with pytest.raises(InputError, match="no image"):
        open_source(write_zip(tmp_path / "empty.zip", {}))


@pytest.mark.parametrize("top", ["", "photos/", "my/photos/"])
def test_a_folder_about_all_others_in_a_zip_is_no_class(tmp_path, top):
    spec = write_zip(tmp_path / "set.zip", {f"{top}a/1.png": png(1), f"{top}b/2.png": png(2)})
    assert open_source(spec).class_names == ("a", "b")


def test_a_zipped_folder_of_images_has_no_classes(tmp_path):
    source = open_source(write_zip(tmp_path / "set.zip", {"photos/1.png": png(1), "photos/2.png": png(2)}))
    assert (source.class_names, values(source)) == ((), [1, 2])


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("impostor", ["a.png", "a.png#.sh"])
def test_nothing_is_read_in_place_of_a_member_that_was_left_out(tmp_path, impostor):
    spec = write_zip(tmp_path / "set.zip", [("a.png", png(1)), ("b.png", png(2)), (impostor, png(3))])
    content = (tmp_path / "set.zip").read_bytes().replace(b"a.png#.sh", b"a.png\0.sh")
    (tmp_path / "set.zip").write_bytes(content)
    source = open_source(spec, skip_bad=True)
    assert values(source) == ([2] if impostor == "a.png" else [1, 2])


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_damaged_member_of_any_compression_is_refused_by_name(tmp_path, compression):
    noise = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(noise, "bmp")
    spec = write_zip(tmp_path / "set.zip", {"a.bmp": noise.getvalue()}, compression)
    assert open_source(spec).read(0, FORM).shape == (4, 4, 3)
    content = bytearray((tmp_path / "set.zip").read_bytes())
    for place in range(60, 6000, 50):
        content[place] ^= 255
    (tmp_path / "set.zip").write_bytes(content)
    with pytest.raises(BadImage, match="a.bmp"):
        open_source(spec).read(0, FORM)


def test_a_zip_that_changes_while_it_is_read_is_noticed(tmp_path):
    spec = write_zip(tmp_path / "set.zip", {"a.png": png(1), "b.png": png(2)})
    sent = pickle.dumps(open_source(spec))
    write_zip(tmp_path / "set.zip", {"b.png": png(1), "a.png": png(2) + b"more"})
    with pytest.raises(InputError, match="has changed since it was listed"):
        pickle.loads(sent).read(0, FORM)


def test_a_labels_file_that_is_a_bomb_is_refused_unread(tmp_path):
    text = '{"labels": [' + "[]," * 2**20 + "[]]}"
    spec = write_zip(tmp_path / "set.zip", {**EDM, "dataset.json": text}, zipfile.ZIP_DEFLATED)
    with pytest.raises(InputError, match="dataset.json .* at most"):
        open_source(spec)
