"""What a config must be before any work starts; every refusal is an InputError that names field, value and remedy."""

import functools
import math
from typing import Any

from rdm_jax import sharding
from rdm_jax.config import Config, Stage, kind_of
from rdm_jax.data import augment, class_rules, images, postprocess, records, sources
from rdm_jax.diffusion import processes, samplers
from rdm_jax.errors import InputError
from rdm_jax.files import local_path
from rdm_jax.models.song import Song
from rdm_jax.models.unet import REMAT

MAX_NUMBERS = 1_000_000  # images of what is kept in memory until it is written to one file
LEAST = 4  # images that can be measured: each has 3 neighbours
LABEL_RULES = ("balanced", "random")
FEATURES = ("none", "inception", "classifier")


def check_config(config: Config) -> None:
    """Refuses values that cannot work, alone or together.

    Raises:
      InputError: names the first such field, its value and what would do.
    """
    for rule in (_check_network, _check_process, _check_stage, _check_training, _check_sampler):
        for number, stage in enumerate(config.stages, 1):
            rule(stage, f"config.stage{number}")
    for number, stage in enumerate(config.stages, 1):
        kind, would_do = kind_of(type(stage.process)), "'gaussian', 'vp' or 've'" if number == 1 else "'relay' or 'cascade'"
        enlarges = isinstance(stage.process, (processes.Relay, processes.Cascade))
        require(enlarges == (number > 1), f"config.stage{number}.process.kind", kind, would_do)
    for number, (before, stage) in enumerate(zip(config.stages, config.stages[1:], strict=False), 2):
        fitting = tuple(side * stage.factor for side in before.resolution)
        require(
            stage.resolution == fitting,
            f"config.stage{number}.resolution",
            stage.resolution,
            f"{fitting} (stage {number - 1}'s {before.resolution} times process.patch={stage.factor})",
        )
    require(0 <= config.seed < 2**32, "config.seed", config.seed, "0 to 4294967295")
    require(config.sampling.batch_size > 0, "config.sampling.batch_size", config.sampling.batch_size, "a positive number")
    require(config.sampling.name.isidentifier(), "config.sampling.name", config.sampling.name, "one word, such as 'samples',")
    names = " or ".join(map(repr, postprocess.PRESETS))
    require(config.sampling.postprocess in postprocess.PRESETS, "config.sampling.postprocess", config.sampling.postprocess, names)
    require(config.sampling.files in ("npz", "png"), "config.sampling.files", config.sampling.files, "'npz' or 'png'")
    low = config.sampling.low
    fine = not low or low.startswith(("folder:", "zip:", "tar:"))
    require(fine, "config.sampling.low", low, "'folder:PATH', 'zip:PATH', 'tar:PATH', or '' for none,")
    _check_data(config)
    parse_numbers(config.sampling.seeds, "config.sampling.seeds")
    if config.sampling.labels not in LABEL_RULES:
        parse_numbers(config.sampling.labels, "config.sampling.labels")
    _check_evaluation(config)


def _check_evaluation(config: Config) -> None:
    values = config.evaluation
    known = " or ".join(map(repr, FEATURES))
    require(values.features in FEATURES, "config.evaluation.features", values.features, known)
    if values.features == "none":
        return
    require(values.name.isidentifier(), "config.evaluation.name", values.name, "one word, such as 'evaluation',")
    require(values.name != config.sampling.name, "config.evaluation.name", values.name, "another word than sampling.name")
    for image_set in values.images.split(","):
        _check_measured(image_set.strip(), config)
    given = values.reference in ("training", "held_out") or values.reference.startswith(("prepared:", "npz:"))
    require(given, "config.evaluation.reference", values.reference, "'training', 'held_out', 'prepared:PATH' or 'npz:PATH'")
    for field, seeds in (("seeds", evaluated_seeds(config)), ("seeds_in_training", values.seeds_in_training)):
        many = len(parse_numbers(seeds, f"config.evaluation.{field}"))
        require(many >= LEAST, f"config.evaluation.{field}", seeds, f"{LEAST} or more, of too few images nothing can be said,")
    require(values.kept >= LEAST, "config.evaluation.kept", values.kept, f"{LEAST} or more")
    require(values.batch_size > 0, "config.evaluation.batch_size", values.batch_size, "a positive number")


def _check_measured(image_set: str, config: Config) -> None:
    """What one part of `evaluation.images` may be."""
    stages = [f"stage{number}" for number in range(1, len(config.stages))]
    given = image_set in ("samples", "held_out", *stages) or image_set.startswith(
        ("prepared:", "folder:", "zip:", "tar:", "npz:")
    )
    known = ", ".join(map(repr, ["samples", *stages, "held_out", "folder:PATH", "zip:PATH", "tar:PATH", "prepared:PATH"]))
    require(given, "config.evaluation.images", config.evaluation.images, f"{known} or 'npz:PATH'")
    needs, held_out = "held_out" in (image_set, config.evaluation.reference), config.data.held_out
    require(held_out or not needs, "config.data.held_out", held_out, "more than 0, for 'held_out' in config.evaluation,")


def _check_data(config: Config) -> None:
    data, last = config.data, config.stages[-1]
    try:
        images.Form(*last.resolution, data.channels, data.background, data.crop).check()
        records.Encoding(data.encoding, data.quality).check()
    except InputError as error:
        raise InputError(f"config.data.{error}") from error
    sources.check_local(data.source, "config.data.source")
    local_path(data.directory, "config.data.directory")
    for number, stage in enumerate(config.stages, 1):
        sources.check_local(stage.source, f"config.stage{number}.source")
    require(data.classes in class_rules.RULES, "config.data.classes", data.classes, " or ".join(map(repr, class_rules.RULES)))
    require(0 <= data.max_left_out <= 1, "config.data.max_left_out", data.max_left_out, "a number from 0 to 1")
    require(data.cache_gib >= 0, "config.data.cache_gib", data.cache_gib, "0 or more")
    require(data.workers >= 0, "config.data.workers", data.workers, "0 or more")
    require(data.worker_timeout > 0, "config.data.worker_timeout", data.worker_timeout, "a positive number of seconds")
    require(data.held_out >= 0, "config.data.held_out", data.held_out, "0 or more")
    require(not last.source, f"config.stage{len(config.stages)}.source", last.source, "'', and config.data.source for this one,")


def check_classes(config: Config, class_names: tuple[str, ...]) -> None:
    """Refuses classes and guidance that the data has no labels for. Raises InputError."""
    rule = config.sampling.labels
    for label in () if rule in LABEL_RULES else parse_numbers(rule, "config.sampling.labels"):
        would_do = f"classes from 0 to {len(class_names) - 1}" if class_names else "'balanced', for data without classes,"
        require(label < len(class_names), "config.sampling.labels", rule, would_do)
    for number, stage in enumerate(config.stages, 1):
        usable = stage.guidance == 1 or (class_names and stage.training.label_dropout > 0)
        would_do = "1.0, for data without classes or training.label_dropout=0,"
        require(usable, f"config.stage{number}.guidance", stage.guidance, would_do)


def check_devices(config: Config, devices: int, local_devices: int) -> None:
    """Refuses a mesh that the devices do not make, and batches that they cannot share. Raises InputError.

    Args:
      devices: of all processes, which train together.
      local_devices: of this one, which samples and evaluates by itself.
    """
    parallel = config.parallel
    require(parallel.mode in ("pjit", "pmap"), "config.parallel.mode", parallel.mode, "'pjit' or 'pmap'")
    try:
        sizes = sharding.mesh_sizes(parallel.data, parallel.fsdp, devices)
    except ValueError:
        of_all = f"numbers whose product is {devices} (the devices), one of them -1 for the rest,"
        require(False, "config.parallel.data, fsdp", (parallel.data, parallel.fsdp), of_all)
    pmapped = parallel.mode == "pmap" and sizes[1] > 1
    require(not pmapped, "config.parallel.fsdp", parallel.fsdp, "1, or parallel.mode='pjit', for 'pmap' only cuts batches,")
    for number, stage in enumerate(config.stages, 1):
        part, field = stage.training.batch_size // stage.training.accumulate, f"config.stage{number}.training.batch_size"
        would_do = (
            f"a multiple of {devices * stage.training.accumulate} ({devices} devices, accumulate={stage.training.accumulate})"
        )
        require(part % devices == 0, field, stage.training.batch_size, would_do)
    for part in ("sampling",) if config.evaluation.features == "none" else ("sampling", "evaluation"):
        batch_size, would_do = getattr(config, part).batch_size, f"a multiple of {local_devices} (the devices of a process)"
        require(batch_size % local_devices == 0, f"config.{part}.batch_size", batch_size, would_do)


def parse_numbers(text: str, field: str) -> tuple[int, ...]:
    """'0-3,7' as (0, 1, 2, 3, 7). Raises InputError for anything else, and for numbers (seeds, classes) beyond 2^32 - 1."""
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        ends = (first, last or first)
        fine = all(n.isdecimal() and int(n) < 2**32 for n in ends) and int(first) <= int(ends[1])
        require(fine, field, text, "ranges of numbers from 0 to 4294967295, such as '0-99,200',")
        several = range(int(first), int(ends[1]) + 1)
        fine = len(found) + len(several) <= MAX_NUMBERS
        require(fine, field, text, f"at most {MAX_NUMBERS} of them, in several runs with other names,")
        found.extend(several)
    return tuple(found)


def evaluated_seeds(config: Config) -> str:
    """The seeds of what an evaluation generates."""
    return config.evaluation.seeds or config.sampling.seeds


def require(fine: Any, field: str, value: Any, would_do: str) -> None:
    """Refuses a value. Raises InputError."""
    if not fine:
        raise InputError(f"{field}={value!r} cannot be used; {would_do} would do.")


def _check_stage(stage: Stage, path: str) -> None:
    h_w = stage.resolution
    require(len(h_w) == 2 and min(h_w) > 0, f"{path}.resolution", h_w, "(height, width)")
    for divisor, what in ((stage.factor, "process.patch"), (stage.network.stride, "the network's stride")):
        fits = all(side % divisor == 0 for side in h_w)
        require(fits, f"{path}.resolution", h_w, f"a height and width divisible by {divisor} ({what})")
    require(0 <= stage.guidance < math.inf, f"{path}.guidance", stage.guidance, "0 or more")
    fine = stage.checkpoint in ("newest", "best") or stage.checkpoint.isdecimal() or "/" in stage.checkpoint
    require(fine, f"{path}.checkpoint", stage.checkpoint, "'newest', 'best', a step, or the path of a step's folder")
    start = stage.training.start_from
    require(not start or "/" in start, f"{path}.training.start_from", start, "the path of a step's folder, or '' for none,")


def _check_process(stage: Stage, path: str) -> None:
    process, sigma_data = stage.process, getattr(stage.precondition, "sigma_data", None)
    if sigma_data is not None:
        require(sigma_data > 0, f"{path}.precondition.sigma_data", sigma_data, "a positive number")
        agree = f"{sigma_data} (precondition.sigma_data)"
        assumed = getattr(process, "sigma_data", sigma_data)
        require(assumed == sigma_data, f"{path}.process.sigma_data", assumed, agree)
    for part, values in (("process", process), ("precondition", stage.precondition)):
        _check_schedule(values, f"{path}.{part}")
    if isinstance(process, (processes.Relay, processes.Cascade)):
        require(process.patch >= 2, f"{path}.process.patch", process.patch, "2 or more")
    if isinstance(process, processes.Cascade):
        require(0 <= process.augment_max < math.inf, f"{path}.process.augment_max", process.augment_max, "0 or more")
    if isinstance(process, processes.Relay):
        require(0 <= process.block_scale < math.inf, f"{path}.process.block_scale", process.block_scale, "0 or more")
        require(process.block_size >= 0, f"{path}.process.block_size", process.block_size, "0 (for p) or more")
        require(process.sigma_floor > 0, f"{path}.process.sigma_floor", process.sigma_floor, "a positive number")
        require(0 < process.clock.length < 1, f"{path}.process.clock.length", process.clock.length, "a number between 0 and 1")


def _check_schedule(part: Any, path: str) -> None:
    """The fields that VP, VE and iDDPM have in common."""
    for field in ("schedule.beta_d", "schedule.beta_min", "sigma_min", "c1", "c2", "p_std", "clock.p_std", "noise_scale"):
        value = functools.reduce(lambda owner, name: getattr(owner, name, None), field.split("."), part)
        require(value is None or value > 0, f"{path}.{field}", value, "a positive number")
    if (epsilon := getattr(part, "epsilon", None)) is not None:
        require(1e-6 <= epsilon < 1, f"{path}.epsilon", epsilon, "a number from 1e-6 (float32 knows no less) to below 1")
    if (times := getattr(part, "times", None)) is not None:
        require(times >= 2, f"{path}.times", times, "2 or more")
    if (sigma_max := getattr(part, "sigma_max", None)) is not None:
        require(sigma_max > part.sigma_min, f"{path}.sigma_max", sigma_max, f"more than sigma_min={part.sigma_min}")


def _check_training(stage: Stage, path: str) -> None:
    training = stage.training
    for field in (
        "images",
        "batch_size",
        "accumulate",
        "checkpoint_every",
        "log_every",
        "keep_newest",
        "validation",
        "max_skipped",
    ):
        require(getattr(training, field) > 0, f"{path}.training.{field}", getattr(training, field), "a positive number")
    for field in ("learning_rate", "ema_halflife", "epsilon"):
        require(getattr(training, field) > 0, f"{path}.training.{field}", getattr(training, field), "a positive number")
    for field in ("warmup", "preview_every", "evaluate_every", "keep_best", "max_failed_saves", "ema_rampup"):
        require(getattr(training, field) >= 0, f"{path}.training.{field}", getattr(training, field), "0 or more")
    for field in ("label_dropout", "augment", "beta1", "beta2"):
        require(
            0 <= getattr(training, field) < 1, f"{path}.training.{field}", getattr(training, field), "a number from 0 to below 1"
        )
    mirrored = training.flip and training.augment > 0
    require(
        not mirrored, f"{path}.training.flip", training.flip, f"False, for training.augment={training.augment} mirrors itself,"
    )
    conditioned, field = stage.network.augment_labels, f"{path}.network.augment_labels"
    wanted = (augment.LABELS,) if training.augment else (0, augment.LABELS)
    require(
        conditioned in wanted, field, conditioned, f"{' or '.join(map(str, wanted))}, for training.augment={training.augment}"
    )
    divides = training.batch_size % training.accumulate == 0
    require(divides, f"{path}.training.batch_size", training.batch_size, f"a multiple of accumulate={training.accumulate}")


def _check_sampler(stage: Stage, path: str) -> None:
    sampler, of_process = stage.sampler, {processes.Relay: samplers.RelayHeun, processes.Cascade: samplers.CascadeHeun}
    wanted = of_process.get(type(stage.process), samplers.Heun)
    require(type(sampler) is wanted, f"{path}.sampler.kind", kind_of(type(sampler)), repr(kind_of(wanted)))
    require(sampler.steps >= 2, f"{path}.sampler.steps", sampler.steps, "2 or more")
    require(
        0 < sampler.sigma_min < sampler.sigma_max, f"{path}.sampler.sigma_min", sampler.sigma_min, "less than sigma_max, over 0,"
    )
    require(sampler.rho > 0, f"{path}.sampler.rho", sampler.rho, "a positive number")
    for field in ("churn", "churn_min", "churn_noise", "truncation_time"):
        value = getattr(sampler, field, 0.0)  # not every sampler has every field
        require(0 <= value < math.inf, f"{path}.sampler.{field}", value, "0 or more")
    require(0 <= sampler.eta <= 1, f"{path}.sampler.eta", sampler.eta, "a number from 0 to 1")
    least, most = stage.precondition.range
    within = f"{least:.4g} or more, what the network knows by its preconditioning,"
    require(sampler.sigma_min >= least, f"{path}.sampler.sigma_min", sampler.sigma_min, within)
    within = f"{most:.5g} or less, what the network knows by its preconditioning,"
    relayed = isinstance(sampler, samplers.RelayHeun)
    require(relayed or sampler.sigma_max <= most, f"{path}.sampler.sigma_max", sampler.sigma_max, within)
    if isinstance(sampler, samplers.CascadeHeun):
        known = f"0 to {stage.process.augment_max:g} (process.augment_max)"
        require(0 <= sampler.augment <= stage.process.augment_max, f"{path}.sampler.augment", sampler.augment, known)
    require(sampler.order in (1, 2), f"{path}.sampler.order", sampler.order, "1 or 2")
    if relayed:
        averaged = ("slopes", "images")
        require(sampler.corrector in averaged, f"{path}.sampler.corrector", sampler.corrector, " or ".join(map(repr, averaged)))
        walked = len(sampler.levels(stage.process).sigma)
        require(walked >= 2, f"{path}.sampler.steps", sampler.steps, f"more (only {walked} of them are under truncation_sigma)")


def _check_network(stage: Stage, path: str) -> None:
    network = stage.network
    require(network.dtype in ("float32", "bfloat16"), f"{path}.network.dtype", network.dtype, "'float32' or 'bfloat16'")
    require(network.remat in REMAT, f"{path}.network.remat", network.remat, " or ".join(map(repr, REMAT)))
    require(0 <= network.dropout < 1, f"{path}.network.dropout", network.dropout, "a number from 0 to below 1")
    for field in ("channels", "blocks", "head_channels", "noise_mult", "emb_mult", "patch"):
        value = getattr(network, field, 1)  # not every family has every field
        require(value > 0, f"{path}.network.{field}", value, "a positive number")
    require(
        network.channel_mult and min(network.channel_mult) > 0, f"{path}.network.channel_mult", network.channel_mult, "(1, 2)"
    )
    widths = [network.channels * mult for mult in network.channel_mult]
    widths += [network.channels] if isinstance(network, Song) else []  # its stem
    joined = {a + b for a in widths for b in widths}  # by the skip connections
    fine = all(width % 4 == 0 and width % min(32, width // 4) == 0 for width in {*widths, *joined})
    require(fine, f"{path}.network.channels", network.channels, "a multiple of 32, for the groups of normalisation,")
    for level in network.attention_levels:
        count, field = len(network.channel_mult), f"{path}.network.attention_levels"
        require(0 <= level < count, field, network.attention_levels, f"levels from 0 to {count - 1}")
    if isinstance(network, Song):
        require(
            network.embedding in ("positional", "fourier"),
            f"{path}.network.embedding",
            network.embedding,
            "'positional' or 'fourier'",
        )
        fine = len(network.filter) % 2 == 0 and len(network.filter) > 0 and sum(network.filter)
        require(fine, f"{path}.network.filter", network.filter, "an even number of taps, such as (1, 1) or (1, 3, 3, 1),")
        return
    attending = {*network.attention_levels, len(network.channel_mult) - 1}  # the deepest always attends, if it is wide enough
    for level in sorted(attending):
        width, head = network.channels * network.channel_mult[level], network.head_channels
        fine = width % (width // head) == 0 if width >= head else level not in network.attention_levels
        require(fine, f"{path}.network.head_channels", head, f"a divisor of {width} (the width of level {level})")
