"""Published files: exact tensors and settings; nothing in them is run."""

import pickle
import struct
from collections import OrderedDict

import jax.numpy as jnp
import numpy as np
import pytest

from rdm_jax.interop import torch_files
from rdm_jax.interop.torch_files import open_torch
from tests.support.hostile_pickles import VIEWS
from tests.support.published_files import (
    DUMPS,
    FOUR,
    SETTINGS,
    WRITERS,
    network,
    write_pkl,
    write_pt,
)
from tests.support.refusals import peak_of, refuse, with_tensor
from tests.support.torch_standins import (
    Bytes,
    Call,
    Module,
    ModuleDict,
    Named,
    Storage,
    View,
    dump_legacy,
    dump_pkl,
    dump_pt,
    legacy_header,
    state_of,
)

FORMATS = pytest.mark.parametrize("kind", ["pkl", "pt"])


def example(dtype=np.float32) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    shapes = {
        "model.map_noise.freqs": (8,),
        "model.map_layer0.weight": (8, 6),
        "model.enc.64x64_block0.conv0.weight": (4, 3, 3, 3),
    }
    shapes |= {
        "model.dec.8x8_in0.conv0.resample_filter": (1, 1, 2, 2),
        "model.scale": (),
        "model.big": (200, 100),
    }
    tensors = {name: np.asarray(random.normal(size=shape), dtype) for name, shape in shapes.items()}
    tensors["model.turned"] = np.asarray(random.normal(size=(2, 3, 4)), dtype).transpose(2, 0, 1)
    return tensors | {"model.empty": np.zeros((0, 3), dtype)}


def read(path, key="ema"):
    with open_torch(path, key) as original:
        return {name: tensor.read() for name, tensor in original.tensors.items()}


# Files that are read.


def test_training_states_before_zip(tmp_path):
    """Equal to the zip format; truncated files are refused."""
    tensors = example()
    for name, dump in (("new.pt", dump_pt), ("old.pt", dump_legacy)):
        write_pt(
            tmp_path / name,
            "EDMPrecond",
            SETTINGS,
            tensors,
            dump=dump,
            net=network("EDMPrecond", SETTINGS, tensors),
        )
    with open_torch(tmp_path / "old.pt") as old, open_torch(tmp_path / "new.pt") as new:
        assert (old.class_name, old.settings) == (new.class_name, new.settings)
        assert [*old.tensors] == [*new.tensors]
    for key in ("ema", "net"):
        for name, array in read(tmp_path / "old.pt", key).items():
            np.testing.assert_array_equal(array, tensors[name])
    whole = (tmp_path / "old.pt").read_bytes()
    for length in (3, 20, 200, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.pt").write_bytes(whole[:length])
        refuse(tmp_path / "cut.pt")
    dump_legacy(tmp_path / "other.pt", [View.of(FOUR)])
    refuse(tmp_path / "other.pt", "it holds a list instead of a dict of networks")


@FORMATS
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64, jnp.bfloat16])
def test_round_trip(kind, dtype, tmp_path):
    tensors = example(dtype)
    WRITERS[kind](tmp_path / "misnamed.zip", "EDMPrecond", SETTINGS, tensors)
    with open_torch(tmp_path / "misnamed.zip") as original:
        assert original.class_name == "EDMPrecond"
        assert original.settings == SETTINGS
        assert type(original.settings["sigma_data"]) is float
        assert type(original.settings["levels"]) is int
        assert type(original.settings["fast"]) is bool
        assert sorted(original.tensors) == sorted(tensors)
        for name, tensor in original.tensors.items():
            found = tensor.read()
            assert tensor.shape == found.shape == tensors[name].shape
            assert tensor.dtype == found.dtype == dtype
            assert found.flags.c_contiguous
            assert found.flags.writeable
            assert found.flags.owndata
            np.testing.assert_array_equal(found, tensors[name])


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_protocols(protocol, tmp_path):
    tensors = {
        "model.enc.a.num_batches_tracked": np.int64(7),
        "model.enc.a.weight": np.zeros(4, np.float16),
    }
    write_pkl(tmp_path / "a", "VPPrecond", SETTINGS, tensors, protocol=min(protocol, 5))
    found = read(tmp_path / "a")
    assert {name: (value.dtype, value.tolist()) for name, value in found.items()} == {
        "model.enc.a.num_batches_tracked": (np.int64, 7),
        "model.enc.a.weight": (np.float16, [0.0] * 4),
    }


@FORMATS
def test_other_types(kind, tmp_path):
    tensors = {
        f"m.{dtype}": np.asarray([1, 0, 3], dtype)
        for dtype in ("int8", "uint8", "int16", "int32", "int64", "bool")
    }
    WRITERS[kind](tmp_path / "a", "EDMPrecond", {}, tensors)
    found = read(tmp_path / "a")
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        np.testing.assert_array_equal(found[name], tensor)


def test_other_networks_of_a_training_state(tmp_path):
    net = network("EDMPrecond", {"img_channels": 3}, {"model.w": np.ones(2, np.float32)})
    write_pt(tmp_path / "a", "EDMPrecond", {}, example(), net=net)
    assert [*read(tmp_path / "a", "net")] == ["model.w"]
    refuse(tmp_path / "a", "'best'", "'ema', 'optimizer_state', 'step', 'net'", key="best")
    refuse(tmp_path / "a", "its 'step' is an int instead of a network", key="step")


@FORMATS
def test_parts_of_one_storage(kind, tmp_path):
    storage = Storage(np.arange(10, dtype=np.float32))
    parts = {
        "a": View(storage, 0, (4,), (1,)),
        "b": View(storage, 4, (2, 2), (1, 3)),
        "one": View(storage, 9, (1, 1), (0, 99)),
    }
    DUMPS[kind](
        tmp_path / "a",
        {"ema": Module("A", state_of(parts, {}, {}, _init_args=(), _init_kwargs={}))},
    )
    found = read(tmp_path / "a")
    assert found["a"].tolist() == [0, 1, 2, 3]
    assert found["b"].tolist() == [[4, 7], [5, 8]]
    assert found["one"].tolist() == [[9]]


@FORMATS
def test_module_source_is_not_run(kind, canary, tmp_path):
    WRITERS[kind](
        tmp_path / "a",
        "EDMPrecond",
        {},
        example(),
        module_src=f"open({str(canary)!r}, 'w').close()\n",
    )
    assert len(read(tmp_path / "a")) == len(example())


@FORMATS
def test_tensors_stay_in_the_file(kind, tmp_path):
    tensors = {f"m.{i}": np.zeros(2**20, np.float32) for i in range(4)}
    WRITERS[kind](tmp_path / "a", "EDMPrecond", {}, tensors | {"m.small": np.ones(3, np.float32)})
    read_peak = peak_of(lambda: read(tmp_path / "a"))
    with open_torch(tmp_path / "a") as original:
        small = original.tensors["m.small"]
        assert peak_of(lambda: small.read()) < 2**18
    assert peak_of(lambda: open_torch(tmp_path / "a").__enter__()) < 2**21 < 2**24 < read_peak
    with pytest.raises(ValueError, match="with open_torch"):
        small.read()


# Invalid tensors and storages.


@FORMATS
@pytest.mark.parametrize("what", VIEWS)
def test_views(kind, what, tmp_path):
    numbers, words = VIEWS[what]
    DUMPS[kind](tmp_path / "a", {"ema": with_tensor(View(Storage(FOUR), *numbers))})
    refuse(tmp_path / "a", "tensor 'weight' is damaged", words)


@FORMATS
@pytest.mark.parametrize(
    "value", [5, "a", {}, Storage(FOUR), Call(Named("collections", "OrderedDict"), ())]
)
def test_values_that_are_not_tensors(kind, value, tmp_path):
    DUMPS[kind](tmp_path / "a", {"ema": with_tensor(value)})
    refuse(tmp_path / "a", "tensor 'weight' is damaged")
    DUMPS[kind](tmp_path / "a", {"ema": with_tensor(View(5, 0, (1,), (1,)))})
    refuse(tmp_path / "a", "its storage is an int")


@FORMATS
def test_overlapping_tensors(kind, tmp_path):
    storage = Storage(FOUR)
    first = View(storage, 0, (3,), (1,))
    for second in (View(storage, 2, (2,), (1,)), View(storage, 1, (1,), (1,)), first):
        state = state_of({"first": first}, {"second": second}, {}, _init_args=(), _init_kwargs={})
        DUMPS[kind](tmp_path / "a", {"ema": Module("A", state)})
        refuse(tmp_path / "a", "'first'", "'second'", "overlap")


def embedded(*parts: bytes) -> View:
    return View(Call(Named("torch.storage", "_load_from_bytes"), (Bytes([*parts]),)), 0, (4,), (1,))


def test_embedded_storages(tmp_path):
    header, numbers = legacy_header(Storage(FOUR)), FOUR.tobytes()
    magic = pickle.dumps(0x1950A86A20F9469CFC6C, 2)
    one_key, two_keys = (pickle.dumps(["93884253521904"] * n, 2) for n in (1, 2))
    assert one_key in header
    for view, words in {
        embedded(header, numbers[:-1]): "15 bytes for 4 numbers of float32",
        embedded(header, numbers, b"\0"): "17 bytes for 4 numbers of float32",
        embedded(header): "0 bytes for 4 numbers",
        embedded(header[:-1]): "ends early",
        embedded(header[:-8], struct.pack("<q", -1), numbers): "16 bytes for 4 numbers",
        embedded(header[:-8], struct.pack("<q", 2**62), numbers): "16 bytes for 4 numbers",
        embedded(header.replace(magic, pickle.dumps(1, 2)), numbers): "format 1001",
        embedded(header.replace(magic, pickle.dumps([], 2)), numbers): "format 1001",
        embedded(
            header.replace(b"little_endian\x71\x02\x88", b"little_endian\x71\x02\x89"), numbers
        ): "little-endian",
        embedded(header.replace(one_key, two_keys), numbers): "exactly once",
        embedded(header.replace(one_key, pickle.dumps(["other"], 2)), numbers): "exactly once",
        embedded(b""): "ends early",
        embedded(b"\x80\x02" + b"N" * 5000): "too much",
        View(Storage(FOUR, numel=5), 0, (5,), (1,)): "16 bytes for 5 numbers",
        View(Storage(FOUR, numel=2**40), 0, (5,), (1,)): "16 bytes for",
    }.items():
        dump_pkl(tmp_path / "a", {"ema": with_tensor(view)})
        refuse(tmp_path / "a", "tensor 'weight' is damaged", words)


# Invalid modules and settings.


@FORMATS
def test_modules(kind, tmp_path):
    def check(root, *words):
        DUMPS[kind](tmp_path / "a", {"ema": root})
        refuse(tmp_path / "a", *words)

    def outermost(modules, **more):
        return Module(
            "A", state_of({}, {}, modules, **({"_init_args": (), "_init_kwargs": {}} | more))
        )

    inside = {}
    circle = ModuleDict(state_of({}, {}, inside))
    inside["again"] = circle
    check(outermost({"one": circle}), "'one.again' is in it twice")
    shared = ModuleDict(state_of({}, {}, {}))
    for _ in range(25):  # 2^25 modules, if one believed it
        shared = ModuleDict(state_of({}, {}, {"a": shared, "b": shared}))
    check(outermost({"one": shared}), "is in it twice")
    meta_shared = Module("B", state_of({}, {}, {}))
    meta_state = state_of({}, {}, {"a": meta_shared})
    for _ in range(6):
        meta_state = state_of({}, {}, {"a": ModuleDict(meta_state), "b": ModuleDict(meta_state)})
    check(outermost(meta_state["_modules"]), "is in it twice")
    deep = ModuleDict(state_of({}, {}, {}))
    for _ in range(40):
        deep = ModuleDict(state_of({}, {}, {"a": deep}))
    check(outermost({"one": deep}), "more than 32 nested")
    check(outermost({"one": 5}), "'one'", "an int")
    check(outermost({"one": View.of(FOUR)}), "'one'", "a View")
    check(outermost({"a.b": shared}), "'a.b'", "_modules")
    check(outermost({5: shared}), "an int", "_modules")
    check(outermost({"": shared}), "''", "_modules")
    check(outermost({"a" * 101: shared}), "'aaaa", "_modules")
    check(outermost({"one": Module("B", {"_parameters": {}, "_buffers": {}})}), "'one'", "_modules")
    check(
        outermost({"one": Module("B", {"_parameters": [], "_buffers": {}})}), "'one'", "_parameters"
    )
    check(outermost({"one": Module(5, {})}), "'one'")
    check(outermost({"one": Module("B", [])}), "'one'")
    check(
        outermost(
            {
                "one": Call(
                    Named("torch_utils.persistence", "_reconstruct_persistent_obj"),
                    ({"type": "function"},),
                )
            }
        ),
        "'one'",
    )
    twice = state_of({"w": View.of(FOUR)}, {"w": View.of(FOUR)}, {}, _init_args=(), _init_kwargs={})
    check(Module("A", twice), "two tensors 'w'")
    for root in (5, "ema", None, shared, View.of(FOUR), OrderedDict()):
        check(root, "'ema'", "instead of a network")


@FORMATS
def test_settings(kind, tmp_path):
    def check(root, *words):
        DUMPS[kind](tmp_path / "a", {"ema": root})
        refuse(tmp_path / "a", *words)

    def made(settings, arguments=()):
        return Module("A", state_of({}, {}, {}, _init_args=arguments, _init_kwargs=settings))

    check(made({}, (64,)), "settings")
    check(made({}, None), "settings")
    check(made([]), "settings")
    check(Module("A", state_of({}, {}, {})), "settings")
    for value, words in (
        (b"abc", "a Region"),
        ({1}, "a Set"),
        (View.of(FOUR), "a View"),
        (Named("torch", "FloatStorage"), "'torch."),
    ):
        check(made({"a": [value]}), words, "among its settings")
    check(made({"a": {1: 2}}), "names that are not strings")
    circle = []
    circle.append(circle)
    check(made({"a": circle}), "nested")
    shared = []
    for _ in range(30):
        shared = [shared] * 10
    check(made({"a": shared}), "more than 20000 settings")


@FORMATS
def test_number_of_parts(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(torch_files, "MAX_PARTS", 10)
    WRITERS[kind](tmp_path / "a", "A", {}, {f"m{i}.w": FOUR for i in range(6)})
    refuse(tmp_path / "a", "more than 10 modules and tensors")
