"""Several processes, on several hosts or on one: how they find one another, and who does what is to be done once."""

from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from rdm_jax import sharding
from rdm_jax.errors import InputError

Result = TypeVar("Result")


def join(coordinator: str, processes: int | None, process: int | None) -> None:
    """Makes this process one of several, before jax looks for devices.

    Args:
      coordinator: 'host:port' of the first process, '' to ask the surroundings (Cloud TPU, SLURM, Open MPI and Kubernetes are
        known; elsewhere the process stays alone), or 'none' to stay alone.
      processes, process: how many there are, and which this is, from 0; with 'host:port' only.

    Raises:
      InputError: the three do not go together, or the others cannot be reached.
    """
    given = ":" in coordinator
    if (not given and coordinator not in ("", "none")) or given != (processes is not None) or given != (process is not None):
        found = f"--coordinator={coordinator!r}, --processes={processes}, --process={process}"
        raise InputError(f"{found} do not go together; a host:port with both numbers, or none of the three, would do.")
    if given and not 0 <= process < processes:
        raise InputError(f"--process={process} of --processes={processes} is none of them; 0 to {processes - 1} would do.")
    if coordinator == "none":
        return
    try:
        jax.distributed.initialize(coordinator or None, processes, process)
    except Exception as error:
        if not given and isinstance(error, ValueError) and "coordinator_address" in str(error):
            return  # jax found no cluster
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        where = coordinator or "those that the surroundings name"
        raise InputError(
            f"the other processes ({where}) cannot be reached ({reason}); --coordinator=none would do alone."
        ) from error


def is_first() -> bool:
    """Whether this process is the one that writes pictures, logs and results."""
    return jax.process_index() == 0


def wait_for_all(what: str) -> None:
    """Returns once every process has come here; `what` they have done is the same word everywhere."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def first_before_others(function: Callable[[], Result]) -> Result:
    """Calls `function` in the first process, and in the others after it: they find done what is done once, such as files.

    Raises:
      InputError: the first one's call has failed.
    """
    if jax.process_count() == 1:
        return function()
    if is_first():
        done = False
        try:
            result = function()
            done = True
        finally:
            multihost_utils.broadcast_one_to_all(np.int32(done))
        return result
    if not multihost_utils.broadcast_one_to_all(np.int32(0)):
        raise InputError("the first process has failed; what it says of it would do.")
    return function()


def any_process(flag: bool) -> jax.Array:
    """Whether the flag is set in any process: a scalar (int32) that the devices may still be computing.

    Every process must call it as often as the others, and then they read the same. Nothing waits before it is read.
    """
    mesh = sharding.make_mesh()
    flags = np.full(len(mesh.local_devices), flag, np.int32)
    return jax.jit(lambda x: x.max(), out_shardings=sharding.replicated(mesh))(sharding.put_batch(flags, mesh))
