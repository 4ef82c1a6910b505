"""Several processes, on several hosts or on one: how they join, agree and fail together."""

import contextlib
import functools
import hashlib
import itertools
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rdm_jax.runtime import mounts, sharding
from rdm_jax.runtime.console import log
from rdm_jax.runtime.errors import InputError, reason
from rdm_jax.runtime.signals import StopOnSignal
from rdm_jax.runtime.waiting import SECONDS_TO_JOIN, hears_preemption, meet, waiting

Result = TypeVar("Result")
SECONDS_TO_LEAVE = 5
SECONDS_TO_WAIT_FAILED = 600  # of a process that has failed, for those that are to know it
# Parts of the messages of JAX, Gloo and gRPC about a peer process that has ended.
LOST_PEER = ("coordination service", "closed by peer", "reset by peer", "another task", "heartbeat")
# Parts of JAX's messages if it finds no cluster, or is in use already.
NO_CLUSTER = ("coordinator_address", "must be called before")

_iterations = itertools.count()  # equal in all processes


def join(
    coordinator: str, processes: int | None, process: int | None, timeout: int = SECONDS_TO_JOIN
) -> None:
    """Makes this process one of several, before JAX looks for devices.

    Args:
      coordinator: 'host:port' of process 0; '' to detect a cluster from the environment (Cloud
        TPU, SLURM, Open MPI, Kubernetes), or run alone without one; 'none' to run alone.
      processes, process: their number, and the index of this one from 0; only with 'host:port'.
      timeout: seconds to wait for the others; then this process ends with status 2 and a message.

    Raises:
      InputError: the three do not go together, or the others cannot be reached.
    """
    explicit = ":" in coordinator
    _check_flags(coordinator, processes, process, explicit)
    if coordinator == "none" or (not explicit and _is_alone()):
        return
    try:
        with waiting(timeout):
            # JAX's own timeout must be later: when it expires, XLA aborts the process.
            jax.distributed.initialize(
                coordinator or None, processes, process, initialization_timeout=timeout + 300
            )
    except Exception as error:
        # JAX found no cluster or half of one (a SLURM job without srun), or is in use already.
        no_cluster = isinstance(error, KeyError) or any(part in str(error) for part in NO_CLUSTER)
        if not explicit and no_cluster:
            return
        message = (str(error).strip().splitlines() or [type(error).__name__])[0]
        where = coordinator or "named by the environment"
        raise InputError(
            f"the other processes ({where}) cannot be reached ({message})",
            "Pass --coordinator=none to run alone.",
        ) from error


def _check_flags(
    coordinator: str, processes: int | None, process: int | None, explicit: bool
) -> None:
    """Refuses values of --coordinator, --processes and --process that do not go together."""
    if not explicit and coordinator not in ("", "none"):
        raise InputError(
            f"--coordinator={coordinator!r} is not a host with a port",
            "Use host:port, or none to run alone.",
        )
    flags = f"--coordinator={coordinator!r}, --processes={processes}, --process={process}"
    if explicit and None in (processes, process):
        raise InputError(
            f"{flags} do not go together: host:port needs both numbers",
            "Pass --processes and --process too.",
        )
    if not explicit and (processes is not None or process is not None):
        raise InputError(
            f"{flags} do not go together: the numbers need a host:port",
            "Pass --coordinator=host:port, or none of the three.",
        )
    if processes is not None and process is not None and not 0 <= process < processes:
        raise InputError(
            f"--process={process} with --processes={processes} is out of range",
            f"Use 0 to {processes - 1}.",
        )


def _is_alone() -> bool:
    """Whether the environment says that there is no other process.

    Then JAX is not asked, as it might wait, or contact a server that does not exist.
    """
    if "JAX_COORDINATOR_ADDRESS" in os.environ or "MEGASCALE_COORDINATOR_ADDRESS" in os.environ:
        return False
    # Open MPI first, then SLURM, then TPUs, as in JAX: a variable that names one TPU host may come
    # from a process that found no TPU (`quiet_libtpu`) and started this one.
    tasks = os.environ.get("OMPI_COMM_WORLD_SIZE") or os.environ.get("SLURM_NTASKS")
    # Colab and Kaggle name one host, which need not be an address ("local").
    names = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")
    tpu_hosts = next((os.environ[name] for name in names if name in os.environ), "")
    return tasks == "1" if tasks else bool(tpu_hosts and "," not in tpu_hosts)


def is_primary() -> bool:
    """Whether this is process 0, which writes images, logs and results."""
    return jax.process_index() == 0


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error means that another process of the run, which this one needs, has ended."""
    return jax.distributed.is_initialized() and any(part in str(error) for part in LOST_PEER)


def exit_with(main: Callable[[], int]) -> NoReturn:
    """Ends the process with the status that `main` returns.

    After an error, JAX's own shutdown would wait for the other processes, and they perhaps for
    this one. Process 0 leaves last: it hosts the coordination service, without which the others
    would end before they have printed their errors.
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
            # Its disk may be full, or it may be closed or missing.
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()
        if is_primary():
            time.sleep(SECONDS_TO_LEAVE)
        os._exit(status)
    sys.exit(status)


def check_same(what: str, value: str) -> None:
    """Raises InputError in all processes unless `value` is the same in all of them."""
    digest = int.from_bytes(hashlib.sha256(value.encode()).digest()[:4], "little", signed=True)
    if len(set(allgather(np.int32(digest)).tolist())) > 1:
        raise InputError(
            f"{what} is not the same for every process",
            "Use files and folders shared by all hosts.",
        )


def allgather(tree: Any) -> Any:
    """Stacks the arrays of all processes along a new first axis (NumPy).

    All processes must call it together, with the same shapes.
    """
    if jax.process_count() == 1:
        return jax.tree.map(lambda x: np.asarray(x)[None], tree)
    return multihost_utils.process_allgather(jax.tree.map(np.asarray, tree))


def wait_for_all(what: str) -> None:
    """Waits until every process has called it; each sees the files of all then.

    Args:
      what: they do until then, for the log ('sample').

    Raises:
      InputError: it failed in another process.
      OSError: a bucket cannot be used.
    """
    if jax.process_count() == 1:
        return mounts.push()
    with raise_together(f"the other processes, which {what}"):
        mounts.push()
    with raise_together():
        mounts.pull()


@contextlib.contextmanager
def raise_together(waiting_for: str = "the other processes") -> Iterator[None]:
    """A context that all processes enter: if it fails in one, it fails in all, and none hangs.

    Args:
      waiting_for: what a process that is done with it waits for, as its log says each minute.

    Raises:
      InputError: it failed in another process, which prints the reason, or did not end in time.
    """
    try:
        yield
    except BaseException as error:
        if jax.process_count() > 1:
            _tell_failure(error, waiting_for)
        raise
    meet(waiting_for)
    if allgather(np.int32(False)).any():
        raise InputError("another process failed", "See its error message.")


def _tell_failure(error: BaseException, waiting_for: str) -> None:
    """Lets the others know in `raise_together`; whatever comes between, `error` is to be raised."""
    if isinstance(error, Exception):  # said now, as the others may come late or never
        log.error("this process failed (%s), and waits for %s", reason(error), waiting_for)
    with contextlib.suppress(Exception):
        meet(waiting_for, SECONDS_TO_WAIT_FAILED)
        allgather(np.int32(True))


def primary_first(does: str, function: Callable[[], Result]) -> Result:
    """Calls `function` in process 0, then in the others, which find its files in place.

    Args:
      does: what the function does, for the log of those that wait ('prepares the images').
      function: called once in each process.

    Raises:
      InputError: it failed in another process, or did not end in time.
    """
    for turn in (True, False):
        with raise_together(f"process 0, which {does}" if turn else "the other processes"):
            if is_primary() == turn:
                if not turn:
                    mounts.pull()
                result = function()
                if turn:
                    mounts.push()
    return result


def primary_alone(does: str, function: Callable[[], Any]) -> Any:
    """Calls `function` in process 0 only, and returns in all processes what it returned there.

    Args:
      does: what the function does, for the log of those that wait ('compares the statistics').
      function: returns what JSON can hold.

    Raises:
      InputError: it failed in process 0, or did not end in time.
    """
    with raise_together(f"process 0, which {does}"):
        result = function() if is_primary() else None
    if jax.process_count() == 1:
        return result
    text = np.frombuffer(json.dumps(result).encode(), np.uint8)
    size = from_primary(len(text))
    text = text if is_primary() else np.zeros(size, np.uint8)
    return json.loads(add_up({"text": text})["text"].tobytes())


def hear_preemption(stop: StopOnSignal) -> None:
    """Notes a preemption of any process, of which JAX's service has notice, as a SIGTERM.

    All processes must call it together, in every iteration of a loop; all note it in the same one.
    The service (`jax_enable_preemption_service`) also catches the SIGTERM of a process that leaves
    signals to its caller, such as a thread's. It is asked about the numbers of the calls, as steps
    begin again with each stage.
    """
    if jax.process_count() == 1 or not hears_preemption():
        return
    if multihost_utils.reached_preemption_sync_point(next(_iterations)):
        stop.requested = stop.requested or signal.SIGTERM


class StopOfAll:
    """Stops all processes at the same iteration of a loop when one of them receives a signal.

    All processes must run equally many iterations. With several processes the stop comes one
    iteration late, so that nothing waits for the devices.
    """

    def __init__(self, stop: StopOnSignal):
        self._stop = stop
        self._before: jax.Array | None = None

    def check(self) -> None:
        """To be called in each iteration. Raises `Interrupted`."""
        if jax.process_count() == 1:
            return self._stop.check()
        hear_preemption(self._stop)
        before, self._before = self._before, largest(bool(self._stop.requested))
        if before is not None and int(before):
            raise self._stop.interruption


def largest(value: int) -> jax.Array:
    """Returns the maximum over all processes as an int32 scalar that is computed asynchronously.

    All processes must call it equally often, and then read the same. Only reading it waits.
    """
    mesh, of_all = _over_all()
    return of_all(sharding.put_batch(np.full(len(mesh.local_devices), value, np.int32), mesh))


def in_any_process(flag: bool) -> bool:
    """Whether the flag is set in any process. All must call it together; it waits for them."""
    return bool(int(largest(flag))) if jax.process_count() > 1 else flag


def from_primary(value: int) -> int:
    """Returns process 0's value (int32) in all processes, which must call it together."""
    return int(allgather(np.int32(value))[0])


def add_up(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the sums over all processes of arrays, in their dtypes; no process sees the parts.

    Sums of float64 are exact to 2^-45 of the largest possible one, although the devices add in
    float32: they add multiples of a power of two that float32 holds exactly, and the rests.

    Args:
      arrays: by name, of the same shapes and dtypes in all processes, which call it together.
    """
    if jax.process_count() == 1:
        return arrays
    return {name: _sum_of(value) for name, value in arrays.items()}


def _sum_of(value: np.ndarray) -> np.ndarray:
    mesh, add = _one_device_each()
    by_process = NamedSharding(mesh, PartitionSpec(mesh.axis_names))

    def on_devices(x: np.ndarray) -> np.ndarray:
        total = add(jax.make_array_from_process_local_data(by_process, x[None]))
        return np.asarray(total.addressable_data(0))

    if value.dtype != np.float64:
        return on_devices(value)
    # Rounded up, as is the exponent: the sum of all is below 2^24 units.
    largest = np.nextafter(np.float32(np.abs(value).max(initial=0)), np.float32(np.inf))
    bound = max(allgather(largest).sum(dtype=np.float64), np.finfo(np.float32).tiny)
    unit = 2.0 ** (np.ceil(np.log2(bound)) - 23)
    coarse = np.rint(value / unit) * unit
    parts = (coarse, value - coarse)
    sums = [on_devices(part.astype(np.float32)).astype(np.float64) for part in parts]
    return sums[0] + sums[1]


@functools.cache
def _one_device_each() -> tuple[Mesh, Callable[[jax.Array], jax.Array]]:
    firsts: dict[int, jax.Device] = {}
    for device in sorted(jax.devices(), key=lambda device: device.id):
        firsts.setdefault(device.process_index, device)
    mesh = Mesh(np.asarray([firsts[n] for n in sorted(firsts)]), ("process",))

    def add(x: jax.Array) -> jax.Array:
        return x.sum(0, dtype=x.dtype)

    return mesh, jax.jit(add, out_shardings=sharding.replicated(mesh))


@functools.cache
def _over_all() -> tuple[Mesh, Callable[[jax.Array], jax.Array]]:
    mesh = sharding.make_mesh()
    return mesh, jax.jit(jnp.max, out_shardings=sharding.replicated(mesh))
