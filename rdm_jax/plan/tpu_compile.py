"""Training steps compiled for TPUs that need not exist here: the compiler's own figures."""

import importlib.util
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
from jax.experimental import topologies

from rdm_jax.config import Config
from rdm_jax.plan import modelled_time
from rdm_jax.plan.chips import CHIPS, Chip
from rdm_jax.plan.cost import records_of, shard_bytes
from rdm_jax.render.tables import GIB, in_gib, markdown, short
from rdm_jax.runtime import sharding
from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.random_streams import root_key
from rdm_jax.training.program import PROGRAMS

# Slices that libtpu compiles for, by their number of chips.
_FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}

_CUBES = {
    1: "1x1x1",
    4: "2x2x1",
    8: "2x2x2",
    16: "2x2x4",
    32: "2x4x4",
    64: "4x4x4",
    128: "4x4x8",
    256: "4x8x8",
    512: "8x8x8",
}

_COSTLIEST = 10  # operations in a table

TOPOLOGIES = {"v5e": _FLAT, "v6e": _FLAT, "v4": _CUBES, "v5p": _CUBES}


def topology(config: Config, chip: Chip | None, chips: int, target: str) -> list[Any]:
    """The devices of a TPU slice that need not exist here. Raises InputError."""
    known = TOPOLOGIES.get(chip.name if chip else "", {})
    if not known:
        names = ", ".join(TOPOLOGIES)
        raise InputError(
            f"--target={target!r} cannot be compiled for (--compile)",
            f"Use {names} and a number of chips.",
        )
    if chips not in known:
        counts = ", ".join(map(str, known))
        raise InputError(
            f"--target={target!r} is not a slice that --compile knows",
            f"Use {chip.name} with {counts} chips.",
        )
    if config.parallel.mode != "pjit":
        raise InputError(
            f"config.parallel.mode={config.parallel.mode!r} does not go with --compile",
            "Use 'pjit'.",
        )
    return _devices(chip.name, known[chips], chips, "--compile=True")


def one_chip(name: str) -> tuple[Chip, Any]:
    """A TPU chip by its name, and a device of its kind to compile for. Raises InputError."""
    if name not in TOPOLOGIES:
        raise InputError(f"--chip={name!r} is not known", f"Use {', '.join(TOPOLOGIES)}.")
    chip = next(chip for chip in CHIPS if chip.name == name)
    return chip, _devices(name, TOPOLOGIES[name][1], 1, f"--chip={name!r}")[0]


def _devices(name: str, shape: str, chips: int, flag: str) -> list[Any]:
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(
            f"{flag} needs libtpu, which is not installed", "Run: pip install 'jax[tpu]'."
        )
    options: dict[str, Any] = {}
    if chips == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    if name == "v4":  # otherwise its two cores are two devices
        options["chip_config_name"] = "megacore"
    try:
        with _alone():
            return topologies.get_topology_desc(
                platform="tpu", topology_name=f"{name}:{shape}", **options
            ).devices
    except jax.errors.JaxRuntimeError as error:  # such as its lock, which another process holds
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{flag} cannot use libtpu ({reason})",
            "Use another version of it, or stop other programs that use it.",
        ) from error


@contextmanager
def _alone() -> Iterator[None]:
    """Keeps libtpu from looking for a TPU, other hosts or other programs that use it."""
    wanted = {
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v4-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }
    missing = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(missing)
    try:
        yield
    finally:
        for name in missing:
            os.environ.pop(name, None)


def compiled_stage(
    config: Config, number: int, classes: int, devices: list[Any], chip: Chip
) -> str:
    """The compiler's figures for a stage's step."""
    stage = config.stage(number)
    mesh = sharding.make_mesh(config.parallel.data, config.parallel.fsdp, devices)
    shape, cell = records_of(config, number)
    program = PROGRAMS["pjit"](stage, shape, classes, root_key(0), mesh, cell=cell)
    images = stage.training.batch_size // stage.training.accumulate // len(devices)
    start = time.monotonic()
    try:
        with _alone():
            compiled = program.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = exhausted(str(error), images, shard_bytes(program.abstract))
        return f"stage{number} DOES NOT FIT: {reason}"
    table = _compiler_table(number, compiled, time.monotonic() - start, chip, images)
    multiply_adds = stage.multiply_adds(config.data.channels, classes)
    times = time_tables(
        compiled.as_text(),
        chip,
        6 * images * stage.training.accumulate * multiply_adds,
        images * stage.training.accumulate,
        stage.network.dtype,
    )
    return "\n\n".join([table, f"#### stage{number}, modelled time", times])


def time_tables(text: str, chip: Chip, flops: int, images: int, dtype: str) -> str:
    """The modelled time of a program: in all, by kind of work, and its ten costliest operations.

    Args:
      text: of the optimised program.
      chip: that it is compiled for.
      flops: of the model, of one call on one chip.
      images: of one call on one chip.
      dtype: of the network.
    """
    found = modelled_time.operations(text, chip)
    seconds = modelled_time.seconds(found, chip)
    share = flops / seconds / chip.peak(dtype)
    total = (
        f"{seconds * 1e3:.4g} ms per step, {images / seconds:.4g} images per second per chip, "
        f"{share:.1%} of the peak: the compiler's estimate, not a measurement."
    )
    kinds = [
        [kind, f"{part * seconds * 1e3:.4g}", f"{part:.1%}"]
        for kind, part in modelled_time.by_kind(found).items()
    ]
    worst = [
        [o.kind, f"{o.cycles / chip.clock * 1e3:.4g}", o.result[:60], o.line, o.primitive[-60:]]
        for o in found[:_COSTLIEST]
    ]
    return "\n\n".join(
        [
            total,
            markdown(["kind of work", "ms", "share"], kinds),
            markdown(["costliest operations", "ms", "result", "line", "primitive"], worst),
        ]
    )


def _compiler_table(
    number: int, compiled: jax.stages.Compiled, seconds: float, chip: Chip, images: int
) -> str:
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    fixed = arguments + memory.output_size_in_bytes - memory.alias_size_in_bytes
    # Without a peak (jax 0.7): the sum of temporaries is an upper bound, as some share memory.
    peak = getattr(memory, "peak_memory_in_bytes", 0) or fixed + temporaries
    collectives = ", ".join(
        f"{kind} {size / 1e9:.3g} GB" for kind, size in sharding.collectives(compiled).items()
    )
    rows = [
        ["memory per chip: arguments (state, batch)", in_gib(arguments)],
        ["... outputs that do not reuse the arguments' memory", in_gib(fixed - arguments)],
        ["... temporaries", in_gib(temporaries)],
        ["... at the peak", f"{peak / GIB:.2f} of {chip.gib:g} GiB"],
        ["FLOPs per chip, each loop body once", short(cost.get("flops", 0.0))],
        ["collectives' results per chip, likewise", collectives or "nothing"],
        ["compile time", f"{seconds:.0f} s"],
    ]
    more = int(images * (chip.gib * GIB - fixed) / max(peak - fixed, 1))
    verdict = (
        f"stage{number} FITS, according to the compiler, with {images} images per chip at a time; "
        f"up to {more} would, if everything but the state grows with the batch."
    )
    return "\n".join(
        [f"### stage{number}, by XLA for {chip.name}", "", markdown(["", ""], rows), "", verdict]
    )


def exhausted(message: str, images: int, fixed: int) -> str:
    """A summary of XLA's out-of-memory error, and the images per chip that may fit.

    Args:
      message: of the error.
      images: per chip at a time.
      fixed: bytes per chip that do not depend on the number of images.
    """
    found = re.search(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?)", message, re.IGNORECASE)
    if not found:
        return " ".join(message.split())[:300]
    used, limit = (
        float(found[i]) * 1024 ** " KMGT".index(found[i + 1].upper() or " ") for i in (1, 3)
    )
    fitting = int(images * (limit - fixed) / max(used - fixed, 1))
    usage = (
        f"the compiler used {used / GIB:.2f} of {limit / GIB:.2f} GiB with {images} images per "
        "chip at a time"
    )
    if fitting < 1:
        return f"{usage}. Use parallel.fsdp, network.remat='block' or more chips."
    return (
        f"{usage}; {fitting} may fit (training.accumulate) if temporaries grow with the "
        "batch, which was not tried."
    )
