"""How arrays are sharded: over a mesh with an axis for data and one for parameters (FSDP).

A single device is a mesh too.
"""

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
    """Returns a mesh of all devices of all processes.

    Args:
      data: size of the axis over which only batches are sharded; -1 for all remaining devices.
      fsdp: size of the axis over which parameters, their EMA and the optimizer's state are
        sharded too; -1 for all remaining devices.
      devices: instead of all that JAX finds; those of a topology, to compile ahead of time.

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh(
        mesh_sizes(data, fsdp, len(devices)), AXES, (AxisType.Auto,) * 2, devices=devices
    )


def mesh_sizes(data: int, fsdp: int, count: int) -> tuple[int, int]:
    """Returns the sizes of both axes. Raises ValueError if their product is not `count`."""
    if data == -1 and fsdp > 0:
        data = count // fsdp
    elif fsdp == -1 and data > 0:
        fsdp = count // data
    if data < 1 or fsdp < 1 or data * fsdp != count:
        raise ValueError(f"{data} x {fsdp} is not {count} devices")
    return data, fsdp


def local_mesh() -> Mesh:
    """Returns a mesh of this process's devices: sampling and evaluation need no others."""
    return make_mesh(devices=jax.local_devices())


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that replicates an array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batched(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that splits the leading axis over all devices."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """Puts this process's part of a batch (a tree of NumPy arrays) on its devices.

    Returns:
      Global arrays, whose leading axis is sharded over all devices.
    """
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(batched(mesh), x), batch)


def batch_of(one: Any, size: int, mesh: Mesh) -> Any:
    """Returns the abstract batch of `size` images, sharded, of the shapes and dtypes of one."""

    def batch(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((size, *leaf.shape), leaf.dtype, sharding=batched(mesh))

    return jax.tree.map(batch, one)


def unsharded(shape: tuple[int, ...], size: int) -> PartitionSpec:
    """Replicates the array on every device."""
    return PartitionSpec()


def largest_axis(shape: tuple[int, ...], size: int) -> PartitionSpec:
    """Shards along the largest axis that `size` divides, the last of equal ones.

    Replicates the array if there is no such axis.
    """
    fitting = [axis for axis, length in enumerate(shape) if length % size == 0]
    if size == 1 or not fitting:
        return PartitionSpec()
    chosen = max(fitting, key=lambda axis: (shape[axis], axis))
    return PartitionSpec(*(FSDP if axis == chosen else None for axis in range(chosen + 1)))


# How an array of the training state is sharded over the axis 'fsdp': the first rule whose pattern
# is found in its path applies. Biases and normalisation scales are small: gathering them would
# cost more time than the memory is worth.
RULES = ((r"\bkernel\b", largest_axis), (r"", unsharded))


def by_rules(abstract: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Returns an abstract tree (of a training state, of parameters) with shardings by `RULES`."""

    def with_sharding(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
        rule = next(
            rule for pattern, rule in RULES if re.search(pattern, jax.tree_util.keystr(path))
        )
        spec = rule(leaf.shape, mesh.shape[FSDP])
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(with_sharding, abstract)


def shardings(tree: Any) -> Any:
    """Returns the sharding of every leaf of a tree of arrays or abstract arrays."""
    return jax.tree.map(lambda x: x.sharding, tree)


def fetcher(abstract: Any, dtypes: Any) -> Callable[[Any], Any]:
    """Returns a function that all-gathers sharded parameters for the forward pass.

    Their gradients come back summed and sharded. Without it the compiler would choose for each
    convolution whether to move parameters or images.

    Args:
      abstract: the parameters' shapes, dtypes and shardings.
      dtypes: the dtype that each is computed in; sharded parameters are cast to it before they are
        gathered.
    """

    def of_leaf(leaf: jax.ShapeDtypeStruct, dtype: jnp.dtype) -> Callable[[Array], Array]:
        sharded = leaf.sharding
        if sharded.is_fully_replicated:
            return lambda x: x

        @jax.custom_vjp
        def fetch(x: Array) -> Array:
            # Constrained before and after, so that the narrow copy is what is sent.
            narrow = jax.lax.with_sharding_constraint(x.astype(dtype), sharded)
            return jax.lax.with_sharding_constraint(narrow, replicated(sharded.mesh))

        def backward(_: None, gradient: Array) -> tuple[Array]:
            return (jax.lax.with_sharding_constraint(gradient, sharded).astype(leaf.dtype),)

        fetch.defvjp(lambda x: (fetch(x), None), backward)
        return fetch

    fetchers = jax.tree.map(of_leaf, abstract, dtypes)
    return lambda params: jax.tree.map(lambda fetch, x: fetch(x), fetchers, params)


_COLLECTIVE = re.compile(
    r"= ([^%\n]*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?"
    r"\((?:.*?channel_id=(\d+))?"
)
_ARRAY = re.compile(r"\b(pred|[a-z]+)(\d*)\w*\[([\d,]*)\]")


def collectives(compiled: jax.stages.Compiled) -> dict[str, int]:
    """Returns the bytes of the results of each kind of collective, per device and execution.

    Operations in a loop are counted once.
    """
    # The TPU compiler writes an operation twice if it is spread over others, with the same
    # channel id.
    operations = {
        channel or number: operation
        for number, (*operation, channel) in enumerate(
            _COLLECTIVE.findall(compiled.as_text() or "")
        )
    }
    found: dict[str, int] = {}
    for shapes, kind, started in operations.values():
        arrays = _ARRAY.findall(shapes)
        if started:
            arrays = [array for array in arrays if array[2]]  # scalars are counters
            if kind != "all-reduce":
                arrays = arrays[len(arrays) // 2 :]  # the operands come first
        found[kind] = found.get(kind, 0) + sum(_bytes(bits, shape) for _, bits, shape in arrays)
    return found


def _bytes(bits: str, shape: str) -> int:
    """Returns the size of an array from its dtype's bits and its shape in XLA's text."""
    return int(bits or 8) // 8 * math.prod(map(int, filter(None, shape.split(","))))


def on_this_process(tree: Any, mesh: Mesh) -> Any:
    """Replicates a tree of global arrays on every device of `mesh`, a mesh of this process.

    All processes must call it together, as shards are gathered from all devices.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, replicated(mesh))
    global_mesh = next(x.sharding.mesh for x in jax.tree.leaves(tree))
    gathered = jax.jit(lambda t: t, out_shardings=replicated(global_mesh))(tree)
    return jax.tree.map(
        lambda x: jax.device_put(np.asarray(x.addressable_data(0)), replicated(mesh)), gathered
    )
