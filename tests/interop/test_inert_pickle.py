"""Hostile pickles, opcode by opcode: each is refused and runs nothing."""

import pickle
import pickletools

import pytest

from rdm_jax.interop.byte_reader import ByteReader, Refused, Region
from tests.support.hostile_pickles import DANGEROUS, HOSTILE, IDS, named, stack_named, text
from tests.support.refusals import peak_of, refuse, with_tensor
from tests.support.torch_standins import Bytes, Call, Named, View, dump_pkl, dump_pt

# Each is tried as a snapshot, as a zip file's data.pkl, and in a storage of a snapshot.


def refuse_everywhere(tmp_path, body: bytes, *words):
    pickled = b"\x80\x04" + body + b"."
    (tmp_path / "hostile.pkl").write_bytes(pickled)
    refuse(tmp_path / "hostile.pkl", *words)
    dump_pt(tmp_path / "hostile.pt", {}, pickled=pickled)
    refuse(tmp_path / "hostile.pt", *words)
    storage = Call(
        Named("torch.storage", "_load_from_bytes"),
        (Bytes([pickle.dumps(0x1950A86A20F9469CFC6C, 2), pickled]),),
    )
    dump_pkl(tmp_path / "inner.pkl", {"ema": with_tensor(View(storage, 0, (1,), (1,)))})
    refuse(tmp_path / "inner.pkl", "'weight'", *words)


@pytest.mark.parametrize("write", [named, stack_named])
@pytest.mark.parametrize("name", DANGEROUS, ids=lambda name: ".".join(name)[:30].strip())
def test_names(name, write, canary, tmp_path):
    command = f"open({str(canary)!r}, 'w')"
    body = write(*name) + text(command) + b"\x85R"
    if write is named and ("\n" in name[0] or len(name[0]) > 256):
        refuse_everywhere(tmp_path, body, "name")
    else:
        refuse_everywhere(tmp_path, body, "it names ", repr(".".join(name))[:80])


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_pickles(what, tmp_path):
    body, words = HOSTILE[what]
    assert peak_of(lambda: refuse_everywhere(tmp_path, body, words)) < 2**25


def test_deep(tmp_path):
    """Deeply nested values are refused, are not hashed, and can be freed."""
    view = named("torch._utils", "_rebuild_tensor_v2")
    for body, words in {
        b"})" + b"\x85" * 30_000 + b"Ns": "a dict with a tuple as a key",
        b"\x8f()" + b"\x85" * 30_000 + b"\x90": "a Set",
        view + b"q\x01N" + b"q\x00h\x01(h\x00NNNNNtR" * 3_000: "a View",
        b"]" + b"q\x00]h\x00a" * 10_000: "a list",
    }.items():
        (tmp_path / "a").write_bytes(b"\x80\x04}" + text("ema") + body + b"s.")
        refuse(tmp_path / "a", words)


KNOWN = """
    PROTO STOP MARK FRAME GLOBAL STACK_GLOBAL BINPERSID REDUCE NEWOBJ BUILD BINPUT LONG_BINPUT
    MEMOIZE BINGET LONG_BINGET NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT
    BINUNICODE SHORT_BINUNICODE BINUNICODE8 SHORT_BINBYTES BINBYTES BINBYTES8 EMPTY_TUPLE TUPLE
    TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS EMPTY_SET
    ADDITEMS
"""


@pytest.mark.parametrize(
    "opcode", [o for o in pickletools.opcodes if o.name not in KNOWN.split()], ids=lambda o: o.name
)
def test_opcodes(opcode, tmp_path):
    """INST, OBJ, EXT1 and all other opcodes that no network needs."""
    body = b"(" + opcode.code.encode("latin1") + b"os\nsystem\n" + text("a") * 3
    refuse_everywhere(tmp_path, body, f"the pickle opcode {opcode.name})" if opcode.name else "")


@pytest.mark.parametrize("what", IDS)
def test_persistent_ids(what, tmp_path):
    refuse_everywhere(tmp_path, IDS[what][0] + b"Q", *IDS[what][1:])


def test_budget(tmp_path):
    """One byte makes a dict of a hundred: data beside the tensors is limited."""
    (tmp_path / "a").write_bytes(b"}" * 100)
    with open(tmp_path / "a", "rb") as file:
        stream = ByteReader(Region(file, 0, 100), budget=33 * 10)
        for _ in range(10):
            stream.read(1)
        with pytest.raises(Refused, match="too much"):
            stream.read(1)
