"""Files of networks as EDM's, RDM's and JiT's training write them, made without torch."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.torch_standins import (
    SOURCE,
    Module,
    ModuleDict,
    View,
    dump_pkl,
    dump_pt,
    state_dict,
    state_of,
)

BUFFERS = ("resample_filter", "freqs", "u", "num_batches_tracked")
ADAM = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0, "amsgrad": False}


def network(
    class_name: str, settings: dict, tensors: dict[str, np.ndarray], module_src: str = SOURCE
) -> Module:
    """Nested modules from full names of tensors; `enc` and `dec` are torch's ModuleDict."""
    tree: dict = {}
    for name, array in tensors.items():
        *path, last = name.split(".")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[last] = array

    def build(node: dict, name: str, **more) -> Module | ModuleDict:
        leaves = {key: array for key, array in node.items() if not isinstance(array, dict)}
        parameters = {key: View.of(array) for key, array in leaves.items() if key not in BUFFERS}
        buffers = {key: View.of(array, False) for key, array in leaves.items() if key in BUFFERS}
        if leaves:
            parameters = {"weight": None, "bias": None} | parameters
            buffers = {"resample_filter": None} | buffers
        children = {
            key: build(child, key) for key, child in node.items() if isinstance(child, dict)
        }
        if name in ("enc", "dec"):
            return ModuleDict(state_of({}, {}, children))
        # As in the original's blocks: numpy's numbers are among the settings of inner modules.
        own = {
            "_init_args": (8, 8),
            "_init_kwargs": {
                "init": {"init_mode": "kaiming_uniform", "init_weight": np.sqrt(1 / 3)}
            },
        }
        title = "UNetBlock" if children else "Conv2d"
        if name == "model":
            title = settings.get("model_type", "DhariwalUNet")
        return Module(
            more.pop("title", title),
            state_of(parameters, buffers, children, **(own | more)),
            module_src,
        )

    return build(tree, "", title=class_name, _init_args=(), _init_kwargs=settings)


def write_pkl(
    path: Path,
    class_name: str,
    settings: dict,
    tensors: dict[str, np.ndarray],
    *,
    protocol: int = 4,
    module_src: str = SOURCE,
    key: str = "ema",
    **extra,
) -> None:
    """A snapshot as EDM's training writes it; `extra` are further entries of its dict."""
    loss = Module(
        "EDMLoss",
        {"P_mean": -1.2, "P_std": 1.2, "sigma_data": 0.5, "_init_args": (), "_init_kwargs": {}},
        module_src,
    )
    objects = {
        key: network(class_name, settings, tensors, module_src),
        "loss_fn": loss,
        "augment_pipe": None,
    }
    dump_pkl(
        path,
        objects | {"dataset_kwargs": {"path": "data.zip", "use_labels": True}} | extra,
        protocol,
    )


def write_pt(
    path: Path,
    class_name: str,
    settings: dict,
    tensors: dict[str, np.ndarray],
    *,
    module_src: str = SOURCE,
    key: str = "ema",
    dump: Callable[[Path, Any], None] = dump_pt,
    **extra,
) -> None:
    """A training state as RDM's training writes it; `extra` are further entries of its dict.

    `dump=dump_legacy` writes it like an old torch, or like `_use_new_zipfile_serialization=False`.
    """
    adam = {
        0: {
            "step": View.of(np.float32(5), False),
            "exp_avg": View.of(np.zeros(4, np.float32), False),
        }
    }
    optimizer = {"state": adam, "param_groups": [ADAM | {"params": [0]}]}
    dump(
        path,
        {
            key: network(class_name, settings, tensors, module_src),
            "optimizer_state": optimizer,
            "step": 5,
        }
        | extra,
    )


def write_pth(
    path: Path,
    arguments: dict[str, Any],
    tensors: dict[str, np.ndarray],
    *,
    dump: Callable[[Path, Any], None] = dump_pt,
    **extra,
) -> None:
    """A training state as JiT's training writes it; `extra` replaces entries of its dict."""
    moment = View.of(np.zeros(4, np.float32), False)
    adam = {
        0: {"step": View.of(np.float32(5), False), "exp_avg": moment, "exp_avg_sq": moment},
        1: {"step": 5, "exp_avg": moment, "exp_avg_sq": moment},
    }
    group = ADAM | {"foreach": None, "fused": True, "params": [0, 1]}
    states = {name: state_dict(tensors) for name in ("model", "model_ema1", "model_ema2")}
    objects = {
        **states,
        "optimizer": {"state": adam, "param_groups": [group, group | {"params": []}]},
        "epoch": 599,
        "args": argparse.Namespace(**arguments),
    }
    dump(path, objects | extra)


FOUR = np.arange(4, dtype=np.float32)
SETTINGS = {
    "img_resolution": 64,
    "label_dim": 1000,
    "model_type": "DhariwalUNet",
    "sigma_max": float("inf"),
    "sigma_data": np.float64(0.5),
    "levels": np.int64(-3),
    "fast": np.bool_(True),
    "attn_resolutions": [32, 16, 8],
    "nested": {"a": (1, None, True, 2.5), "b": []},
}
WRITERS = {"pkl": write_pkl, "pt": write_pt}
DUMPS = {"pkl": dump_pkl, "pt": dump_pt}
