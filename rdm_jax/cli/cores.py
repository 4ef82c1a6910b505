"""All cores for small networks on a CPU: virtual devices that share every batch.

XLA runs most operations of a small network on one core each. With one virtual device per core each
computes its share of the batch, and all of them work all the time.
"""

import contextlib
import os

import jax

from rdm_jax.config import Config
from rdm_jax.runtime.allocator import keep_freed_memory
from rdm_jax.runtime.console import log
from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.fields import check_bounds

# A device with fewer images waits for the others more than it computes.
LEAST_IMAGES = 8
# Parameters of one network on all devices together: each device has its replica, 20 bytes per
# parameter with EMA, moments and gradient.
MOST_PARAMETERS = 100_000_000
# XLA ends a process whose devices wait for each other for longer: 40 s by default, which a stopped
# (Ctrl-Z) or very busy process can reach. Versions of JAX before 0.10 do not know the flag.
FLAG = "--xla_cpu_collective_call_terminate_timeout_seconds"
SECONDS_TO_MEET = 86_400


def use_cores(config: Config, cores: int) -> None:
    """Prepares JAX's CPU backend before its first use; accelerators are not affected.

    Nothing is changed if the number of devices is given (JAX_NUM_CPU_DEVICES, XLA_FLAGS, a mesh of
    a certain size) or in a run of several processes.

    Args:
      config: of the run.
      cores: number of cores that this process may use.
    """
    if _is_given() or jax.distributed.is_initialized():
        return
    count = number_of_devices(config, cores)
    if count > 1:
        flags = os.environ.get("XLA_FLAGS", "")
        if FLAG not in flags:
            os.environ["XLA_FLAGS"] = f"{flags} {FLAG}={SECONDS_TO_MEET}".strip()
        with contextlib.suppress(RuntimeError):  # the backend is in use already
            jax.config.update("jax_num_cpu_devices", count)
    if jax.default_backend() == "cpu":
        keep_freed_memory()
        log.info("%d of %d cores share each batch (JAX_NUM_CPU_DEVICES)", count, cores)


def number_of_devices(config: Config, cores: int) -> int:
    """The largest number of devices, one per core at most, that suits every batch and network.

    Computing it does not initialise JAX's backend.
    """
    parallel = config.parallel
    if (parallel.data, parallel.fsdp) != (-1, 1) or jax.__version_info__ < (0, 10):
        return 1
    try:
        check_bounds(config, "config")
        for stage in config.stages:
            check_bounds(stage, stage.name)
            stage.network.check(stage.name)
    except InputError:
        return 1  # the run refuses it
    batches = [config.sampling.batch_size, config.evaluation.batch_size]
    batches += [s.training.batch_size // s.training.accumulate for s in config.stages]
    largest = max(
        s.build(config.data.channels, s.some_classes).num_parameters for s in config.stages
    )

    def suits(count: int) -> bool:
        shared = all(size % count == 0 and size // count >= LEAST_IMAGES for size in batches)
        return shared and count * largest <= MOST_PARAMETERS

    return next((count for count in range(cores, 1, -1) if suits(count)), 1)


def _is_given() -> bool:
    given = getattr(jax.config, "jax_num_cpu_devices", -1) not in (-1, 0)
    return given or "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
