"""State dicts in both of torch's formats: exact tensors; anything else is refused."""

import os
import pickle
import zipfile
from collections import OrderedDict

import jax.numpy as jnp
import numpy as np
import pytest

from rdm_jax.interop import torch_files
from rdm_jax.interop.torch_files import open_state_dict
from rdm_jax.runtime.errors import InputError
from tests.support.hostile_pickles import DANGEROUS, HOSTILE, IDS, VIEWS, named, text
from tests.support.published_files import FOUR, write_pkl
from tests.support.refusals import of_changed, peak_of
from tests.support.torch_standins import (
    Call,
    Named,
    Storage,
    View,
    dump_legacy,
    dump_pt,
    legacy_header,
    state_dict,
)

DUMPS = {"zip": dump_pt, "legacy": dump_legacy}
FORMATS = pytest.mark.parametrize("kind", DUMPS)


def read(path):
    with open_state_dict(path) as tensors:
        return {name: tensor.read() for name, tensor in tensors.items()}


def refuse(path, *words):
    """Asserts that the file is refused by an error with a remedy, which has these words in it."""
    with pytest.raises(InputError) as caught, open_state_dict(path):
        pass
    message = str(caught.value)
    assert message.startswith(f"{path} cannot be used (")
    assert caught.value.problem.endswith(")")
    assert caught.value.fix == "Use a state_dict as torch.save writes it."
    assert "\n" not in message
    assert len(message) < 700
    assert "TypeCheckError" not in message  # types are only checked in tests
    for word in words:
        assert word in message, message


def example(dtype=np.float32) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    tensors = {
        f"conv{i}.weight": np.asarray(random.normal(size=(i, 3)), dtype) for i in range(12)
    }  # conv0's is empty
    tensors["bn.turned"] = np.asarray(random.normal(size=(2, 3, 4)), dtype).transpose(2, 0, 1)
    return tensors | {"bn.scale": np.asarray(2.5, dtype), "bn.num_batches_tracked": np.asarray(7)}


# Files that are read.


@FORMATS
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64, jnp.bfloat16])
def test_round_trip(kind, dtype, tmp_path):
    tensors = example(dtype)
    for state in (
        state_dict(tensors),
        dict(state_dict(tensors)),
        {name: View.of(array) for name, array in tensors.items()},
    ):
        DUMPS[kind](tmp_path / "a", state)
        found = read(tmp_path / "a")
        assert [*found] == [*tensors]
        for name, array in tensors.items():
            assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
            assert found[name].flags.c_contiguous
            np.testing.assert_array_equal(found[name], array)


@FORMATS
def test_shared_tensors(kind, tmp_path):
    storage = Storage(np.arange(10, dtype=np.float32))
    state = {
        "all": View(storage, 0, (2, 5), (5, 1)),
        "part": View(storage, 1, (2,), (4,)),
        "other": View.of(np.zeros(9)),
    }
    state |= {"tied": state["part"]}
    DUMPS[kind](tmp_path / "a", state)
    found = read(tmp_path / "a")
    assert found["part"].tolist() == found["tied"].tolist() == [1, 5]
    # But not so many that a small file fills the memory.
    state |= {f"copy{i}": View(storage, 0, (10,), (1,)) for i in range(1_000)}
    DUMPS[kind](tmp_path / "a", state)
    with open_state_dict(tmp_path / "a"):
        pass
    big = Storage(np.zeros(20_000, np.float32))
    DUMPS[kind](tmp_path / "a", {f"copy{i}": View(big, 0, (20_000,), (1,)) for i in range(10)})
    refuse(tmp_path / "a", "its tensors have 800000 bytes in all, in a file of ")


@FORMATS
def test_tensors_stay_in_the_file(kind, tmp_path):
    DUMPS[kind](
        tmp_path / "a", {"big": View.of(np.zeros(2**22, np.float32)), "small": View.of(FOUR)}
    )
    with open_state_dict(tmp_path / "a") as tensors:
        small = tensors["small"]
        assert peak_of(small.read) < 2**18
    assert peak_of(lambda: open_state_dict(tmp_path / "a").__enter__()) < 2**21
    with pytest.raises(ValueError, match="with open_state_dict"):
        small.read()


# Objects that are not state dicts.


@FORMATS
def test_other_objects(kind, tmp_path, monkeypatch):
    for objects, words in (
        ([View.of(FOUR)], "it holds a list"),
        (View.of(FOUR), "it holds a View"),
        (5, "it holds an int"),
        ({1: View.of(FOUR)}, "a tensor with an int as its name"),
        ({"a": {"b": View.of(FOUR)}}, "tensor 'a' is damaged: it is a dict"),
        ({"a": None}, "tensor 'a' is damaged: it is a NoneType"),
        ({"epoch": 3}, "tensor 'epoch' is damaged: it is an int"),
        ({"a": Storage(FOUR)}, "tensor 'a' is damaged: it is a storage of numbers"),
        ({"a": View(5, 0, (1,), (1,))}, "its storage is an int"),
    ):
        DUMPS[kind](tmp_path / "a", objects)
        refuse(tmp_path / "a", words)
    monkeypatch.setattr(torch_files, "MAX_PARTS", 10)
    DUMPS[kind](tmp_path / "a", {str(i): View.of(FOUR) for i in range(11)})
    refuse(tmp_path / "a", "not a dict of up to 10 tensors")


@FORMATS
@pytest.mark.parametrize("what", VIEWS)
def test_views(kind, what, tmp_path):
    numbers, words = VIEWS[what]
    DUMPS[kind](tmp_path / "a", {"weight": View(Storage(FOUR), *numbers)})
    refuse(tmp_path / "a", "tensor 'weight' is damaged", words)


def refuse_everywhere(tmp_path, body: bytes, *words):
    """As the pickle of a zip file, and as each of the five of the format before zip."""
    pickled = b"\x80\x02" + body + b"."
    dump_pt(tmp_path / "a", {}, pickled=pickled)
    refuse(tmp_path / "a", *words)
    for number in range(5):
        dump_legacy(
            tmp_path / "a", {}, {n: pickled if n == number else b"" for n in range(number, 5)}
        )
        refuse(tmp_path / "a", *words)


@pytest.mark.parametrize("name", DANGEROUS, ids=lambda name: ".".join(name)[:30].strip())
def test_names(name, canary, tmp_path):
    refuse_everywhere(
        tmp_path, named(*name) + text(f"open({str(canary)!r}, 'w')") + b"\x85R", "name"
    )


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_pickles(what, tmp_path):
    body, words = HOSTILE[what]
    assert peak_of(lambda: refuse_everywhere(tmp_path, body, words)) < 2**25


@pytest.mark.parametrize("what", IDS)
def test_persistent_ids(what, tmp_path):
    refuse_everywhere(tmp_path, IDS[what][0] + b"Q", *IDS[what][1:])


@FORMATS
def test_foreign_objects(kind, canary, tmp_path):
    runs = Call(Named("os", "system"), (f"touch {canary}",))
    DUMPS[kind](tmp_path / "a", {"weight": View.of(FOUR), "more": runs})
    refuse(tmp_path / "a", "it names 'os.system'")
    state = state_dict({"weight": FOUR})
    state._metadata[""]["version"] = runs
    DUMPS[kind](tmp_path / "a", state)
    refuse(tmp_path / "a", "it names 'os.system'")


def test_attributes_beside_items(tmp_path):
    for more, words in (
        ({"_metadata": {}, "__class__": "a"}, "the state of a dict"),
        ({"__dict__": {}}, "the state of a dict"),
        ([], "the state of a dict from a list"),
        ((None, {"_metadata": {}}), "the state of a dict from a tuple"),
    ):
        dump_legacy(tmp_path / "a", Call(Named("collections", "OrderedDict"), (), more))
        refuse(tmp_path / "a", words)
    refuse_everywhere(
        tmp_path,
        named("torch", "FloatStorage") + b"}" + text("_metadata") + b"}sb",
        "the state of 'torch.Fl",
    )
    refuse_everywhere(tmp_path, b"}b", "it is damaged: IndexError")


# Damaged files.


def test_inconsistent_format_before_zip(tmp_path):
    state = {
        "a": View(Storage(FOUR, key="1"), 0, (4,), (1,)),
        "b": View(Storage(FOUR, key="2"), 0, (4,), (1,)),
    }

    def check(*words, state=state, **changed):
        numbers = ("magic", "protocol", "system", "state", "keys")
        dump_legacy(
            tmp_path / "a",
            state,
            {numbers.index(name): pickle.dumps(value, 2) for name, value in changed.items()},
        )
        refuse(tmp_path / "a", *words)

    for keys in (
        [],
        ["1"],
        ["1", "2", "2"],
        ["1", "1"],
        ["1", "2", "3"],
        ["1", 2],
        {"1": 1, "2": 2},
        None,
        "12",
    ):
        check("its list of storages", keys=keys)
    check("torch's format 1001", magic=1)
    check("torch's format 1001", magic=[])
    check("torch's format 1001", protocol=1000)
    check("not little-endian", system={"little_endian": False})
    check("not little-endian", system=[])
    fewer, other = (
        View(Storage(FOUR[:3], key="1"), 0, (3,), (1,)),
        View(Storage(FOUR.astype(np.int32), key="1"), 0, (4,), (1,)),
    )
    check("two storages '1'", state=state | {"c": fewer})
    check("two storages '1'", state=state | {"c": other})
    check(
        "16 bytes for 4 numbers of float32",
        state=state | {"a": View(Storage(FOUR[:3], 4, "1"), 0, (3,), (1,))},
    )
    check("ends early", state=state | {"a": View(Storage(FOUR, 2**40, "1"), 0, (4,), (1,))})
    dump_legacy(tmp_path / "a", state)
    content = (tmp_path / "a").read_bytes()
    for changed, words in (
        (content[:-1], "15 bytes for 4 numbers"),
        (content + b"\0", "17 bytes for 4 numbers"),
    ):
        (tmp_path / "a").write_bytes(changed)
        refuse(tmp_path / "a", words)


def test_inconsistent_zip_files(tmp_path):
    dump_pt(tmp_path / "good", state_dict({"a": FOUR}))
    with zipfile.ZipFile(tmp_path / "good") as good:
        members = {name: good.read(name) for name in good.namelist()}
    for changed, compression, words in (
        ({"archive/data/0": b"\0" * 15}, zipfile.ZIP_STORED, "15 bytes for 4 numbers of float32"),
        ({"archive/byteorder": b"big"}, zipfile.ZIP_STORED, "byteorder"),
        ({"other/data.pkl": b""}, zipfile.ZIP_STORED, "2 members '*/data.pkl'"),
        ({}, zipfile.ZIP_DEFLATED, "is compressed"),
    ):
        with zipfile.ZipFile(tmp_path / "bad", "w", compression) as bad:
            for name, data in (members | changed).items():
                bad.writestr(name, data)
        refuse(tmp_path / "bad", words)


def test_other_files(tmp_path):
    refuse(tmp_path / "missing", "No such file")
    refuse(tmp_path, "a directory")
    os.mkfifo(tmp_path / "pipe")
    refuse(tmp_path / "pipe", "it is not a plain file")
    for content in (b"", b"\x80", b"PK\x03\x04", b"\x93NUMPY", b"cos\nsystem\n.", b"\0" * 1000):
        (tmp_path / "a").write_bytes(content)
        refuse(tmp_path / "a")
    write_pkl(tmp_path / "a", "EDMPrecond", {}, {"model.w": FOUR})
    refuse(tmp_path / "a")
    (tmp_path / "a").write_bytes(legacy_header(Storage(FOUR)) + FOUR.tobytes())
    refuse(tmp_path / "a", "it holds a storage of numbers")
    with pytest.raises(KeyError):  # the caller's own
        dump_pt(tmp_path / "a", state_dict({"a": FOUR}))
        with open_state_dict(tmp_path / "a") as tensors:
            tensors["b"]


@FORMATS
def test_truncation(kind, tmp_path):
    DUMPS[kind](
        tmp_path / "a",
        state_dict({"conv.weight": np.arange(500, dtype=np.float32), "conv.bias": FOUR}),
    )
    content = (tmp_path / "a").read_bytes()
    for length in range(0, len(content), 31):
        (tmp_path / "a").write_bytes(content[:length])
        refuse(tmp_path / "a")


@FORMATS
def test_flipped_bytes(kind, tmp_path):
    """A zip file has checksums: what is read is right. The older format is not larger."""
    state = OrderedDict(
        {"conv.weight": np.arange(20, dtype=np.float32).reshape(4, 5), "conv.bias": FOUR}
    )
    DUMPS[kind](tmp_path / "a", state_dict(state))
    size, random = (tmp_path / "a").stat().st_size, np.random.default_rng(1)
    read_of = of_changed(tmp_path / "a", random.integers(0, size, 150), random, read)
    for found in read_of:
        assert found is None or sum(array.nbytes for array in found.values()) <= size
        if found is not None and kind == "zip":
            assert {name: array.tolist() for name, array in found.items()} == {
                name: a.tolist() for name, a in state.items()
            }
    assert read_of.count(None) > 40
