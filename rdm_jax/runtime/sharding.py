"""Where arrays live: a mesh of devices with an axis for data and one for sharded parameters; one
device is a mesh too."""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

DATA, FSDP = AXES = ("data", "fsdp")


def make_mesh(data: int = -1, fsdp: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of all devices, of every process.

    Args:
      data: size of the axis along which batches alone are cut; -1 for the rest.
      fsdp: size of the axis along which parameters, their average and the optimizer's state are
        cut, too; -1 for the rest.
      devices: instead of all that jax finds; of a topology, for what is compiled ahead of time.

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh(
        mesh_sizes(data, fsdp, len(devices)), AXES, (AxisType.Auto,) * 2, devices=devices
    )


def mesh_sizes(data: int, fsdp: int, count: int) -> tuple[int, int]:
    """The sizes of both axes for so many devices. Raises ValueError where they do not multiply to
    that."""
    if data == -1 and fsdp > 0:
        data = count // fsdp
    elif fsdp == -1 and data > 0:
        fsdp = count // data
    if data < 1 or fsdp < 1 or data * fsdp != count:
        raise ValueError(f"{data} x {fsdp} is not {count} devices")
    return data, fsdp


def local_mesh() -> Mesh:
    """This process's devices alone: sampling and evaluating need no word between processes."""
    return make_mesh(devices=jax.local_devices())


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batched(mesh: Mesh) -> NamedSharding:
    """The leading axis cut over all devices."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """Puts this process's part of a batch (a tree of NumPy arrays) on its devices, as parts of
    global arrays."""
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(batched(mesh), x), batch)


def whole(shape: tuple[int, ...], size: int) -> PartitionSpec:
    """Every device has all of it."""
    return PartitionSpec()


def largest_axis(shape: tuple[int, ...], size: int) -> PartitionSpec:
    """Cut along the largest axis that `size` divides, the last of equal ones; whole where there is
    none."""
    fitting = [axis for axis, length in enumerate(shape) if length % size == 0]
    if size == 1 or not fitting:
        return PartitionSpec()
    chosen = max(fitting, key=lambda axis: (shape[axis], axis))
    return PartitionSpec(*(FSDP if axis == chosen else None for axis in range(chosen + 1)))


# How an array of the training state is cut over the axis 'fsdp': the first rule whose pattern is
# found in its path holds. Biases and the scales of normalisation are small: fetching them would
# take longer than they save.
RULES = ((r"\bkernel\b", largest_axis), (r"", whole))


def by_rules(abstract: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Gives every leaf of an abstract tree (a training state, parameters) its sharding by
    `RULES`."""

    def with_sharding(path, leaf):
        rule = next(
            rule for pattern, rule in RULES if re.search(pattern, jax.tree_util.keystr(path))
        )
        spec = rule(leaf.shape, mesh.shape[FSDP])
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(with_sharding, abstract)


def shardings(tree: Any) -> Any:
    """The sharding of every leaf of a tree of arrays or abstract ones."""
    return jax.tree.map(lambda x: x.sharding, tree)


def fetcher(abstract: Any, dtypes: Any) -> Callable[[Any], Any]:
    """What makes parameters that are cut over the devices whole again, for one use.

    Without it the compiler would choose for each convolution whether to move parameters or images.
    Gradients come back summed and cut.

    Args:
      abstract: of the parameters, with their shardings.
      dtypes: what each is computed with, as which what is cut travels.
    """

    def of_leaf(leaf: jax.ShapeDtypeStruct, dtype: jnp.dtype) -> Callable[[Array], Array]:
        cut = leaf.sharding
        if cut.is_fully_replicated:
            return lambda x: x

        @jax.custom_vjp
        def fetch(x):
            # Told twice where the narrow copy is, so that it is what travels.
            narrow = jax.lax.with_sharding_constraint(x.astype(dtype), cut)
            return jax.lax.with_sharding_constraint(narrow, replicated(cut.mesh))

        def backward(_, gradient):
            return (jax.lax.with_sharding_constraint(gradient, cut).astype(leaf.dtype),)

        fetch.defvjp(lambda x: (fetch(x), None), backward)
        return fetch

    fetchers = jax.tree.map(of_leaf, abstract, dtypes)
    return lambda params: jax.tree.map(lambda fetch, x: fetch(x), fetchers, params)


_COLLECTIVE = re.compile(
    r"= ([^%\n]*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?\((?:.*?channel_id=(\d+))?"
)
_ARRAY = re.compile(r"\b(pred|[a-z]+)(\d*)\w*\[([\d,]*)\]")


def collectives(compiled: jax.stages.Compiled) -> dict[str, int]:
    """Bytes, a device and a run of the program, of the results of each kind of collective operation
    in it.

    What is in a loop is counted once.
    """
    found: dict[str, int] = {}
    # TPUs' compiler writes an operation twice where it is spread over others: it is known by its
    # channel.
    operations = {
        channel or number: rest
        for number, (*rest, channel) in enumerate(_COLLECTIVE.findall(compiled.as_text()))
    }
    for shapes, kind, started in operations.values():
        arrays = [
            array for array in _ARRAY.findall(shapes) if array[2] or not started
        ]  # no counters
        arrays = (
            arrays[len(arrays) // 2 :] if started and kind != "all-reduce" else arrays
        )  # the operands come first
        sizes = (
            int(bits or 8) // 8 * math.prod(map(int, filter(None, shape.split(","))))
            for _, bits, shape in arrays
        )
        found[kind] = found.get(kind, 0) + sum(sizes)
    return found


def on_this_process(tree: Any, mesh: Mesh) -> Any:
    """A tree of arrays that lie on the devices of all processes, whole on every device of `mesh`, a
    mesh of this one's.

    All processes must call it together: what is cut is fetched from where it is.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, replicated(mesh))
    global_mesh = next(x.sharding.mesh for x in jax.tree.leaves(tree))
    gathered = jax.jit(lambda t: t, out_shardings=replicated(global_mesh))(tree)
    return jax.tree.map(
        lambda x: jax.device_put(np.asarray(x.addressable_data(0)), replicated(mesh)), gathered
    )
