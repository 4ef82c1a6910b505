"""What is in checkpoints, as NumPy arrays, and whether they are sound."""

from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from rdm_jax.checkpoints.checksums import damage


def read_tree(item: Path) -> dict:
    """The nested dict of arrays in one item of a checkpoint, on whatever devices it was saved."""
    with ocp.PyTreeCheckpointer() as reader:
        restore_args = jax.tree.map(
            lambda _: ocp.RestoreArgs(restore_type=np.ndarray),
            reader.metadata(item).item_metadata.tree,
        )
        return reader.restore(item, ocp.args.PyTreeRestore(restore_args=restore_args))


def read_arrays(item: Path) -> dict[str, np.ndarray]:
    """The same by the paths of its leaves."""
    leaves = jax.tree_util.tree_flatten_with_path(read_tree(item))[0]
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def state(workdir: Path, step: int = 20, stage: str = "stage1") -> dict[str, np.ndarray]:
    """All arrays of a checkpoint: parameters, EMA, moments and counters."""
    folder = workdir / stage / "checkpoints" / str(step)
    return {
        f"{item}{name}": value
        for item in ("train", "ema")
        for name, value in read_arrays(folder / item).items()
    }


def assert_equal(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    """Asserts that two states are equal bit for bit."""
    assert one.keys() == other.keys() and len(one) > 60
    for name, value in one.items():
        assert value.dtype == other[name].dtype and value.tobytes() == other[name].tobytes(), name


def steps(workdir: Path, stage: str = "stage1", sound: bool = True) -> list[int]:
    """The steps that are listed; with `sound`, asserts that none of them is damaged."""
    folders = [
        folder for folder in (workdir / stage / "checkpoints").glob("*") if folder.name.isdecimal()
    ]
    found = {folder.name: damage(folder) if sound else "" for folder in folders}
    assert not any(found.values()), found
    return sorted(map(int, found))
