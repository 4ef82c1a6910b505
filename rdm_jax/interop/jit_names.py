"""Names and layouts of the parameters of JiT's published networks (arXiv 2511.13720), and ours."""

import re

import numpy as np

ParamPath = tuple[str, ...]

TOP = {
    "time0": "t_embedder.mlp.0",
    "time1": "t_embedder.mlp.2",
    "class_table": "y_embedder.embedding_table.weight",
    "embed0": "x_embedder.proj1",
    "embed1": "x_embedder.proj2",
    "class_positions": "in_context_posemb",
    "out_norm": "final_layer.norm_final",
    "out_modulation": "final_layer.adaLN_modulation.1",
    "out": "final_layer.linear",
}
INNER = {"attention": "attn", "modulation": "adaLN_modulation.1"}
LEAVES = {"kernel": "weight", "scale": "weight"}
EMBEDDINGS = ("x_embedder.proj1.weight", "x_embedder.proj2.weight")


def original_name(path: ParamPath) -> str:
    """The original's name of a parameter at a path such as ('block0', 'attention', 'qkv', 'bias').

    It stands after 'net.' in the published files.
    """
    first, *rest = path
    if match := re.fullmatch(r"block(\d+)", first):
        parts = ["blocks", match.group(1)]
    else:
        parts = [TOP[first]]
    return ".".join([*parts, *(INNER.get(part) or LEAVES.get(part, part) for part in rest)])


def to_ours(name: str, array: np.ndarray) -> np.ndarray:
    """The original's layout to ours: (out, in) to (in, out); kernels of patches to matrices."""
    if name in EMBEDDINGS:  # OIHW to (rows, columns, channels; out)
        return array.transpose(2, 3, 1, 0).reshape(-1, array.shape[0])
    if name == TOP["class_positions"]:
        return array[0]
    return array.T if name.endswith("weight") and array.ndim == 2 and not _is_table(name) else array


def to_theirs(name: str, array: np.ndarray, patch: int) -> np.ndarray:
    """The inverse of `to_ours`, for patches of this side."""
    if name in EMBEDDINGS:
        side = patch if name == EMBEDDINGS[0] else 1
        return array.reshape(side, side, -1, array.shape[-1]).transpose(3, 2, 0, 1)
    if name == TOP["class_positions"]:
        return array[None]
    return array.T if name.endswith("weight") and array.ndim == 2 and not _is_table(name) else array


def _is_table(name: str) -> bool:
    return name == TOP["class_table"]
