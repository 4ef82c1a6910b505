"""The devices that a network is traced for: they choose between implementations."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array

from rdm_jax.runtime import sharding

_mesh: contextvars.ContextVar[Mesh | None] = contextvars.ContextVar("mesh", default=None)


@contextlib.contextmanager
def compiling_for(mesh: Mesh) -> Iterator[None]:
    """Traces within are for this mesh, whose devices need not exist here.

    Its arrays of images are sharded over all its devices (`sharding.batched`). Without it, traces
    are for one local device.
    """
    token = _mesh.set(mesh)
    try:
        yield
    finally:
        _mesh.reset(token)


def device() -> Any:
    """The `jax.Device` that is traced for, the first of several equal ones."""
    mesh = _mesh.get()
    return jax.local_devices()[0] if mesh is None else mesh.devices.flat[0]


def per_device(function: Callable[..., Array], shared: int = 0) -> Callable[..., Array]:
    """Runs a function of arrays with leading axis b on each device's share of the images.

    For kernels, which the compiler cannot partition. A batch that the devices do not divide is not
    split: each device computes all of it.

    Args:
      function: of one array of images, or more.
      shared: its last arguments that every device needs whole.
    """
    mesh = _mesh.get()
    if mesh is None or mesh.size == 1:
        return function
    spec = sharding.batched(mesh).spec

    def run(*arrays: Array) -> Array:
        if len(arrays[0]) % mesh.size:
            return function(*arrays)
        specs = (spec,) * (len(arrays) - shared) + (PartitionSpec(),) * shared
        return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=spec, check_vma=False)(
            *arrays
        )

    return run
