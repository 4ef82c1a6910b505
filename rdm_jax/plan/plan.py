"""A plan of a training on chips that need not exist here: tables, and a verdict with a remedy.

Nothing is compiled unless that is requested.
"""

import dataclasses
from collections.abc import Iterator

import jax

from rdm_jax.config import Config, Stage, kind_of, validate
from rdm_jax.config.rules import refuse_latents
from rdm_jax.plan.chips import CHIPS, Chip, chip_of
from rdm_jax.plan.cost import TrainingCost, step_seconds, training_cost
from rdm_jax.plan.tpu_compile import compiled_stage, topology
from rdm_jax.render.tables import GIB, in_gib, markdown, short
from rdm_jax.runtime import sharding
from rdm_jax.runtime.errors import InputError
from rdm_jax.sampling import guides

ENOUGH = 8  # images per chip at a time; a remedy should leave room for them
FILLED = 0.9  # share of the memory that an estimate may take


@dataclasses.dataclass(frozen=True)
class _Target:
    """The chips of a plan.

    Attributes:
      chip: None if its published figures are unknown.
      count: number of chips.
      name: for the text.
      utilisation: the share of the peak FLOP/s that is reached.
    """

    chip: Chip | None
    count: int
    name: str
    utilisation: float

    def step_seconds(self, cost: TrainingCost, dtype: str) -> float:
        return step_seconds(cost, self.chip, self.count, dtype, self.utilisation)


def plan(
    config: Config,
    target: str,
    *,
    utilisation: float,
    classes: int,
    compile: bool,
    stage: int | None = None,
) -> str:
    """The plan of every stage's training: tables in Markdown, and a verdict per stage.

    Args:
      config: of the run; no data is needed.
      target: 'NAME-CHIPS', such as 'v5e-16' (chips, also for v4 and v5p), or 'here' for the devices
        that JAX finds.
      utilisation: the share of the peak FLOP/s that is reached (model FLOPs; rematerialisation does
        not count).
      classes: of the images; 0 for none.
      compile: whether to compile for the target, a TPU, and show the compiler's figures. A large
        network takes half an hour.
      stage: the only stage to plan, from 1; None for all.

    Raises:
      InputError: an argument, or the config's way of sharding, cannot be used.
    """
    refuse_latents(config, "a plan")
    _check_arguments(config, utilisation, classes, stage)
    where = _parse_target(target, utilisation)
    validate.check_config(config, evaluates=False)
    validate.check_devices(config, where.count, 1, evaluates=False)
    devices = topology(config, where.chip, where.count, target) if compile else None
    parts, total = [_heading(config, where)], 0.0
    for number in range(1, len(config.stages) + 1) if stage is None else [stage]:
        cost = training_cost(config, number, where.count, classes)
        parts.append(_section(config, number, cost, where, classes))
        parts.append(_verdict(config, number, cost, where, classes))
        if devices is not None:
            parts.append(compiled_stage(config, number, classes, devices, where.chip))
        if where.chip:
            total += _hours(config, number, cost, where)
    if where.chip and stage is None:
        chip_hours = short(where.count * total)
        parts.append(f"All stages in sequence: {short(total)} hours, {chip_hours} chip-hours.")
    return "\n\n".join(parts)


def _check_arguments(config: Config, utilisation: float, classes: int, stage: int | None) -> None:
    if not 0 < utilisation <= 1:
        raise InputError(
            f"--utilisation={utilisation!r} is not a share", "Use a number above 0 and up to 1."
        )
    if classes < 0:
        raise InputError(f"--classes={classes!r} is negative", "Use 0 for none, or more.")
    count = len(config.stages)
    if stage is not None and not 1 <= stage <= count:
        raise InputError(f"--stage={stage!r} is not a stage of the config", f"Use 1 to {count}.")


def _parse_target(target: str, utilisation: float) -> _Target:
    """Parses 'here' and 'NAME-CHIPS'. Raises InputError."""
    if target == "here":
        kind = jax.devices()[0].device_kind
        return _Target(chip_of(kind), jax.device_count(), kind, utilisation)
    name, _, count = target.lower().rpartition("-")
    chip = next((chip for chip in CHIPS if chip.name == name), None)
    if chip is None or not count.isdecimal() or int(count) == 0:
        names = ", ".join(chip.name for chip in CHIPS)
        raise InputError(
            f"--target={target!r} is not known",
            f"Use 'here', or {names} with a number of chips, as in 'v5e-16'.",
        )
    return _Target(chip, int(count), chip.name, utilisation)


def _heading(config: Config, where: _Target) -> str:
    chip = where.chip
    data, fsdp = sharding.mesh_sizes(config.parallel.data, config.parallel.fsdp, where.count)
    lines = [
        f"# {where.count} x {where.name}, parallel.mode={config.parallel.mode}, "
        f"mesh {data} (data) x {fsdp} (fsdp)",
        "",
    ]
    if chip is None:
        lines.append(
            f"Peak FLOP/s, memory and interconnect of {where.name!r} are not known: "
            "hours are left out."
        )
        return "\n".join(lines)
    lines += [
        f"Per chip: {chip.bfloat16 / 1e12:.4g} TFLOP/s in bfloat16, {chip.float32 / 1e12:.4g} in "
        f"float32, {chip.gib:g} GiB, sends {chip.interconnect / 1e9:g} GB/s; hours at "
        f"{where.utilisation:.0%} of the peak, without communication and sampling.",
        "Activations are what JAX keeps from the forward to the backward pass, an estimate: the "
        "compiler recomputes some of it, and pads arrays.",
    ]
    if chip.note:
        note = chip.note.format(name=where.name, chips=where.count, cores=2 * where.count)
        lines.append(f"Note: {note}.")
    if where.count > chip.pod:
        lines.append(
            f"Note: beyond {chip.pod} chips communication uses a slower network, and takes longer "
            "than shown."
        )
    return "\n".join(lines)


def _section(config: Config, number: int, cost: TrainingCost, where: _Target, classes: int) -> str:
    """The table of a stage."""
    stage = config.stage(number)
    training, network = stage.training, stage.network
    sampled = guides.multiply_adds(stage, config.data.channels, classes, cost.multiply_adds)
    rows = [
        ["parameters", f"{short(cost.parameters)}"],
        ["multiply-adds, forward, per image", f"{short(cost.multiply_adds)}"],
        [f"FLOPs per step (2 x 3 x {training.batch_size} images)", f"{short(cost.flops)}"],
        [
            f"FLOPs per sampled image ({_evaluations(stage)})",
            short(2.0 * sampled),
        ],
    ]
    if network.remat == "block":
        rows.append(["... with rematerialised blocks (x 4/3)", f"{short(cost.flops * 4 / 3)}"])
    rows += _memory_rows(stage, cost, where.chip) + _exchange_rows(cost)
    if where.chip:
        rows += _time_rows(config, number, cost, where)
    size = " x ".join(map(str, stage.resolution))
    title = (
        f"## stage{number}: {kind_of(type(network))}, {size}, {network.dtype}, "
        f"remat={network.remat}, accumulate={training.accumulate}"
    )
    return "\n".join([title, "", markdown(["", ""], rows)])


def _evaluations(stage: Stage) -> str:
    own, *others = (count // stage.nfe for count in stage.passes)
    words = [f"NFE {stage.nfe}"]
    if own > 1:
        words.append(f"{'two' if own == 2 else own} passes each for guidance")
    if others:
        words.append(f"{sum(others)} of guides")
    return ", ".join(words)


def _memory_rows(stage: Stage, cost: TrainingCost, chip: Chip | None) -> list[list[str]]:
    available = f" of {chip.gib:g}" if chip else ""
    averages = len(stage.training.averages)
    further = f", {averages} further averages" if averages else ""
    return [
        [f"memory per chip: parameters, EMA{further}, optimizer", in_gib(cost.state)],
        ["... gradients", in_gib(cost.gradients)],
        ["... parameters gathered and cast for the pass", in_gib(cost.copies)],
        [f"... activations, {cost.images} images at a time (estimate)", in_gib(cost.activations)],
        ["... in total", f"{cost.memory / GIB:.2f}{available} GiB"],
        *_snapshot_rows(stage, cost),
    ]


def _snapshot_rows(stage: Stage, cost: TrainingCost) -> list[list[str]]:
    """The disk space of the averages' snapshots, in float32."""
    training = stage.training
    if not training.averages:
        return []
    count = -(-training.steps * training.batch_size // training.snapshot_every)
    size = 4 * cost.parameters * len(training.averages)
    return [[f"disk: {count} snapshots of averages, {in_gib(size)} each", in_gib(count * size)]]


def _exchange_rows(cost: TrainingCost) -> list[list[str]]:
    rows = [
        [f"{e.kind} over {e.chips} chips, per step", f"{e.size / 1e9:.3g} GB"]
        for e in cost.exchanges
    ]
    return [*rows, ["sent per chip and step", f"{cost.sent / 1e9:.3g} GB"]]


def _time_rows(config: Config, number: int, cost: TrainingCost, where: _Target) -> list[list[str]]:
    stage = config.stage(number)
    computing = where.step_seconds(cost, stage.network.dtype)
    sending = cost.sent / where.chip.interconnect
    bound = ", MORE THAN COMPUTATION" if sending > computing else ""
    hours = _hours(config, number, cost, where)
    rows = [
        ["computation per step", f"{short(computing)} s"],
        ["communication per step, at the links' rate", f"{short(sending)} s{bound}"],
        ["images, steps", f"{short(stage.training.images)}, {stage.training.steps:,}"],
        ["hours", short(hours)],
        ["chip-hours", short(hours * where.count)],
    ]
    if stage.network.remat == "block":
        rows.append(["... with rematerialisation", short(hours * where.count * 4 / 3)])
    return rows


def _hours(config: Config, number: int, cost: TrainingCost, where: _Target) -> float:
    stage = config.stage(number)
    return stage.training.steps * where.step_seconds(cost, stage.network.dtype) / 3600


def _verdict(config: Config, number: int, cost: TrainingCost, where: _Target, classes: int) -> str:
    """Whether the stage fits, as far as an estimate can tell, and a remedy if not."""
    name, chip = f"stage{number}", where.chip
    if chip is None:
        return f"{name}: {in_gib(cost.memory)} per device by estimate; its memory is not known."
    left = chip.gib * GIB - cost.memory
    estimate = f"{cost.memory / GIB:.1f} of {chip.gib:g} GiB by estimate"
    is_tpu = chip.name.startswith("v")
    truth = "--compile shows the compiler's figures" if is_tpu else "a trial step decides"
    if cost.memory <= FILLED * chip.gib * GIB:
        return f"{name} FITS: {estimate}, {left / GIB:.1f} GiB left; {truth}."
    remedy = _remedy(config, number, chip, where.count, classes)
    if left >= 0:
        return f"{name} MAY FIT: {estimate}, little is left; {truth}. Safer: {remedy}."
    return f"{name} DOES NOT FIT: {estimate}. Use {remedy}."


def _remedy(config: Config, number: int, chip: Chip, chips: int, classes: int) -> str:
    """The cheapest remedy that leaves room for `ENOUGH` images per chip; else the best one."""
    room = FILLED * chip.gib * GIB
    best_count, best = 0, "more chips, or a smaller network"
    for changes, changed in _remedies(config, number, chips):
        parts = changed.stage(number).training.batch_size // chips
        one_image = changed.with_stage(number, training={"accumulate": parts})
        cost = training_cost(one_image, number, chips, classes)
        counts = [n for n in range(1, parts + 1) if parts % n == 0]
        fitting = max((n for n in counts if cost.fixed + n * cost.activations <= room), default=0)
        if fitting > best_count:
            accumulate = f"--config.stage{number}.training.accumulate={parts // fitting}"
            flags = " ".join([*changes, accumulate])
            best_count, best = fitting, f"{flags} ({fitting} images per chip at a time)"
        if fitting >= min(ENOUGH, parts):
            break
    return best


def _remedies(config: Config, number: int, chips: int) -> Iterator[tuple[list[str], Config]]:
    """The config with more and more changes that save memory, and their flags."""
    changes: list[str] = []
    yield changes, config
    network, field = config.stage(number).network, f"--config.stage{number}.network"
    if network.remat != "block":
        config = config.with_stage(number, network={"remat": "block"})
        changes = [*changes, f"{field}.remat=block"]
        yield changes, config
    if network.dtype != "bfloat16":
        config = config.with_stage(number, network={"dtype": "bfloat16"})
        changes = [*changes, f"{field}.dtype=bfloat16"]
        yield changes, config
    if chips > 1 and config.parallel.mode == "pjit":
        parallel = dataclasses.replace(config.parallel, data=1, fsdp=-1)
        config = dataclasses.replace(config, parallel=parallel)
        yield [*changes, "--config.parallel.data=1 --config.parallel.fsdp=-1"], config
