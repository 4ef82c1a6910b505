"""Training steps compiled for TPUs that are not there: the compiler's own figures."""

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
from rdm_jax.config.validate import require
from rdm_jax.plan.chips import Chip
from rdm_jax.plan.cost import image_shape, shard_bytes
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

TOPOLOGIES = {"v5e": _FLAT, "v6e": _FLAT, "v4": _CUBES, "v5p": _CUBES}


def topology(config: Config, chip: Chip | None, chips: int, target: str) -> list[Any]:
    """The devices of a TPU slice that is not there. Raises InputError."""
    known = TOPOLOGIES.get(chip.name if chip else "", {})
    require(
        bool(known),
        "--target",
        target,
        f"with --compile, {', '.join(TOPOLOGIES)} and a number of chips",
    )
    counts = ", ".join(map(str, known))
    require(chips in known, "--target", target, f"with --compile, {chip.name} with {counts} chips")
    require(
        config.parallel.mode == "pjit",
        "config.parallel.mode",
        config.parallel.mode,
        "with --compile, 'pjit'",
    )
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(
            "--compile=True needs libtpu, which is not installed; pip install 'jax[tpu]' would do."
        )
    kwargs = {"chips_per_host_bounds": (1, 1, 1)} if chips == 1 else {}
    kwargs |= (
        {"chip_config_name": "megacore"} if chip.name == "v4" else {}
    )  # otherwise its two cores are two devices
    try:
        with _alone():
            return topologies.get_topology_desc(
                platform="tpu", topology_name=f"{chip.name}:{known[chips]}", **kwargs
            ).devices
    except jax.errors.JaxRuntimeError as error:  # such as its lock, which another process holds
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"--compile=True cannot use libtpu ({reason}); another version of it, or nothing else that uses it, would do."
        ) from error


@contextmanager
def _alone() -> Iterator[None]:
    """Tells libtpu not to look for a TPU, nor for other hosts; it complains at length where there
    are none."""
    wanted = {
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
    """What the compiler says of a stage's step."""
    stage = config.stage(number)
    mesh = sharding.make_mesh(config.parallel.data, config.parallel.fsdp, devices)
    program = PROGRAMS["pjit"](stage, image_shape(config, number), classes, root_key(0), mesh)
    start, images = (
        time.monotonic(),
        stage.training.batch_size // stage.training.accumulate // len(devices),
    )
    try:
        with _alone():
            compiled = program.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return f"stage{number} DOES NOT FIT: {exhausted(str(error), images, shard_bytes(program.abstract))}"
    return _compiler_table(number, compiled, time.monotonic() - start, chip, images)


def _compiler_table(
    number: int, compiled: jax.stages.Compiled, seconds: float, chip: Chip, images: int
) -> str:
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    fixed = arguments + memory.output_size_in_bytes - memory.alias_size_in_bytes
    # Temporaries are a sum in which some share their place; what jax 0.7 does not tell is less than
    # it.
    peak = getattr(memory, "peak_memory_in_bytes", 0) or fixed + temporaries
    told = (
        ", ".join(
            f"{kind} {size / 1e9:.3g} GB" for kind, size in sharding.collectives(compiled).items()
        )
        or "nothing"
    )
    rows = [
        ["memory a chip: arguments (state, batch)", in_gib(arguments)],
        ["... outputs that are not arguments' memory", in_gib(fixed - arguments)],
        ["... temporaries", in_gib(temporaries)],
        ["... at the peak", f"{peak / GIB:.2f} of {chip.gib:g} GiB"],
        ["FLOPs a chip in one run of every loop's body", short(cost.get("flops", 0.0))],
        ["communicated, results a chip, likewise", told],
        ["compiled in", f"{seconds:.0f} s"],
    ]
    more = int(images * (chip.gib * GIB - fixed) / max(peak - fixed, 1))
    verdict = (
        f"stage{number} FITS, says the compiler, with {images} images a chip at a time; if what is beyond the state grows with "
        f"the batch, up to {more} would."
    )
    return "\n".join(
        [f"### stage{number}, by XLA for {chip.name}", "", markdown(["", ""], rows), "", verdict]
    )


def exhausted(message: str, images: int, fixed: int) -> str:
    """Of XLA's complaint that memory is too small: its words, and the images a chip that may fit.

    Args:
      images: a chip works on at a time.
      fixed: bytes a chip, however many images.
    """
    found = re.search(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?)", message, re.IGNORECASE)
    if not found:
        return f"{' '.join(message.split())[:300]}"
    used, limit = (
        float(found[i]) * 1024 ** " KMGT".index(found[i + 1].upper() or " ") for i in (1, 3)
    )
    fitting = int(images * (limit - fixed) / max(used - fixed, 1))
    words = f"the compiler used {used / GIB:.2f} of {limit / GIB:.2f} GiB with {images} images a chip at a time"
    if fitting < 1:
        return f"{words}; parallel.fsdp, network.remat='block' or more chips would do."
    return f"{words}; {fitting} of them may fit (training.accumulate), if temporaries grow with the batch; it was not tried."
