"""Files that are not published ones, or are damaged or hostile, are refused."""

import os
import zipfile

import numpy as np
import pytest

from rdm_jax.interop.torch_files import open_torch
from rdm_jax.runtime.errors import InputError
from tests.support.published_files import FOUR, SETTINGS, WRITERS, write_pkl, write_pt
from tests.support.refusals import of_changed, refuse
from tests.support.torch_standins import Storage, dump_pkl, legacy_header

FORMATS = pytest.mark.parametrize("kind", ["pkl", "pt"])


def test_other_files(tmp_path):
    refuse(tmp_path / "missing", "No such file")
    refuse(tmp_path, "a directory")
    os.mkfifo(tmp_path / "pipe")
    refuse(tmp_path / "pipe", "it is not a plain file")
    for content in (
        b"",
        b"\x80",
        b"P",
        b"PK\x03\x04",
        b"PK\x05\x06" + b"\0" * 18,
        b"\x93NUMPY",
        b"cos\nsystem\n.",
        b"\0" * 1000,
    ):
        (tmp_path / "a").write_bytes(content)
        refuse(tmp_path / "a")
    np.savez(tmp_path / "a.npz", a=FOUR)
    refuse(tmp_path / "a.npz", "0 members '*/data.pkl'")
    (tmp_path / "old.pt").write_bytes(legacy_header(Storage(FOUR)) + FOUR.tobytes())
    refuse(tmp_path / "old.pt", "it holds a storage of numbers instead of a dict of networks")
    for objects in ([], {}, {"net": 1}):
        dump_pkl(tmp_path / "a", objects)
        refuse(tmp_path / "a")
    dump_pkl(tmp_path / "a", {f"key{i}" * 50: 1 for i in range(100)})
    refuse(tmp_path / "a", "it has no 'ema'")


def test_caller_errors_are_passed_on(tmp_path):
    write_pkl(tmp_path / "a", "A", {}, {"m.w": FOUR})
    with pytest.raises(KeyError), open_torch(tmp_path / "a") as original:
        original.tensors["other"]


@pytest.fixture
def archive(tmp_path):
    """(members of a good training state by name, a function that asserts a refusal of others)."""
    write_pt(tmp_path / "good.pt", "EDMPrecond", SETTINGS, {"model.w": FOUR, "model.b": FOUR})
    with zipfile.ZipFile(tmp_path / "good.pt") as good:
        members = {name: good.read(name) for name in good.namelist()}

    def check(members, *words, change=lambda archive: None, compression=zipfile.ZIP_STORED):
        with zipfile.ZipFile(tmp_path / "bad.pt", "w", compression) as bad:
            for name, content in members:
                bad.writestr(name, content)
            change(bad)
        refuse(tmp_path / "bad.pt", *words)

    return members, check


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_zip_files(archive, tmp_path):
    members, check = archive
    check(members.items(), "'archive/data.pkl' is compressed", compression=zipfile.ZIP_DEFLATED)
    bomb = zipfile.ZipInfo("archive/data/9")
    bomb.compress_type = zipfile.ZIP_DEFLATED
    check([*members.items(), (bomb, b"\0" * 10**6)], "'archive/data/9' is compressed")
    check([*members.items(), ("archive/data/0", b"")], "two members 'archive/data/0'")
    check([*members.items(), ("other/data.pkl", b"")], "2 members '*/data.pkl'")
    check(
        [item for item in members.items() if item[0] != "archive/data.pkl"],
        "0 members '*/data.pkl'",
    )
    check(
        [item for item in members.items() if item[0] != "archive/data/1"],
        "'model.b'",
        "no member",
        "'1'",
    )
    check(
        (members | {"archive/data/1": b"\0" * 15}).items(),
        "'model.b'",
        "15 bytes for 4 numbers of float32",
    )
    check((members | {"archive/data/1": b""}).items(), "0 bytes for 4")
    check((members | {"archive/byteorder": b"big"}).items(), "byteorder")
    check((members | {"archive/byteorder": b"bigger"}).items(), "byteorder")
    check((members | {"archive/data.pkl": b"\x80\x02cos\nsystem\n)R."}).items(), "'os.system'")
    check((members | {"archive/data.pkl": b""}).items(), "ends early")


def test_inconsistent_zip_directory(archive, tmp_path):
    members, check = archive

    def edit(name, **fields):
        def change(archive):
            for attribute, value in fields.items():
                setattr(archive.getinfo(name), attribute, value)

        return change

    check(
        members.items(), "'archive/data/0' is encrypted", change=edit("archive/data/0", flag_bits=1)
    )
    check(members.items(), "unknown flags", change=edit("archive/data/0", flag_bits=0x40))
    check(members.items(), "is compressed", change=edit("archive/data/0", file_size=10**9))
    check(
        members.items(), "overlap", change=edit("archive/data/0", file_size=100, compress_size=100)
    )
    far = edit("archive/version", file_size=10**9, compress_size=10**9)
    check(members.items(), "'archive/version' ends beyond", change=far)
    check(members.items(), "overlap", change=edit("archive/data/0", header_offset=0))
    check(members.items(), "no header", change=edit("archive/version", header_offset=10**9))

    # One member's local record inside another's data, both of them complete.
    with zipfile.ZipFile(tmp_path / "good.pt") as good:
        start, end = (good.getinfo(f"archive/data/{n}").header_offset for n in (1, 2))
    record = (tmp_path / "good.pt").read_bytes()[start:end]
    outer = [("archive/outer", record), *members.items()]
    check(outer, "overlap", change=edit("archive/data/1", header_offset=30 + len("archive/outer")))

    content = (tmp_path / "good.pt").read_bytes()
    (tmp_path / "renamed.pt").write_bytes(content.replace(b"archive/data/1", b"archive/data/7", 1))
    refuse(tmp_path / "renamed.pt", "'archive/data/1' has another name")


def test_checksums(tmp_path):
    write_pt(tmp_path / "a", "EDMPrecond", SETTINGS, {"model.w": FOUR})
    content = (tmp_path / "a").read_bytes()
    (tmp_path / "a").write_bytes(content.replace(FOUR.tobytes(), FOUR[::-1].tobytes()))
    with open_torch(tmp_path / "a") as original, pytest.raises(InputError, match="CRC-32"):
        original.tensors["model.w"].read()
    (tmp_path / "a").write_bytes(content.replace(b"img_resolution", b"img_resolutiom"))
    refuse(tmp_path / "a", "CRC-32")


@FORMATS
def test_shrinking_file(kind, tmp_path):
    WRITERS[kind](tmp_path / "a", "EDMPrecond", {}, {"model.w": np.zeros(100_000, np.float32)})
    with open_torch(tmp_path / "a") as original:
        os.truncate(tmp_path / "a", 100_000)
        with pytest.raises(InputError, match="cannot be used"):
            original.tensors["model.w"].read()


SMALL = {
    "model.enc.conv.weight": np.arange(20_000, dtype=np.float32).reshape(100, 200),
    "model.enc.conv.bias": FOUR,
}


@FORMATS
def test_truncation(kind, tmp_path):
    WRITERS[kind](tmp_path / "a", "EDMPrecond", SETTINGS, SMALL)
    content = (tmp_path / "a").read_bytes()
    for length in [
        *range(0, 3000, 59),
        *range(3000, len(content), 2999),
        *range(len(content) - 300, len(content), 13),
    ]:
        (tmp_path / "a").write_bytes(content[:length])
        refuse(tmp_path / "a")


@FORMATS
def test_flipped_bytes(kind, tmp_path):
    """A zip file has checksums: what is read is right. A snapshot has none: it is not larger."""
    WRITERS[kind](tmp_path / "a", "EDMPrecond", SETTINGS, SMALL)
    size, random = (tmp_path / "a").stat().st_size, np.random.default_rng(1)
    # Mostly in metadata, at both ends.
    places = [
        *random.integers(0, 3000, 80),
        *random.integers(size - 3000, size, 80),
        *random.integers(0, 80_000, 10),
    ]

    def read(path):
        with open_torch(path) as original:
            tensors = {name: tensor.read() for name, tensor in original.tensors.items()}
        return tensors, (original.class_name, original.settings)

    read_of = of_changed(tmp_path / "a", places, random, read)
    for tensors, about in filter(None, read_of):
        assert sum(array.nbytes for array in tensors.values()) <= size
        if kind == "pt":
            assert {name: array.tolist() for name, array in tensors.items()} == {
                name: a.tolist() for name, a in SMALL.items()
            }
            assert about == ("EDMPrecond", SETTINGS)
    assert read_of.count(None) > 40
