"""JiT's files that are refused: other networks, foreign objects, damage."""

import argparse
import pickle

import numpy as np
import pytest

from rdm_jax.interop.byte_reader import ByteReader, Refused, Region
from rdm_jax.interop.inert_pickle import Namespace, Unpickler
from rdm_jax.interop.torch_files import open_torch
from rdm_jax.runtime.errors import InputError
from tests.support.jit_stages import ARGUMENTS, import_file
from tests.support.published_files import FOUR, write_pth
from tests.support.refusals import of_changed, refuse
from tests.support.torch_standins import Call, Named, View

BLOCK = "net.blocks.1.mlp.w3.bias"
REFUSED = {
    "model": ({"in_context_start": None}, {}, "model='JiT-Tiny' is unknown. Use 'JiT-B/16' or"),
    "model-type": ({"in_context_start": None, "model": [1]}, {}, "model=.1. is unknown"),
    "size": ({"model": "JiT-B/16"}, {}, "have patch=4, and their model='JiT-B/16' has 16"),
    "start": ({"in_context_start": True}, {}, "in_context_start=True cannot be used"),
    "late-start": ({"in_context_start": 3}, {}, "class_tokens_from=3 is not one of"),
    "attention": ({"attn_dropout": 0.1}, {}, "attn_dropout=0.1 cannot be used"),
    "dropout": ({"proj_dropout": 1.0}, {}, "proj_dropout=1.0 cannot be used"),
    "noise": ({"noise_scale": 0}, {}, "noise_scale=0 cannot be used"),
    "noise-text": ({"noise_scale": "1"}, {}, "noise_scale='1' cannot be used"),
    "not-a-number": ({"P_mean": float("nan")}, {}, "P_mean=nan cannot be used"),
    "resolution": ({"img_size": None}, {}, "settings have no 'img_size'"),
    "size-text": ({"img_size": "8"}, {}, "img_size='8' cannot be used"),
    "indivisible": ({"img_size": 10}, {}, r"resolution=\(10, 10\)"),
    "other-size": ({"img_size": 16}, {}, r"'net.pos_embed' of shape \(1, 4, 16\) .*\(1, 16, 16\)"),
    "classes": ({"class_num": 10}, {}, "class_num=10 cannot be used. Use 3"),
    "ratio": ({"mlp_ratio": 2.0}, {}, r"w12.bias' of shape \(84,\) instead of \(42,\)"),
    "missing": ({}, {BLOCK: None}, f"has no parameter '{BLOCK}'"),
    "missing-size": ({}, {"net.x_embedder.proj1.weight": None}, "no parameter 'net.x_embedder"),
    "unknown": ({}, {"net.register": FOUR}, "has a parameter 'net.register'"),
    "prefix": ({}, {"module.net.register": FOUR}, "has a parameter 'module.net.register'"),
    "shape": ({}, {BLOCK: FOUR}, r"mlp.w3.bias' of shape \(4,\) instead of \(16,\)"),
    "axes": ({}, {"net.in_context_posemb": FOUR}, r"'net.in_context_posemb' of shape \(4,\)"),
    "empty": (
        {},
        {"net.blocks.0.attn.q_norm.weight": FOUR[:0]},
        r"q_norm.weight' of shape \(0,\). Use 1 axes of 1 to",
    ),
    "skipped-block": ({}, {"net.blocks.9.norm1.weight": FOUR}, "'net.blocks.9.norm1.weight'"),
    "positions": (
        {},
        {"net.pos_embed": np.zeros((1, 4, 16), np.float32)},
        "other positions in 'net.pos_embed' than the published ones, by 1",
    ),
}


def changed(values, changes):
    return {name: value for name, value in (values | changes).items() if value is not None}


@pytest.mark.parametrize("case", REFUSED)
def test_import_refuses(case, small, tmp_path):
    arguments, tensors = small
    other_arguments, other_tensors, message = REFUSED[case]
    write_pth(
        tmp_path / "x.pth", changed(arguments, other_arguments), changed(tensors, other_tensors)
    )
    with pytest.raises(InputError, match=message) as refused:
        import_file(tmp_path / "x.pth", tmp_path / "run")
    assert refused.value.fix.startswith("Use ") and refused.value.fix.endswith(".")
    assert not (tmp_path / "run/config.json").exists()


def test_positions_are_compared_closely(small, tmp_path):
    arguments, tensors = small
    for error, accepted in ((5e-6, True), (1e-4, False), (np.nan, False)):
        moved = {"net.pos_embed": tensors["net.pos_embed"] + np.float32(error)}
        write_pth(tmp_path / "x.pth", arguments, tensors | moved)
        if accepted:
            import_file(tmp_path / "x.pth", tmp_path / "run")
        else:
            with pytest.raises(InputError, match="other positions"):
                import_file(tmp_path / "x.pth", tmp_path / "other")


def test_tables_of_rotations_are_ignored(small, tmp_path):
    arguments, tensors = small
    tables = {f"net.feat_rope{name}.freqs_cos": FOUR for name in ("", "_incontext")}
    write_pth(tmp_path / "x.pth", arguments, tensors | tables)
    import_file(tmp_path / "x.pth", tmp_path / "run")


# The training command's arguments, an object of a class.


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_namespace_is_read_as_data(protocol, tmp_path):
    values = {"model": "JiT-B/16", "lr": None, "betas": (0.9, 0.95), "words": ["a"]}
    for namespace, state in (
        (argparse.Namespace(**values), values),
        (argparse.Namespace(), None),
    ):
        (tmp_path / "a").write_bytes(pickle.dumps(namespace, protocol))
        with (tmp_path / "a").open("rb") as file:
            size = (tmp_path / "a").stat().st_size
            found = Unpickler(ByteReader(Region(file, 0, size))).load()
        assert type(found) is Namespace and found.state == state


@pytest.mark.parametrize("protocol", [0, 1])
def test_namespace_of_an_older_protocol_is_refused(protocol, tmp_path):
    """It would need `copyreg._reconstructor`, which makes an object of anything."""
    (tmp_path / "a").write_bytes(pickle.dumps(argparse.Namespace(model="a"), protocol))
    refused = pytest.raises(Refused, match="copy_reg._reconstructor|the pickle opcode PUT")
    with (tmp_path / "a").open("rb") as file, refused:
        Unpickler(ByteReader(Region(file, 0, 100))).load()


def test_foreign_objects_among_the_arguments(small, canary, tmp_path):
    arguments, tensors = small
    runs = Call(Named("os", "system"), (f"touch {canary}",))
    for value, words in (
        (runs, "it names 'os.system'"),
        (Named("torch", "FloatStorage"), "'torch.FloatStorage' among its settings"),
        (View.of(FOUR), "a View among its settings"),
        (argparse.Namespace(a=1), "a Namespace among its settings"),
        ({1: 2}, "settings with names that are not strings"),
    ):
        write_pth(tmp_path / "x.pth", arguments | {"model": value}, tensors)
        refuse(tmp_path / "x.pth", words)
    write_pth(tmp_path / "x.pth", arguments, tensors, optimizer={"state": runs})
    refuse(tmp_path / "x.pth", "it names 'os.system'")
    write_pth(tmp_path / "x.pth", arguments, tensors, args=runs)
    refuse(tmp_path / "x.pth", "it names 'os.system'")
    write_pth(tmp_path / "x.pth", arguments, tensors, args={"model": "JiT-B/16"})
    refuse(tmp_path / "x.pth", "it has no 'ema'")
    write_pth(tmp_path / "x.pth", arguments, tensors, model_ema1=[1])
    refuse(tmp_path / "x.pth", "its 'model_ema1' is a list instead of a state_dict")


def test_damaged_files(tmp_path):
    """A zip file has checksums: what is read is right."""
    tensors = {"net.w": np.arange(50, dtype=np.float32), "net.b": FOUR}
    write_pth(tmp_path / "a", ARGUMENTS, tensors)

    def read(path):
        with open_torch(path) as original:
            return original.settings, {n: t.read().tolist() for n, t in original.tensors.items()}

    good = read(tmp_path / "a")
    assert good == (ARGUMENTS, {name: array.tolist() for name, array in tensors.items()})
    content, random = (tmp_path / "a").read_bytes(), np.random.default_rng(0)
    found = of_changed(tmp_path / "a", random.integers(0, len(content), 150), random, read)
    assert all(each in (None, good) for each in found) and found.count(None) > 40
    for length in range(0, len(content), 101):
        (tmp_path / "a").write_bytes(content[:length])
        refuse(tmp_path / "a")
