"""Where arrays live: a mesh of all devices, one device being a mesh too."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def data_mesh() -> Mesh:
    """All devices along one axis, 'data'."""
    return Mesh(np.array(jax.devices()), ("data",))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device: parameters, moments, averages."""
    return NamedSharding(mesh, PartitionSpec())


def batched(mesh: Mesh) -> NamedSharding:
    """The leading axis cut over the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """Puts this process's part of a batch (a tree of NumPy arrays) on its devices, as parts of global arrays."""
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(batched(mesh), x), batch)
