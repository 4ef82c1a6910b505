"""What a training takes, before it begins: operations, memory, communication and hours, on chips that need not be there.

Nothing is compiled for it but on request; then XLA compiles ahead of time for a TPU topology, and its own figures are shown.
"""

import dataclasses
import functools
import importlib.util
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import AbstractMesh, AxisType, NamedSharding

from rdm_jax import checks, sharding
from rdm_jax.config import Config, Stage, kind_of
from rdm_jax.errors import InputError
from rdm_jax.evaluation.tables import markdown
from rdm_jax.training.program import PROGRAMS, build_objective, build_optimizer
from rdm_jax.training.step import TrainState, init_state

GIB = 2**30
ENOUGH = 8  # images a chip at a time, below which a remedy that leaves room for more is looked for
FILLED = 0.9  # share of the memory that an estimate may take


@dataclasses.dataclass(frozen=True)
class Chip:
    """An accelerator's published figures.

    Attributes:
      name: in targets, such as 'v5e'.
      kinds: what `jax.Device.device_kind` calls it.
      bfloat16, float32: the most FLOP/s of networks with that `dtype`, at JAX's default precision: TPUs multiply float32 in
        bfloat16, NVIDIA's from Ampere on in TensorFloat-32.
      gib: of memory.
      interconnect: bytes/s that a chip can send, over all of its links to others.
      pod: chips that those links join; between pods there is a slower network.
      note: what else is to be known of the figures.
    """

    name: str
    kinds: tuple[str, ...]
    bfloat16: float
    float32: float
    gib: float
    interconnect: float
    pod: int
    note: str = ""

    def peak(self, dtype: str) -> float:
        """FLOP/s at most, for a network's `dtype`."""
        return {"bfloat16": self.bfloat16, "float32": self.float32}[dtype]


_PASSES = "float32 is multiplied in one pass of bfloat16 (JAX's default precision for TPU), at its rate"
_TF32 = "float32 is multiplied as TensorFloat-32 (JAX's default precision), at half bfloat16's rate"
_CORES = "Google Cloud's names count TensorCores, two a chip: {name}-{chips} here is {name}-{cores} there"
CHIPS = (
    # cloud.google.com/tpu/docs/v4, and "TPU v4" (arXiv 2304.01433): six links of 50 GB/s each way.
    Chip("v4", ("TPU v4",), 275e12, 275e12, 32.0, 300e9, 4096, f"{_PASSES}; {_CORES}"),
    # cloud.google.com/tpu/docs/v5e: 400 GB/s of interconnect, both ways together.
    Chip("v5e", ("TPU v5 lite", "TPU v5e"), 197e12, 197e12, 16.0, 200e9, 256, _PASSES),
    # cloud.google.com/tpu/docs/v5p: 1200 GB/s of interconnect, both ways together.
    Chip("v5p", ("TPU v5", "TPU v5p"), 459e12, 459e12, 95.0, 600e9, 6144, f"{_PASSES}; {_CORES}"),
    # cloud.google.com/tpu/docs/v6e: twice v5e's interconnect, four links.
    Chip("v6e", ("TPU v6 lite", "TPU v6e"), 918e12, 918e12, 32.0, 400e9, 256, _PASSES),
    # NVIDIA A100 data sheet (SXM, dense): 312 TFLOP/s, TF32 156; NVLink 600 GB/s, both ways together.
    Chip("a100", ("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe"), 312e12, 156e12, 80.0, 300e9, 8, f"80 GB; {_TF32}"),
    Chip("a100-40gb", ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB"), 312e12, 156e12, 40.0, 300e9, 8, _TF32),
    # NVIDIA H100 data sheet: dense rates are half of those it prints, with sparsity; NVLink 900 GB/s, PCIe 5 128 GB/s, both ways.
    Chip("h100", ("NVIDIA H100 80GB HBM3",), 989e12, 494e12, 79.6, 450e9, 8, f"SXM; {_TF32}"),
    Chip("h100-pcie", ("NVIDIA H100 PCIe",), 756e12, 378e12, 79.6, 64e9, 8, _TF32),
    # NVIDIA H200 data sheet: H100 with 141 GB.
    Chip("h200", ("NVIDIA H200",), 989e12, 494e12, 140.4, 450e9, 8, _TF32),
    # NVIDIA T4 data sheet: float32 8.1 TFLOP/s; PCIe 3, 32 GB/s both ways together.
    Chip("t4", ("Tesla T4",), 8.1e12, 8.1e12, 15.0, 16e9, 8, "its 65 TFLOP/s are float16's; bfloat16 is no faster than float32"),
)


def chip_of(device_kind: str) -> Chip | None:
    """The chip that JAX calls `device_kind`; None if its figures are not in the table."""
    return next((chip for chip in CHIPS if device_kind.lower() in map(str.lower, chip.kinds)), None)


def multiply_adds(function: Callable, *abstract_args: Any) -> int:
    """Multiply-adds in the convolutions and matrix products of a function, counted in what JAX traces.

    The arguments may be arrays or their shapes. A scan counts once a turn, of a conditional's branches the largest counts.
    Fused attention on GPU (bfloat16 networks, traced there) is no matrix product to JAX and is not seen: trace in float32.

    Raises:
      ValueError: there are some in a loop whose turns are not known.
    """
    return _multiply_adds(jax.make_jaxpr(function)(*abstract_args).jaxpr)


def _multiply_adds(jaxpr: Any) -> int:
    return sum(map(_of_equation, jaxpr.eqns))


def _of_equation(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        return equation.outvars[0].aval.size * math.prod(kernel) // kernel[params["dimension_numbers"].rhs_spec[0]]
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        return equation.outvars[0].aval.size * math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
    if name == "cond":
        return max(_multiply_adds(branch.jaxpr) for branch in params["branches"])
    inner = sum(_multiply_adds(getattr(value, "jaxpr", value)) for value in params.values() if _has_equations(value))
    if name == "while" and inner:
        raise ValueError("multiply-adds within a while loop, whose turns are not known")
    return inner * params["length"] if name == "scan" else inner


def _has_equations(value: Any) -> bool:
    return hasattr(getattr(value, "jaxpr", value), "eqns")


def residual_bytes(function: Callable, params: Any, *abstract_args: Any) -> int:
    """Bytes of what is kept from the forward to the backward pass of a scalar function, parameters and arguments left out.

    It is what JAX keeps. The compiler is free to compute cheap parts of it again, and pads what it lays out.
    """
    jaxpr = jax.make_jaxpr(lambda p, *args: jax.vjp(lambda q: function(q, *args), p)[1])(params, *abstract_args).jaxpr
    given = set(map(id, (*jaxpr.invars, *jaxpr.constvars)))
    kept = {id(v): v.aval for v in jaxpr.outvars if id(v) not in given}  # some more than once
    return sum(_bytes(aval) for aval in kept.values())


def block_bytes(function: Callable, *abstract_args: Any) -> int:
    """Bytes that the largest of the blocks that are rematerialised keeps while its backward pass runs; 0 without any."""
    blocks: dict[Any, Any] = {}
    _find_blocks(jax.make_jaxpr(function)(*abstract_args).jaxpr, blocks)
    return max((_block_bytes(jaxpr) for jaxpr in blocks.values()), default=0)


def _find_blocks(jaxpr: Any, found: dict[Any, Any]) -> None:
    """Blocks by their inputs' shapes: those of the same shapes are taken for the same."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("checkpoint", "remat", "remat2"):
            found[tuple(str(v.aval) for v in equation.invars)] = equation.params["jaxpr"]
            continue
        for value in filter(_has_equations, equation.params.values()):
            _find_blocks(getattr(value, "jaxpr", value), found)


def _block_bytes(jaxpr: Any) -> int:
    run = jax.extend.core.jaxpr_as_fun(jax.extend.core.ClosedJaxpr(jaxpr, ()))
    inputs = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in jaxpr.invars]
    return residual_bytes(lambda inputs: run(*inputs), inputs)


def _bytes(leaf: Any) -> int:
    """Of an abstract array; random keys, of which there are few, count for what they hide."""
    return math.prod(leaf.shape) * getattr(leaf.dtype, "itemsize", 8)


@dataclasses.dataclass(frozen=True)
class Exchange:
    """A collective operation of a step.

    Attributes:
      kind: as in `sharding.collectives`.
      size: bytes of the results on a chip, as there.
      chips: that take part in one such operation.
    """

    kind: str
    size: int
    chips: int

    @property
    def sent(self) -> float:
        """Bytes that a chip sends, at least."""
        others = self.chips - 1
        shares = {"all-reduce": 2 * others / self.chips, "all-gather": others / self.chips, "reduce-scatter": float(others)}
        return self.size * shares[self.kind]


@dataclasses.dataclass(frozen=True)
class Needs:
    """What the training of one stage takes.

    Attributes:
      parameters: their number.
      multiply_adds: of the network, forward, for an image.
      images: that a chip works on at a time.
      flops: a step; forward and twice that backward, what is computed again left out.
      state: bytes a chip of parameters, their average, the optimizer's state.
      gradients: bytes a chip.
      copies: bytes a chip of the parameters once more, whole and as computed with, where they are kept in another way.
      activations: bytes a chip that the backward pass waits for, an estimate.
      exchanges: what chips tell each other in a step.
    """

    parameters: int
    multiply_adds: int
    images: int
    flops: int
    state: int
    gradients: int
    copies: int
    activations: int
    exchanges: tuple[Exchange, ...]

    @property
    def fixed(self) -> int:
        """Bytes a chip, however many images it works on."""
        return self.state + self.gradients + self.copies

    @property
    def memory(self) -> int:
        """Bytes a chip."""
        return self.fixed + self.activations

    @property
    def sent(self) -> float:
        """Bytes a chip and step."""
        return sum((exchange.sent for exchange in self.exchanges), 0.0)


def stage_needs(config: Config, number: int, chips: int, classes: int) -> Needs:
    """What stage `number` (from 1) takes on so many chips, in the config's way of sharing them."""
    stage, shape = config.stages[number - 1], _image_shape(config, number)
    training, sizes = stage.training, sharding.mesh_sizes(config.parallel.data, config.parallel.fsdp, chips)
    state = _state(_plain(stage), shape[-1], classes)
    state = _cut(state, AbstractMesh(sizes, sharding.AXES, axis_types=(AxisType.Auto,) * 2))
    images = training.batch_size // training.accumulate // chips
    forward = _forward(_plain(stage), shape[-1], classes)
    dtype, jitted = jnp.dtype(stage.network.dtype), config.parallel.mode == "pjit"
    copied = [leaf for leaf in jax.tree.leaves(state.params) if not leaf.sharding.is_fully_replicated or leaf.dtype != dtype]
    return Needs(
        parameters=sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        multiply_adds=forward,
        images=images,
        flops=2 * 3 * forward * training.batch_size,
        state=shard_bytes(state),
        gradients=shard_bytes(state.params) * (1 if training.accumulate == 1 else 2),  # of the part, and their sum
        copies=sum(leaf.size for leaf in copied) * dtype.itemsize,
        activations=images * _activations(_untrained(stage), shape, classes),
        # `pmap` averages once, at the end; what the compiler adds for `jit` is where a part's gradients are made.
        exchanges=_exchanges(state.params, sizes, dtype, training.accumulate if jitted else 1, narrow=jitted),
    )


def _cut(abstract: Any, mesh: AbstractMesh) -> Any:
    """`sharding.by_rules` for devices that are not there."""

    def with_sharding(path, leaf):
        rule = next(rule for pattern, rule in sharding.RULES if re.search(pattern, jax.tree_util.keystr(path)))
        spec = rule(leaf.shape, mesh.shape[sharding.FSDP])
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(with_sharding, abstract)


def shard_bytes(tree: Any) -> int:
    """Bytes a chip of a tree of abstract arrays with shardings."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _image_shape(config: Config, number: int) -> tuple[int, int, int]:
    """Of the records that a stage is trained on: the last stage's, or its own where it has a source of its own."""
    stage = config.stages[number - 1]
    return (*(stage if stage.source else config.stages[-1]).resolution, config.data.channels)


def _untrained(stage: Stage) -> Stage:
    """The stage without what changes neither the network nor the loss, so that what was traced is found again."""
    return dataclasses.replace(stage, training=dataclasses.replace(stage.training, batch_size=1, accumulate=1, images=1))


def _plain(stage: Stage) -> Stage:
    """The same without what changes neither parameters nor multiply-adds; float32 also for `multiply_adds`' sake."""
    return dataclasses.replace(_untrained(stage), network=dataclasses.replace(stage.network, dtype="float32", remat="none"))


@functools.lru_cache(maxsize=64)
def _state(stage: Stage, channels: int, classes: int) -> TrainState:
    """Shapes of the training state."""
    optimizer = build_optimizer(stage.training)
    return jax.eval_shape(lambda params: init_state(params, optimizer), stage.build(channels, classes).abstract)


@functools.lru_cache(maxsize=64)
def _forward(stage: Stage, channels: int, classes: int) -> int:
    """Multiply-adds of the network for an image."""
    network, array = stage.build(channels, classes), lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    labels = array(1, classes) if classes else None
    return multiply_adds(network.apply, network.abstract, array(1, *stage.resolution, channels), array(1), labels)


@functools.lru_cache(maxsize=64)
def _activations(stage: Stage, image_shape: tuple[int, int, int], classes: int) -> int:
    """Bytes kept for the backward pass, an image; with those of the one block that is being computed again."""
    objective, dtype = build_objective(stage, image_shape, classes), jnp.dtype(stage.network.dtype)
    # Parameters as they are computed with: their copies are no activations.
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), objective.network.abstract)
    batch = {"image": jax.ShapeDtypeStruct((1, *image_shape), jnp.uint8), "label": jax.ShapeDtypeStruct((1,), jnp.int32)}
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))
    loss = lambda params, batch, keys: objective.loss(params, batch, keys, dropout=True).mean()  # noqa: E731
    again = block_bytes(loss, params, batch, keys) if stage.network.remat == "block" else 0
    return residual_bytes(loss, params, batch, keys) + again


def _exchanges(params: Any, sizes: tuple[int, int], dtype: jnp.dtype, rounds: int, narrow: bool) -> tuple[Exchange, ...]:
    """A step's, for gradients and for parameters that are cut.

    Args:
      params: abstract, with their shardings.
      rounds: parts of a batch, each of which has its own.
      narrow: gradients of kernels travel as `dtype`, in which they are computed, and not as float32.
    """
    (data, fsdp), leaves = sizes, jax.tree.leaves(params)
    width = lambda leaf: dtype.itemsize if narrow and len(leaf.shape) > 1 else leaf.dtype.itemsize  # noqa: E731
    cut = rounds * dtype.itemsize * sum(leaf.size for leaf in leaves if not leaf.sharding.is_fully_replicated)
    uncut = rounds * sum(width(leaf) * leaf.size for leaf in leaves if leaf.sharding.is_fully_replicated)
    found = (
        Exchange("all-reduce", uncut, data * fsdp),
        Exchange("all-gather", cut, fsdp),
        Exchange("reduce-scatter", cut // fsdp, fsdp),
        Exchange("all-reduce", cut // fsdp, data),
    )
    return tuple(exchange for exchange in found if exchange.size and exchange.chips > 1)


def step_seconds(needs: Needs, chip: Chip, chips: int, dtype: str, utilisation: float) -> float:
    """Seconds a step computes, at a share `utilisation` of the chips' peak, what is computed again left out."""
    return needs.flops / (chips * chip.peak(dtype) * utilisation)


def plan(config: Config, target: str, *, utilisation: float, classes: int, ahead_of_time: bool) -> str:
    """What the training of every stage takes, as text: tables in Markdown, and a verdict a stage.

    Args:
      config: of the run; no data is needed.
      target: 'NAME-CHIPS', such as 'v5e-16' (chips, also of v4 and v5p), or 'here' for the devices that JAX finds.
      utilisation: share of the peak FLOP/s that is reached (model FLOPs; what is computed again does not count).
      classes: of the images; 0 for none.
      ahead_of_time: compile for the target, a TPU, and show the compiler's figures. A large network takes half an hour.

    Raises:
      InputError: one of these, or the config's way of sharing chips, cannot be used.
    """
    _require(0 < utilisation <= 1, "--utilisation", utilisation, "a number above 0 and up to 1")
    _require(classes >= 0, "--classes", classes, "0 for none, or more")
    chip, chips, name = _parse_target(target)
    checks.check_config(config)
    checks.check_devices(config, chips, 1)
    devices = _topology(config, chip, chips, target) if ahead_of_time else None
    parts, totals = [_heading(config, chip, chips, name, utilisation)], []
    for number in range(1, len(config.stages) + 1):
        needs = stage_needs(config, number, chips, classes)
        parts.append(_section(config, number, needs, chip, chips, utilisation))
        parts.append(_verdict(config, number, needs, chip, chips, classes))
        if devices is not None:
            parts.append(_compiled(config, number, classes, devices, chip))
        totals.append(_hours(config, number, needs, chip, chips, utilisation) if chip else 0.0)
    if chip:
        parts.append(f"All stages, one after the other: {_number(sum(totals))} hours, {_number(chips * sum(totals))} chip-hours.")
    return "\n\n".join(parts)


def _require(fine: bool, field: str, value: Any, would_do: str) -> None:
    if not fine:
        raise InputError(f"{field}={value!r} cannot be used; {would_do} would do.")


def _parse_target(target: str) -> tuple[Chip | None, int, str]:
    """(chip, None if its figures are not known; how many; what to call them). Raises InputError."""
    if target == "here":
        kind = jax.devices()[0].device_kind
        return chip_of(kind), jax.device_count(), kind
    name, _, count = target.lower().rpartition("-")
    chip = next((chip for chip in CHIPS if chip.name == name), None)
    fine = chip is not None and count.isdecimal() and int(count) > 0
    _require(fine, "--target", target, f"'here', or {', '.join(c.name for c in CHIPS)} with a number of chips, as in 'v5e-16',")
    return chip, int(count), chip.name


def _heading(config: Config, chip: Chip | None, chips: int, name: str, utilisation: float) -> str:
    data, fsdp = sharding.mesh_sizes(config.parallel.data, config.parallel.fsdp, chips)
    lines = [f"# {chips} x {name}, parallel.mode={config.parallel.mode}, mesh {data} (data) x {fsdp} (fsdp)", ""]
    if chip is None:
        return "\n".join([*lines, f"No peak FLOP/s, memory or interconnect of {name!r} are known here: hours are left out."])
    lines += [
        f"A chip: {chip.bfloat16 / 1e12:.4g} TFLOP/s in bfloat16, {chip.float32 / 1e12:.4g} in float32, {chip.gib:g} GiB, sends "
        f"{chip.interconnect / 1e9:g} GB/s; hours at {utilisation:.0%} of the peak, communication and sampling left out.",
        "Activations are what JAX keeps from the forward to the backward pass, an estimate: the compiler computes some of it "
        "again, and pads what it lays out.",
    ]
    notes = [chip.note.format(name=name, chips=chips, cores=2 * chips)] if chip.note else []
    if chips > chip.pod:
        notes.append(f"beyond {chip.pod} chips communication goes over a slower network, and takes longer than said")
    return "\n".join(lines + [f"Note: {note}." for note in notes])


def _section(config: Config, number: int, needs: Needs, chip: Chip | None, chips: int, utilisation: float) -> str:
    """The table of a stage."""
    stage = config.stages[number - 1]
    training, network = stage.training, stage.network
    size, kind = " x ".join(map(str, stage.resolution)), kind_of(type(network))
    rows = [
        ["parameters", f"{_number(needs.parameters)}"],
        ["multiply-adds, forward, an image", f"{_number(needs.multiply_adds)}"],
        [f"FLOPs a step (2 x 3 x {training.batch_size} images)", f"{_number(needs.flops)}"],
    ]
    if network.remat == "block":
        rows.append(["... with blocks computed again (x 4/3)", f"{_number(needs.flops * 4 / 3)}"])
    rows += _memory_rows(needs, chip) + _exchange_rows(needs)
    if chip:
        rows += _time_rows(config, number, needs, chip, chips, utilisation)
    about = f"## stage{number}: {kind}, {size}, {network.dtype}, remat={network.remat}, accumulate={training.accumulate}"
    return "\n".join([about, "", markdown(["", ""], rows)])


def _memory_rows(needs: Needs, chip: Chip | None) -> list[list[str]]:
    of = f" of {chip.gib:g}" if chip else ""
    return [
        ["memory a chip: parameters, average, optimizer", _gib(needs.state)],
        ["... gradients", _gib(needs.gradients)],
        ["... parameters whole, as computed with", _gib(needs.copies)],
        [f"... activations, {needs.images} images at a time (estimate)", _gib(needs.activations)],
        ["... together", f"{needs.memory / GIB:.2f}{of} GiB"],
    ]


def _exchange_rows(needs: Needs) -> list[list[str]]:
    rows = [[f"a step's {e.kind} over {e.chips} chips", f"{e.size / 1e9:.3g} GB"] for e in needs.exchanges]
    return [*rows, ["sent by a chip a step", f"{needs.sent / 1e9:.3g} GB"]]


def _time_rows(config: Config, number: int, needs: Needs, chip: Chip, chips: int, utilisation: float) -> list[list[str]]:
    stage = config.stages[number - 1]
    computing, sending = step_seconds(needs, chip, chips, stage.network.dtype, utilisation), needs.sent / chip.interconnect
    hours = _hours(config, number, needs, chip, chips, utilisation)
    rows = [
        ["a step computes", f"{_number(computing)} s"],
        ["a step communicates, at the links' rate", f"{_number(sending)} s{', MORE THAN IT COMPUTES' * (sending > computing)}"],
        ["images, steps", f"{_number(stage.training.images)}, {stage.training.steps:,}"],
        ["hours", _number(hours)],
        ["chip-hours", _number(hours * chips)],
    ]
    if stage.network.remat == "block":
        rows.append(["... if what is computed again adds to it", _number(hours * chips * 4 / 3)])
    return rows


def _hours(config: Config, number: int, needs: Needs, chip: Chip, chips: int, utilisation: float) -> float:
    stage = config.stages[number - 1]
    return stage.training.steps * step_seconds(needs, chip, chips, stage.network.dtype, utilisation) / 3600


def _verdict(config: Config, number: int, needs: Needs, chip: Chip | None, chips: int, classes: int) -> str:
    """Whether the stage fits, as far as an estimate can tell, and what would do if not."""
    name = f"stage{number}"
    if chip is None:
        return f"{name}: {_gib(needs.memory)} a device by estimate; whether that fits is for you to see."
    left, says = chip.gib * GIB - needs.memory, f"{needs.memory / GIB:.1f} of {chip.gib:g} GiB by estimate"
    truth = "--compile has the compiler's word" if chip.name.startswith("v") else "a trial step has the last word"
    if needs.memory <= FILLED * chip.gib * GIB:
        return f"{name} FITS: {says}, {left / GIB:.1f} GiB left; {truth}."
    if left >= 0:
        return f"{name} MAY FIT: {says}, little is left; {truth}. Safer: {_remedy(config, number, chip, chips, classes)}."
    return f"{name} DOES NOT FIT: {says}. What would do: {_remedy(config, number, chip, chips, classes)}."


def _remedy(config: Config, number: int, chip: Chip, chips: int, classes: int) -> str:
    """The first, of what costs little to what costs more, that leaves room for `ENOUGH` images a chip; else the best."""
    room, best = FILLED * chip.gib * GIB, (0, "")
    for changes, changed in _remedies(config, number, chips):
        training = changed.stages[number - 1].training
        parts = training.batch_size // chips
        needs = stage_needs(_changed(changed, number, training={"accumulate": parts}), number, chips, classes)
        fitting = max(
            (n for n in range(1, parts + 1) if parts % n == 0 and needs.fixed + n * needs.activations <= room), default=0
        )
        accumulate = f"--config.stage{number}.training.accumulate={parts // fitting}" if fitting else ""
        if fitting > best[0]:
            best = fitting, " ".join(filter(None, [*changes, accumulate])) + f" ({fitting} images a chip at a time)"
        if fitting >= min(ENOUGH, parts):
            break
    return best[1] or "more chips, or a smaller network"


def _remedies(config: Config, number: int, chips: int) -> Iterator[tuple[list[str], Config]]:
    """The config with more and more changes that save memory, and their flags."""
    changes: list[str] = []
    yield changes, config
    network, field = config.stages[number - 1].network, f"--config.stage{number}.network"
    if network.remat != "block":
        config = _changed(config, number, network={"remat": "block"})
        yield (changes := [*changes, f"{field}.remat=block"]), config
    if network.dtype != "bfloat16":
        config = _changed(config, number, network={"dtype": "bfloat16"})
        yield (changes := [*changes, f"{field}.dtype=bfloat16"]), config
    if chips > 1 and config.parallel.mode == "pjit":
        config = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, data=1, fsdp=-1))
        yield [*changes, "--config.parallel.data=1 --config.parallel.fsdp=-1"], config


def _changed(config: Config, number: int, **changes: dict[str, Any]) -> Config:
    """The config with fields of a part of stage `number` replaced."""
    stages = list(config.stages)
    stage = stages[number - 1]
    parts = {part: dataclasses.replace(getattr(stage, part), **fields) for part, fields in changes.items()}
    stages[number - 1] = dataclasses.replace(stage, **parts)
    return dataclasses.replace(config, stages=tuple(stages))


# Slices that libtpu compiles for, by their number of chips.
_FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_CUBES = {1: "1x1x1", 4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8"}
TOPOLOGIES = {"v5e": _FLAT, "v6e": _FLAT, "v4": _CUBES, "v5p": _CUBES}


def _topology(config: Config, chip: Chip | None, chips: int, target: str) -> list[Any]:
    """The devices of a TPU slice that is not there. Raises InputError."""
    known = TOPOLOGIES.get(chip.name if chip else "", {})
    _require(bool(known), "--target", target, f"with --compile, {', '.join(TOPOLOGIES)} and a number of chips")
    counts = ", ".join(map(str, known))
    _require(chips in known, "--target", target, f"with --compile, {chip.name} with {counts} chips")
    _require(config.parallel.mode == "pjit", "config.parallel.mode", config.parallel.mode, "with --compile, 'pjit'")
    if importlib.util.find_spec("libtpu") is None:
        raise InputError("--compile=True needs libtpu, which is not installed; pip install 'jax[tpu]' would do.")
    kwargs = {"chips_per_host_bounds": (1, 1, 1)} if chips == 1 else {}
    kwargs |= {"chip_config_name": "megacore"} if chip.name == "v4" else {}  # otherwise its two cores are two devices
    try:
        with _alone():
            return topologies.get_topology_desc(platform="tpu", topology_name=f"{chip.name}:{known[chips]}", **kwargs).devices
    except jax.errors.JaxRuntimeError as error:  # such as its lock, which another process holds
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"--compile=True cannot use libtpu ({reason}); another version of it, or nothing else that uses it, would do."
        ) from error


@contextmanager
def _alone() -> Iterator[None]:
    """Tells libtpu not to look for a TPU, nor for other hosts; it complains at length where there are none."""
    wanted = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v4-8", "TPU_WORKER_HOSTNAMES": "localhost"}
    missing = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(missing)
    try:
        yield
    finally:
        for name in missing:
            os.environ.pop(name, None)


def _compiled(config: Config, number: int, classes: int, devices: list[Any], chip: Chip) -> str:
    """What the compiler says of a stage's step."""
    stage = config.stages[number - 1]
    mesh = sharding.make_mesh(config.parallel.data, config.parallel.fsdp, devices)
    program = PROGRAMS["pjit"](stage, _image_shape(config, number), classes, jax.random.key(0), mesh)
    start, images = time.monotonic(), stage.training.batch_size // stage.training.accumulate // len(devices)
    try:
        with _alone():
            compiled = program.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return f"stage{number} DOES NOT FIT: {exhausted(str(error), images, shard_bytes(program.abstract))}"
    return _compiler_table(number, compiled, time.monotonic() - start, chip, images)


def _compiler_table(number: int, compiled: jax.stages.Compiled, seconds: float, chip: Chip, images: int) -> str:
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    fixed = arguments + memory.output_size_in_bytes - memory.alias_size_in_bytes
    told = ", ".join(f"{kind} {size / 1e9:.3g} GB" for kind, size in sharding.collectives(compiled).items()) or "nothing"
    rows = [
        ["memory a chip: arguments (state, batch)", _gib(arguments)],
        ["... outputs that are not arguments' memory", _gib(fixed - arguments)],
        ["... temporaries", _gib(temporaries)],
        ["... together", f"{(fixed + temporaries) / GIB:.2f} of {chip.gib:g} GiB"],
        ["FLOPs a chip in one run of every loop's body", _number(cost.get("flops", 0.0))],
        ["communicated, results a chip, likewise", told],
        ["compiled in", f"{seconds:.0f} s"],
    ]
    more = int(images * (chip.gib * GIB - fixed) / max(temporaries, 1))
    verdict = (
        f"stage{number} FITS, says the compiler; if temporaries grow with the batch, up to {more} images a chip at a time would."
    )
    return "\n".join([f"### stage{number}, by XLA for {chip.name}", "", markdown(["", ""], rows), "", verdict])


def exhausted(message: str, images: int, fixed: int) -> str:
    """Of XLA's complaint that memory is too small: its words, and the images a chip that may fit.

    Args:
      images: a chip works on at a time.
      fixed: bytes a chip, however many images.
    """
    found = re.search(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?)", message, re.IGNORECASE)
    if not found:
        return f"{' '.join(message.split())[:300]}"
    used, limit = (float(found[i]) * 1024 ** " KMGT".index(found[i + 1].upper() or " ") for i in (1, 3))
    fitting = int(images * (limit - fixed) / max(used - fixed, 1))
    words = f"the compiler used {used / GIB:.2f} of {limit / GIB:.2f} GiB with {images} images a chip at a time"
    if fitting < 1:
        return f"{words}; parallel.fsdp, network.remat='block' or more chips would do."
    return f"{words}; {fitting} of them may fit (training.accumulate), if temporaries grow with the batch; it was not tried."


def _gib(size: int | float) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 or not size else f"{size / 2**20:.3g} MiB"


def _number(value: int | float) -> str:
    """Four digits, and a letter for thousands."""
    for limit, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= limit:
            return f"{value / limit:.4g} {letter}"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
