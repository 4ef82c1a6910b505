"""Trees of arrays as Orbax saves, restores and describes them."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.lazy import lazy_import

ocp = lazy_import("orbax.checkpoint")

# Orbax gathers a file in memory before it writes it: 2 GiB by default.
FILE_BYTES = 16 * 2**20


def items(state: Any) -> dict[str, Any]:
    """The items that a training state is saved as."""
    train = {k: v for k, v in vars(state).items() if k not in ("ema", "averages")}
    found = {"ema": state.ema, "train": train}
    return found | {"averages": state.averages} if state.averages else found


def save_args(tree: Any) -> Any:
    """Returns the `PyTreeSave` arguments of a tree."""
    return ocp.args.PyTreeSave(tree, ocdbt_target_data_file_size=FILE_BYTES)


def restore_args(abstract: Any, *, part: bool = False) -> Any:
    """Returns the `PyTreeRestore` arguments of a tree of shapes, dtypes and shardings.

    Args:
      part: read only the leaves that `abstract` has.
    """
    return ocp.args.PyTreeRestore(
        abstract,
        restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
        partial_restore=part,
    )


def spread(abstract: Any) -> Any:
    """Returns an abstract tree whose leaves are shared out among all devices of their meshes.

    So read, a checkpoint is read once by all hosts together, not once by each that is to have the
    whole: `gathered` then sends it from device to device. Leaves without an axis that the number of
    devices divides stay as they are.

    A process that is alone reads each file once anyway: it gets `abstract` as it is.
    """
    if jax.process_count() == 1:
        return abstract

    def of_leaf(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        if not isinstance(leaf.sharding, NamedSharding) or leaf.sharding.mesh.size == 1:
            return leaf
        mesh = leaf.sharding.mesh
        fitting = [axis for axis, length in enumerate(leaf.shape) if length % mesh.size == 0]
        if not fitting:
            return leaf
        axis = max(fitting, key=lambda axis: leaf.shape[axis])
        spec = PartitionSpec(*[None] * axis, mesh.axis_names)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(of_leaf, abstract)


def gathered(tree: Any, abstract: Any) -> Any:
    """Returns the arrays of a tree with the shardings of an abstract one."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    if jax.tree.map(lambda x: x.sharding, tree) == shardings:
        return tree
    # In one program: devices could meet in several ones in another order.
    return jax.jit(lambda t: t, out_shardings=shardings)(tree)


def unwrapped(metadata: Any) -> Any:
    """Returns an item's tree of shapes and dtypes, which older versions of Orbax wrap."""
    return metadata.tree if hasattr(metadata, "tree") else metadata


def check_same_shapes(saved: Any, wanted: Any, *, dtypes: bool, where: str) -> None:
    """Refuses a saved tree of another network.

    Args:
      dtypes: compare dtypes too.
      where: the checkpoint, for the message.

    Raises:
      InputError: names the first leaf that differs.
    """
    saved_shapes = _shapes(saved, dtypes)
    wanted_shapes = _shapes(wanted, dtypes)
    for path in sorted(saved_shapes.keys() | wanted_shapes.keys()):
        had, needs = saved_shapes.get(path, "nothing"), wanted_shapes.get(path, "nothing")
        if had != needs:
            raise InputError(
                f"{where} is of another network ({path} is {had} there, {needs} here)",
                "Use the config that it was trained with.",
            )


def _shapes(tree: Any, dtypes: bool) -> dict[str, str]:
    """Returns the shape (and dtype) of every leaf by its path.

    Orbax returns nested dicts and lists only, so that keys, indices and names are spelled alike.
    """
    shapes = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        dtype = f"{jnp.dtype(leaf.dtype)} " if dtypes else ""
        shapes["/".join(map(_key, path))] = f"{dtype}{tuple(leaf.shape)}"
    return shapes


def _key(entry: Any) -> str:
    """Returns an entry of a tree's path as Orbax spells it."""
    for attribute in ("key", "idx", "name"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry)
