"""What the benchmarks share: comparable times, compile times, memory, and tables."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from rdm_jax.config import Stage
from rdm_jax.data.sources import cores
from rdm_jax.models.functional import Network
from rdm_jax.plan.chips import chip_of
from rdm_jax.runtime import sharding
from rdm_jax.runtime.random_streams import root_key

ROUNDS = 3  # at least; the median is reported


def queued(function: Callable[[], Any], calls: int) -> float:
    """Seconds per call: several are started, as in training, and the last is waited for."""
    began = time.perf_counter()
    for _ in range(calls):
        result = function()
    jax.block_until_ready(result)
    return (time.perf_counter() - began) / calls


def medians(functions: dict[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    """Median seconds of a call of each function.

    They take turns, so that other load on the machine affects all of them. Each is called once
    before, to compile.

    Args:
      functions: by name; they take no arguments and return arrays.
      seconds: about how long to time each; never less than `ROUNDS` calls.
    """
    for function in functions.values():
        queued(function, 1)
    once = {name: max(queued(function, 1), 1e-6) for name, function in functions.items()}
    # Many short turns rather than few long ones: the median ignores those that were disturbed.
    rounds = int(min(max(seconds / max(once.values(), default=1), ROUNDS), 50))
    calls = {name: max(1, round(seconds / rounds / each)) for name, each in once.items()}
    turns = [
        {name: queued(function, calls[name]) for name, function in functions.items()}
        for _ in range(rounds)
    ]
    return {name: statistics.median(turn[name] for turn in turns) for name in functions}


def compiled(function: Callable, *args: Any) -> jax.stages.Compiled:
    """A function compiled for its arguments."""
    return jax.jit(function).lower(*args).compile()


def flops(program: jax.stages.Compiled) -> float:
    """XLA's count of a program's operations; NaN if it has none."""
    return (program.cost_analysis() or {}).get("flops", float("nan"))


def parameters(network: Network) -> Any:
    """Random parameters, replicated on every device of this process."""
    replicated = sharding.replicated(sharding.local_mesh())
    # It runs once, and optimising the program takes longer than running it.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    return jax.jit(network.init, out_shardings=replicated, compiler_options=options)(root_key(0))


def forward_flops(stage: Stage, channels: int, classes: int) -> int:
    """FLOPs of the stage's network per image, two per multiply-add."""
    return 2 * stage.multiply_adds(channels, classes)


def of_peak(flops_a_second: float, dtype: str) -> str:
    """The share of a device's peak FLOP/s; '-' if the peak is not known."""
    chip = chip_of(jax.devices()[0].device_kind)
    return f"{flops_a_second / chip.peak(dtype):.1%}" if chip else "-"


def peak_bytes() -> int:
    """This process's peak memory on its first device so far; 0 if the device does not say."""
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)


def machine() -> str:
    """The machine that the figures are of, in one line."""
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    return f"{device}, {cores()} cores, jax {jax.__version__}"


def start_table(title: str, columns: Sequence[str]) -> None:
    """Prints a title and the head of a Markdown table."""
    print(f"\n{title}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)


def print_row(cells: Sequence[str]) -> None:
    """Prints a row as soon as it is known."""
    print(f"| {' | '.join(cells)} |", flush=True)


def milliseconds(seconds: float) -> str:
    """Seconds as a cell of milliseconds, three digits."""
    return f"{seconds * 1e3:,.0f}" if seconds >= 0.1 else f"{seconds * 1e3:.3g}"
