"""Runs the command with a fault that cannot be caused from outside: python -m tests.faults.broken
FAULT [arguments of the command]."""

import ctypes
import errno
import functools
import gc
import hashlib
import itertools
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from rdm_jax.checkpoints import store
from rdm_jax.evaluation import gathering, statistics
from rdm_jax.main import main
from rdm_jax.runtime import distributed, signals
from rdm_jax.training import metric_buffer, metric_writer, step

SECOND = 2  # the save that a fault strikes


def at_save(which, action) -> None:
    """Runs an action in the writer's thread, after the last write of a save and before its
    commit."""
    written, saves = store.write_checksums, itertools.count(1)

    def write_checksums(folder):
        written(folder)
        if which(next(saves)):
            action()

    store.write_checksums = write_checksums


def full() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def killed_before_commit() -> None:
    at_save(lambda number: number == SECOND, lambda: os.kill(os.getpid(), signal.SIGKILL))


def one_save_fails() -> None:
    at_save(lambda number: number == SECOND, full)


def saves_fail() -> None:
    at_save(lambda number: number >= SECOND, full)


def last_save_fails() -> None:
    at_save(lambda number: number == 4, full)


def second_save_is_slow() -> None:
    at_save(lambda number: number == SECOND, lambda: time.sleep(60))


def last_save_is_slow() -> None:
    at_save(lambda number: number == 4, lambda: time.sleep(8))


def clock_goes_back() -> None:
    """Sets the clock back by a day between two saves."""
    now, now_ns = time.time, time.time_ns

    def back() -> None:
        time.time, time.time_ns = (lambda: now() - 86_400), (lambda: now_ns() - 86_400 * 10**9)

    at_save(lambda number: number == SECOND, back)


def is_white(batch) -> jax.Array:
    return jnp.all(batch["image"] == 255, (1, 2, 3))


def white_is(value: float) -> None:
    """Gives white images a loss that is not finite."""
    loss = step.Objective.loss

    def of(self, params, batch, keys, *, dropout):
        return jnp.where(is_white(batch), value, loss(self, params, batch, keys, dropout=dropout))

    step.Objective.loss = of


def white_has_no_gradient() -> None:
    """Gives white images a gradient that is not finite; the loss stays finite."""
    loss = step.Objective.loss

    @jax.custom_vjp
    def nothing(leaf, flag):
        return jnp.zeros_like(flag, leaf.dtype)

    nothing.defvjp(
        lambda leaf, flag: (nothing(leaf, flag), (leaf, flag)),
        lambda kept, g: (jnp.where(kept[1].any(), jnp.full_like(kept[0], jnp.nan), 0), None),
    )

    def of(self, params, batch, keys, *, dropout):
        return loss(self, params, batch, keys, dropout=dropout) + nothing(
            jax.tree.leaves(params)[0], is_white(batch)
        )

    step.Objective.loss = of


def record_each_save(what) -> None:
    """Each process appends a line about the state to its own file before each save."""
    save = store.Checkpoints.save

    def of(self, state, about):
        with (self.directory.parent / f"recorded_by_{jax.process_index()}").open("a") as file:
            file.write(f"{what(state)}\n")
        save(self, state, about)

    store.Checkpoints.save = of


def what_devices_hold(state) -> str:
    """The step, and a hash of the shards of the state on the devices of this process."""
    held = [shard.data for leaf in jax.tree.leaves(state) for shard in leaf.addressable_shards]
    return f"{int(state.step)} {hashlib.sha256(b''.join(np.asarray(array).tobytes() for array in held)).hexdigest()}"


def what_the_process_has(state) -> str:
    """The step, bytes of memory in use, threads and open files, as JSON."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(
        0
    )  # or what malloc keeps of freed memory would count, 300 MiB after compiling
    memory = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    files = len(os.listdir("/proc/self/fd"))
    return json.dumps(
        {
            "step": int(state.step),
            "memory": memory,
            "threads": threading.active_count(),
            "files": files,
        }
    )


def measured() -> None:
    """No fault: records memory, threads and open files. The first save draws the curves, which
    opens font files that stay open."""
    metric_writer.SECONDS_BETWEEN_CURVES = 0
    record_each_save(what_the_process_has)


def white_is_nan_in_one_host() -> None:
    white_is(jnp.nan)
    record_each_save(what_devices_hold)


def a_batch_is_lost() -> None:
    """Drops the second batch of images of an evaluation."""
    add, batches = statistics.StatisticsAccumulator.add, itertools.count(1)

    def lossy(self, *batch):
        if next(batches) != 2:
            add(self, *batch)

    statistics.StatisticsAccumulator.add = lossy


def gathered_often() -> None:
    """An evaluation saves its progress after every batch."""
    gathering.SAVE_SECONDS = 0


def slow_steps() -> None:
    """Steps take a tenth of a second or more: JAX's service looks for signals once a second."""
    add = metric_buffer.MetricBuffer.add

    def slow(self, *arguments):
        time.sleep(0.1)
        add(self, *arguments)

    metric_buffer.MetricBuffer.add = slow


def signals_left_to_jax() -> None:
    """As where the command runs in a thread: no handlers are installed."""
    slow_steps()
    signals.StopOnSignal.__enter__ = lambda self: self
    signals.StopOnSignal.__exit__ = lambda *_: None


OF_SAVES = (
    killed_before_commit,
    one_save_fails,
    saves_fail,
    last_save_fails,
    second_save_is_slow,
    last_save_is_slow,
)
OF_NUMBERS = (white_has_no_gradient, white_is_nan_in_one_host)
FAULTS = {
    f.__name__: f
    for f in (
        *OF_SAVES,
        *OF_NUMBERS,
        clock_goes_back,
        measured,
        a_batch_is_lost,
        gathered_often,
        slow_steps,
        signals_left_to_jax,
    )
}
FAULTS |= {
    "white_is_nan": functools.partial(white_is, jnp.nan),
    "white_is_inf": functools.partial(white_is, jnp.inf),
}

if __name__ == "__main__":
    FAULTS[sys.argv.pop(1)]()
    distributed.exit_with(main)
