"""What a training takes, before it begins, on chips that need not be there: as text, with a verdict
and what would do.

Nothing is compiled for it but on request.
"""

import dataclasses
from collections.abc import Iterator

import jax

from rdm_jax.config import Config, kind_of, validate
from rdm_jax.config.validate import require
from rdm_jax.plan.chips import CHIPS, Chip, chip_of
from rdm_jax.plan.cost import TrainingCost, step_seconds, training_cost
from rdm_jax.plan.tpu_compile import compiled_stage, topology
from rdm_jax.render.tables import GIB, in_gib, markdown, short
from rdm_jax.runtime import sharding

ENOUGH = 8  # images a chip at a time, below which a remedy that leaves room for more is looked for

FILLED = 0.9  # share of the memory that an estimate may take


def plan(
    config: Config,
    target: str,
    *,
    utilisation: float,
    classes: int,
    compile: bool,
    stage: int | None = None,
) -> str:
    """What the training of every stage takes, as text: tables in Markdown, and a verdict a stage.

    Args:
      config: of the run; no data is needed.
      target: 'NAME-CHIPS', such as 'v5e-16' (chips, also of v4 and v5p), or 'here' for the devices
        that JAX finds.
      utilisation: share of the peak FLOP/s that is reached (model FLOPs; what is computed again
        does not count).
      classes: of the images; 0 for none.
      compile: for the target, a TPU, and show the compiler's figures. A large network takes half an
        hour.
      stage: of this stage alone, from 1; None for all.

    Raises:
      InputError: one of these, or the config's way of sharing chips, cannot be used.
    """
    require(0 < utilisation <= 1, "--utilisation", utilisation, "a number above 0 and up to 1")
    require(classes >= 0, "--classes", classes, "0 for none, or more")
    numbers = range(1, len(config.stages) + 1)
    require(stage is None or stage in numbers, "--stage", stage, f"1 to {len(config.stages)}")
    chip, chips, name = _parse_target(target)
    validate.check_config(config, evaluates=False)
    validate.check_devices(config, chips, 1, evaluates=False)
    devices = topology(config, chip, chips, target) if compile else None
    parts, totals = [_heading(config, chip, chips, name, utilisation)], []
    for number in numbers if stage is None else [stage]:
        needs = training_cost(config, number, chips, classes)
        parts.append(_section(config, number, needs, chip, chips, utilisation))
        parts.append(_verdict(config, number, needs, chip, chips, classes))
        if devices is not None:
            parts.append(compiled_stage(config, number, classes, devices, chip))
        totals.append(_hours(config, number, needs, chip, chips, utilisation) if chip else 0.0)
    if chip and stage is None:
        parts.append(
            f"All stages, one after the other: {short(sum(totals))} hours, {short(chips * sum(totals))} chip-hours."
        )
    return "\n\n".join(parts)


def _parse_target(target: str) -> tuple[Chip | None, int, str]:
    """(chip, None if its figures are not known; how many; what to call them). Raises InputError."""
    if target == "here":
        kind = jax.devices()[0].device_kind
        return chip_of(kind), jax.device_count(), kind
    name, _, count = target.lower().rpartition("-")
    chip = next((chip for chip in CHIPS if chip.name == name), None)
    fine = chip is not None and count.isdecimal() and int(count) > 0
    require(
        fine,
        "--target",
        target,
        f"'here', or {', '.join(c.name for c in CHIPS)} with a number of chips, as in 'v5e-16',",
    )
    return chip, int(count), chip.name


def _heading(config: Config, chip: Chip | None, chips: int, name: str, utilisation: float) -> str:
    data, fsdp = sharding.mesh_sizes(config.parallel.data, config.parallel.fsdp, chips)
    lines = [
        f"# {chips} x {name}, parallel.mode={config.parallel.mode}, mesh {data} (data) x {fsdp} (fsdp)",
        "",
    ]
    if chip is None:
        return "\n".join(
            [
                *lines,
                f"No peak FLOP/s, memory or interconnect of {name!r} are known here: hours are left out.",
            ]
        )
    lines += [
        f"A chip: {chip.bfloat16 / 1e12:.4g} TFLOP/s in bfloat16, {chip.float32 / 1e12:.4g} in float32, {chip.gib:g} GiB, sends "
        f"{chip.interconnect / 1e9:g} GB/s; hours at {utilisation:.0%} of the peak, communication and sampling left out.",
        "Activations are what JAX keeps from the forward to the backward pass, an estimate: the compiler computes some of it "
        "again, and pads what it lays out.",
    ]
    notes = [chip.note.format(name=name, chips=chips, cores=2 * chips)] if chip.note else []
    if chips > chip.pod:
        notes.append(
            f"beyond {chip.pod} chips communication goes over a slower network, and takes longer than said"
        )
    return "\n".join(lines + [f"Note: {note}." for note in notes])


def _section(
    config: Config,
    number: int,
    needs: TrainingCost,
    chip: Chip | None,
    chips: int,
    utilisation: float,
) -> str:
    """The table of a stage."""
    stage = config.stage(number)
    training, network = stage.training, stage.network
    size, kind = " x ".join(map(str, stage.resolution)), kind_of(type(network))
    rows = [
        ["parameters", f"{short(needs.parameters)}"],
        ["multiply-adds, forward, an image", f"{short(needs.multiply_adds)}"],
        [f"FLOPs a step (2 x 3 x {training.batch_size} images)", f"{short(needs.flops)}"],
    ]
    if network.remat == "block":
        rows.append(["... with blocks computed again (x 4/3)", f"{short(needs.flops * 4 / 3)}"])
    rows += _memory_rows(needs, chip) + _exchange_rows(needs)
    if chip:
        rows += _time_rows(config, number, needs, chip, chips, utilisation)
    about = f"## stage{number}: {kind}, {size}, {network.dtype}, remat={network.remat}, accumulate={training.accumulate}"
    return "\n".join([about, "", markdown(["", ""], rows)])


def _memory_rows(needs: TrainingCost, chip: Chip | None) -> list[list[str]]:
    of = f" of {chip.gib:g}" if chip else ""
    return [
        ["memory a chip: parameters, average, optimizer", in_gib(needs.state)],
        ["... gradients", in_gib(needs.gradients)],
        ["... parameters whole, as computed with", in_gib(needs.copies)],
        [f"... activations, {needs.images} images at a time (estimate)", in_gib(needs.activations)],
        ["... together", f"{needs.memory / GIB:.2f}{of} GiB"],
    ]


def _exchange_rows(needs: TrainingCost) -> list[list[str]]:
    rows = [
        [f"a step's {e.kind} over {e.chips} chips", f"{e.size / 1e9:.3g} GB"]
        for e in needs.exchanges
    ]
    return [*rows, ["sent by a chip a step", f"{needs.sent / 1e9:.3g} GB"]]


def _time_rows(
    config: Config, number: int, needs: TrainingCost, chip: Chip, chips: int, utilisation: float
) -> list[list[str]]:
    stage = config.stage(number)
    computing, sending = (
        step_seconds(needs, chip, chips, stage.network.dtype, utilisation),
        needs.sent / chip.interconnect,
    )
    hours = _hours(config, number, needs, chip, chips, utilisation)
    rows = [
        ["a step computes", f"{short(computing)} s"],
        [
            "a step communicates, at the links' rate",
            f"{short(sending)} s{', MORE THAN IT COMPUTES' * (sending > computing)}",
        ],
        ["images, steps", f"{short(stage.training.images)}, {stage.training.steps:,}"],
        ["hours", short(hours)],
        ["chip-hours", short(hours * chips)],
    ]
    if stage.network.remat == "block":
        rows.append(["... if what is computed again adds to it", short(hours * chips * 4 / 3)])
    return rows


def _hours(
    config: Config, number: int, needs: TrainingCost, chip: Chip, chips: int, utilisation: float
) -> float:
    stage = config.stage(number)
    return (
        stage.training.steps
        * step_seconds(needs, chip, chips, stage.network.dtype, utilisation)
        / 3600
    )


def _verdict(
    config: Config, number: int, needs: TrainingCost, chip: Chip | None, chips: int, classes: int
) -> str:
    """Whether the stage fits, as far as an estimate can tell, and what would do if not."""
    name = f"stage{number}"
    if chip is None:
        return f"{name}: {in_gib(needs.memory)} a device by estimate; whether that fits is for you to see."
    left, says = (
        chip.gib * GIB - needs.memory,
        f"{needs.memory / GIB:.1f} of {chip.gib:g} GiB by estimate",
    )
    truth = (
        "--compile has the compiler's word"
        if chip.name.startswith("v")
        else "a trial step has the last word"
    )
    if needs.memory <= FILLED * chip.gib * GIB:
        return f"{name} FITS: {says}, {left / GIB:.1f} GiB left; {truth}."
    if left >= 0:
        return f"{name} MAY FIT: {says}, little is left; {truth}. Safer: {_remedy(config, number, chip, chips, classes)}."
    return f"{name} DOES NOT FIT: {says}. What would do: {_remedy(config, number, chip, chips, classes)}."


def _remedy(config: Config, number: int, chip: Chip, chips: int, classes: int) -> str:
    """The first, of what costs little to what costs more, that leaves room for `ENOUGH` images a
    chip; else the best."""
    room, best = FILLED * chip.gib * GIB, (0, "")
    for changes, changed in _remedies(config, number, chips):
        training = changed.stage(number).training
        parts = training.batch_size // chips
        needs = training_cost(
            changed.with_stage(number, training={"accumulate": parts}), number, chips, classes
        )
        fitting = max(
            (
                n
                for n in range(1, parts + 1)
                if parts % n == 0 and needs.fixed + n * needs.activations <= room
            ),
            default=0,
        )
        accumulate = (
            f"--config.stage{number}.training.accumulate={parts // fitting}" if fitting else ""
        )
        if fitting > best[0]:
            best = (
                fitting,
                " ".join(filter(None, [*changes, accumulate]))
                + f" ({fitting} images a chip at a time)",
            )
        if fitting >= min(ENOUGH, parts):
            break
    return best[1] or "more chips, or a smaller network"


def _remedies(config: Config, number: int, chips: int) -> Iterator[tuple[list[str], Config]]:
    """The config with more and more changes that save memory, and their flags."""
    changes: list[str] = []
    yield changes, config
    network, field = config.stage(number).network, f"--config.stage{number}.network"
    if network.remat != "block":
        config = config.with_stage(number, network={"remat": "block"})
        yield (changes := [*changes, f"{field}.remat=block"]), config
    if network.dtype != "bfloat16":
        config = config.with_stage(number, network={"dtype": "bfloat16"})
        yield (changes := [*changes, f"{field}.dtype=bfloat16"]), config
    if chips > 1 and config.parallel.mode == "pjit":
        config = dataclasses.replace(
            config, parallel=dataclasses.replace(config.parallel, data=1, fsdp=-1)
        )
        yield [*changes, "--config.parallel.data=1 --config.parallel.fsdp=-1"], config
