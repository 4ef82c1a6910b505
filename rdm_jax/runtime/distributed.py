"""Several processes, on several hosts or on one: how they find one another, and who does what is to
be done once."""

import contextlib
import functools
import hashlib
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from rdm_jax.runtime import sharding
from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.signals import StopOnSignal
from rdm_jax.runtime.waiting import SECONDS_TO_JOIN, waiting

Result = TypeVar("Result")
SECONDS_TO_LEAVE = 5
# In what jax, Gloo and gRPC say where a process that they talk to is gone.
GONE = ("coordination service", "closed by peer", "reset by peer", "another task", "heartbeat")


def join(
    coordinator: str, processes: int | None, process: int | None, timeout: int = SECONDS_TO_JOIN
) -> None:
    """Makes this process one of several, before jax looks for devices.

    Args:
      coordinator: 'host:port' of the first process, '' to ask the surroundings (what jax knows:
        Cloud TPU, SLURM, Open MPI, Kubernetes; elsewhere the process stays alone), or 'none' to
        stay alone.
      processes, process: how many there are, and which this is, from 0; with 'host:port' only.
      timeout: seconds to wait for the others, after which this process ends with status 2 and a
        line that says so.

    Raises:
      InputError: the three do not go together, or the others cannot be reached.
    """
    given = ":" in coordinator
    if (
        (not given and coordinator not in ("", "none"))
        or given != (processes is not None)
        or given != (process is not None)
    ):
        found = f"--coordinator={coordinator!r}, --processes={processes}, --process={process}"
        raise InputError(
            f"{found} do not go together; a host:port with both numbers, or none of the three, would do."
        )
    if given and not 0 <= process < processes:
        raise InputError(
            f"--process={process} of --processes={processes} is none of them; 0 to {processes - 1} would do."
        )
    if coordinator == "none" or (not given and _is_alone()):
        return
    try:
        with waiting(timeout):
            # jax itself would give up later, as XLA ends the process then.
            jax.distributed.initialize(
                coordinator or None, processes, process, initialization_timeout=timeout + 300
            )
    except Exception as error:
        # jax found no cluster, or half of one (a SLURM job without srun); or it works already, by
        # itself.
        alone = ("coordinator_address", "must be called before")
        if not given and (
            isinstance(error, KeyError) or any(reason in str(error) for reason in alone)
        ):
            return
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        where = coordinator or "those that the surroundings name"
        raise InputError(
            f"the other processes ({where}) cannot be reached ({reason}); --coordinator=none would do alone."
        ) from error


def _is_alone() -> bool:
    """Whether the surroundings say that there is nobody to join, though jax might wait, or ask a
    server that is not there."""
    if "JAX_COORDINATOR_ADDRESS" in os.environ or "MEGASCALE_COORDINATOR_ADDRESS" in os.environ:
        return False
    tpu_hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "")  # one on Colab, among others
    tasks = os.environ.get("OMPI_COMM_WORLD_SIZE") or os.environ.get(
        "SLURM_NTASKS"
    )  # as jax does, Open MPI's first
    return tasks == "1" or bool(tpu_hosts and "," not in tpu_hosts)


def is_primary() -> bool:
    """Whether this process is the one that writes pictures, logs and results."""
    return jax.process_index() == 0


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error means that another process of the run has ended, without which this one
    cannot go on."""
    return jax.distributed.is_initialized() and any(words in str(error) for words in GONE)


def exit_with(main: Callable[[], int]) -> NoReturn:
    """Ends the process with the status that `main` returns.

    Where something went wrong, jax's usual end would wait for the other processes, and they perhaps
    for this one. The first process goes last: with it goes what tells the others of each other, and
      they would end before they have said why.
    """
    try:
        status = main()
    except BaseException:
        if not jax.distributed.is_initialized():
            raise
        traceback.print_exc()
        status = 1
    if status and jax.distributed.is_initialized():
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(
                OSError, ValueError, AttributeError
            ):  # its disk is full, or it is closed
                stream.flush()
        if is_primary():
            time.sleep(SECONDS_TO_LEAVE)
        os._exit(status)
    sys.exit(status)


def check_same(what: str, value: str) -> None:
    """Refuses to go on where processes do not agree. Raises InputError in all of them."""
    digest = int.from_bytes(hashlib.sha256(value.encode()).digest()[:4], "little", signed=True)
    if len(set(allgather(np.int32(digest)).tolist())) > 1:
        raise InputError(
            f"{what} is not the same for every process; files and folders that all hosts share would do."
        )


def allgather(tree: Any) -> Any:
    """The arrays of every process, stacked along a new first axis (NumPy); all must call it
    together, with the same shapes."""
    if jax.process_count() == 1:
        return jax.tree.map(lambda x: np.asarray(x)[None], tree)
    return multihost_utils.process_allgather(jax.tree.map(np.asarray, tree))


def wait_for_all(what: str) -> None:
    """Returns once every process has come here; `what` they have done is the same word
    everywhere."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


@contextlib.contextmanager
def raise_together() -> Iterator[None]:
    """A part that every process goes through: where it fails in one, it fails in all, and none
    waits for another for ever.

    Raises:
      InputError: it has failed in another process, which says why.
    """
    failed = True
    try:
        yield
        failed = False
    finally:
        somewhere = allgather(np.int32(failed)).any()
    if somewhere:
        raise InputError("another process has failed; what would do there would do here.")


def primary_first(function: Callable[[], Result]) -> Result:
    """Calls `function` in the first process, and in the others after it: they find done what is
    done once, such as files.

    Raises:
      InputError: it has failed in another process.
    """
    for turn in (True, False):
        with raise_together():
            if is_primary() == turn:
                result = function()
    return result


class StopOfAll:
    """By which all processes learn, at the same turn of a loop, that one of them was told to stop.

    Every process must go through as many turns as the others. Where there are others, they learn it
    a turn late, so that nothing waits for the devices.
    """

    def __init__(self, stop: StopOnSignal):
        self._stop, self._before = stop, None

    def check(self) -> None:
        """A turn. Raises `Interrupted`."""
        if jax.process_count() == 1:
            return self._stop.check()
        before, self._before = self._before, largest(bool(self._stop.requested))
        if before is not None and int(before):
            raise self._stop.interruption


def largest(value: int) -> jax.Array:
    """The largest value that a process has: a scalar (int32) that the devices may still be
    computing.

    Every process must call it as often as the others, and then they read the same. Nothing waits
    before it is read.
    """
    mesh, of_all = _over_all()
    return of_all(sharding.put_batch(np.full(len(mesh.local_devices), value, np.int32), mesh))


def in_any_process(flag: bool) -> bool:
    """Whether the flag is set in any process, which all must ask together; waits for the answer."""
    return bool(int(largest(flag))) if jax.process_count() > 1 else flag


def from_primary(value: int) -> int:
    """What the first process has, in all: what one decides and all follow. All must call it
    together."""
    return int(allgather(np.int32(value))[0])


@functools.cache
def _over_all() -> tuple[Mesh, Callable[[jax.Array], jax.Array]]:
    mesh = sharding.make_mesh()
    return mesh, jax.jit(jnp.max, out_shardings=sharding.replicated(mesh))
