"""What a config must be before any work starts; every refusal is an InputError that names field,
value and remedy."""

import functools
import math
import re
from collections.abc import Collection
from typing import Any

from rdm_jax.config import Config, Stage, kind_of
from rdm_jax.data import augment, class_rules, images, postprocess, records, sources
from rdm_jax.data.classes import LABEL_RULES, Classes, parse_labels
from rdm_jax.diffusion import processes, samplers
from rdm_jax.models.song import Song
from rdm_jax.models.unet import REMAT
from rdm_jax.runtime import jax_settings, sharding
from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.files import local_path
from rdm_jax.runtime.ranges import parse_list, parse_numbers

LEAST = 4  # images that can be measured: each has 3 neighbours
FOLDER = re.compile(r"\w[\w.-]{0,99}")  # what a folder in a workdir may be called
OF_THE_RUN = re.compile(  # what lies in a workdir besides
    r"stage\d+|checkpoints|report|config\.json|contact_sheet\.png|classifier\.safetensors|tensorboard",
    re.IGNORECASE,
)
IMAGES = ("folder", "zip", "tar")  # kinds of images that are read as they are
FEATURES = ("none", "inception", "classifier")


def check_config(config: Config, *, evaluates: bool = True) -> None:
    """Refuses values that cannot work, alone or together, and settings of jax under which seeds
    would not mean the same.

    Args:
      evaluates: whether something is going to be measured; else `config.evaluation` is not looked
        at.

    Raises:
      InputError: names the first such field, its value and what would do.
    """
    jax_settings.check()
    for rule in (_check_network, _check_process, _check_stage, _check_training, _check_sampler):
        for number, stage in enumerate(config.stages, 1):
            rule(stage, f"config.stage{number}")
    for number, stage in enumerate(config.stages, 1):
        kind, would_do = (
            kind_of(type(stage.process)),
            "'gaussian', 'vp' or 've'" if number == 1 else "'relay' or 'cascade'",
        )
        enlarges = isinstance(stage.process, (processes.Relay, processes.Cascade))
        require(enlarges == (number > 1), f"config.stage{number}.process.kind", kind, would_do)
    for number, (before, stage) in enumerate(
        zip(config.stages, config.stages[1:], strict=False), 2
    ):
        fitting = tuple(side * stage.factor for side in before.resolution)
        require(
            stage.resolution == fitting,
            f"config.stage{number}.resolution",
            stage.resolution,
            f"{fitting} (stage {number - 1}'s {before.resolution} times process.patch={stage.factor})",
        )
    require(0 <= config.seed < 2**32, "config.seed", config.seed, "0 to 4294967295")
    require(
        config.sampling.batch_size > 0,
        "config.sampling.batch_size",
        config.sampling.batch_size,
        "a positive number",
    )
    _check_folder(config.sampling.name, "config.sampling.name")
    names = " or ".join(map(repr, postprocess.PRESETS))
    require(
        config.sampling.postprocess in postprocess.PRESETS,
        "config.sampling.postprocess",
        config.sampling.postprocess,
        names,
    )
    require(
        config.sampling.files in ("npz", "png"),
        "config.sampling.files",
        config.sampling.files,
        "'npz' or 'png'",
    )
    low = config.sampling.low
    fine = not low or _is_of_kind(low, IMAGES, "config.sampling.low")
    require(
        fine, "config.sampling.low", low, "'folder:PATH', 'zip:PATH', 'tar:PATH', or '' for none,"
    )
    _check_data(config)
    parse_numbers(config.sampling.seeds, "config.sampling.seeds")
    if config.sampling.labels not in LABEL_RULES:  # which classes there are is known later
        named = all(parse_list(config.sampling.labels, "config.sampling.labels"))
        would_do = "'balanced', 'random', or names or numbers of classes with commas between, such as 'cat, dog' or '0-3',"
        require(named, "config.sampling.labels", config.sampling.labels, would_do)
    if evaluates:
        _check_evaluation(config)


def _check_folder(name: str, field: str) -> None:
    """What a folder of results in a workdir may be called."""
    would_do = "one name of letters, digits, '-', '_' and '.', such as 'my-run', of nothing else in a workdir,"
    require(FOLDER.fullmatch(name) and not OF_THE_RUN.fullmatch(name), field, name, would_do)


def _is_of_kind(spec: str, kinds: tuple[str, ...], field: str) -> bool:
    """Whether a text is 'KIND:PATH' of one of these kinds. Raises InputError where the path is a
    URL."""
    kind, _, path = spec.partition(":")
    local_path(path if kind in kinds else spec, field)
    return kind in kinds and bool(path)


def _check_evaluation(config: Config) -> None:
    values = config.evaluation
    known = " or ".join(map(repr, FEATURES))
    require(values.features in FEATURES, "config.evaluation.features", values.features, known)
    if values.features == "none":
        return
    _check_folder(values.name, "config.evaluation.name")
    require(
        values.name != config.sampling.name,
        "config.evaluation.name",
        values.name,
        "another name than sampling.name",
    )
    local_path(values.weights, "config.evaluation.weights")
    for image_set in measured_sets(config):
        _check_measured(image_set, config)
    given = values.reference in ("training", "held_out")
    given = given or _is_of_kind(
        values.reference, ("prepared", "npz"), "config.evaluation.reference"
    )
    require(
        given,
        "config.evaluation.reference",
        values.reference,
        "'training', 'held_out', 'prepared:PATH' or 'npz:PATH'",
    )
    _check_native(config)
    field, generates = (
        "evaluation.seeds" if values.seeds else "sampling.seeds",
        any(map(is_generated, measured_sets(config))),
    )
    generated = [(field, evaluated_seeds(config))] if generates else []
    for field, seeds in (*generated, ("evaluation.seeds_in_training", values.seeds_in_training)):
        enough = len(parse_numbers(seeds, f"config.{field}")) >= LEAST
        would_do = f"{LEAST} or more seeds, as too few images cannot be measured, or other --config.evaluation.seeds,"
        require(enough, f"config.{field}", seeds, would_do)
    require(values.kept >= LEAST, "config.evaluation.kept", values.kept, f"{LEAST} or more")
    require(
        values.batch_size > 0,
        "config.evaluation.batch_size",
        values.batch_size,
        "a positive number",
    )


def _check_native(config: Config) -> None:
    """What stages may be compared with at their own size."""
    values, field = config.evaluation, "config.evaluation.native_reference"
    spec, of_data = values.native_reference, values.native_reference in ("training", "held_out")
    given = not spec or of_data or _is_of_kind(spec, ("prepared", "npz"), field)
    require(
        given, field, spec, "'training', 'held_out', 'prepared:PATH', 'npz:PATH', or '' for none,"
    )
    native = next((name for name in measured_sets(config) if name.endswith("@native")), "")
    require(
        spec or not native,
        field,
        spec,
        f"'training', 'held_out', 'prepared:PATH' or 'npz:PATH', for {native!r} in images,",
    )
    alone = "'', for features='classifier' are made for images of the final size alone; or features='inception'"
    require(not spec or values.features != "classifier", field, spec, alone)
    for number, stage in enumerate(config.stages[:-1], 1):
        own = f"'prepared:PATH' or 'npz:PATH', for config.stage{number}.source is not what the last stage learns from,"
        require(not (of_data and stage.source), field, spec, own)


def _check_measured(image_set: str, config: Config) -> None:
    """What one part of `evaluation.images` may be."""
    stages = [
        f"stage{number}{end}" for end in ("", "@native") for number in range(1, len(config.stages))
    ]
    given = image_set in ("samples", "held_out", *stages)
    given = given or _is_of_kind(
        image_set, (*IMAGES, "prepared", "npz"), "config.evaluation.images"
    )
    known = ", ".join(
        map(
            repr,
            ["samples", *stages, "held_out", *(f"{kind}:PATH" for kind in IMAGES), "prepared:PATH"],
        )
    )
    require(given, "config.evaluation.images", config.evaluation.images, f"{known} or 'npz:PATH'")
    values, held_out = config.evaluation, config.data.held_out
    needs = "held_out" in (image_set, values.reference, values.native_reference)
    require(
        held_out or not needs,
        "config.data.held_out",
        held_out,
        "more than 0, for 'held_out' in config.evaluation,",
    )


def _check_data(config: Config) -> None:
    data, last = config.data, config.stages[-1]
    try:
        images.ImageSpec(*last.resolution, data.channels, data.background, data.crop).check()
        records.Encoding(data.encoding, data.quality).check()
    except InputError as error:
        raise InputError(f"config.data.{error}") from error
    sources.check_local(data.source, "config.data.source")
    local_path(data.directory, "config.data.directory")
    for number, stage in enumerate(config.stages, 1):
        sources.check_local(stage.source, f"config.stage{number}.source")
    require(
        data.classes in class_rules.RULES,
        "config.data.classes",
        data.classes,
        " or ".join(map(repr, class_rules.RULES)),
    )
    require(
        0 <= data.max_left_out <= 1,
        "config.data.max_left_out",
        data.max_left_out,
        "a number from 0 to 1",
    )
    require(data.cache_gib >= 0, "config.data.cache_gib", data.cache_gib, "0 or more")
    require(data.workers >= 0, "config.data.workers", data.workers, "0 or more")
    require(
        data.worker_timeout > 0,
        "config.data.worker_timeout",
        data.worker_timeout,
        "a positive number of seconds",
    )
    require(data.held_out >= 0, "config.data.held_out", data.held_out, "0 or more")
    require(
        not last.source,
        f"config.stage{len(config.stages)}.source",
        last.source,
        "'', and config.data.source for this one,",
    )


def check_classes(
    config: Config, class_names: tuple[str, ...], trained: Collection[int] = ()
) -> None:
    """Refuses classes and guidance that the data has no labels for. Raises InputError.

    Args:
      trained: numbers of the stages that are going to be trained as the config says; of others, the
        checkpoint says how.
    """
    if config.sampling.labels not in LABEL_RULES:
        parse_labels(config.sampling.labels, Classes(class_names), "config.sampling.labels")
    for number, stage in enumerate(config.stages, 1):
        hidden = number not in trained or stage.training.label_dropout > 0
        usable = stage.guidance == 1 or (class_names and hidden)
        would_do = "1.0, for data without classes or training.label_dropout=0,"
        require(usable, f"config.stage{number}.guidance", stage.guidance, would_do)


def check_devices(
    config: Config, devices: int, local_devices: int, *, evaluates: bool = True
) -> None:
    """Refuses a mesh that the devices do not make, and batches that they cannot share. Raises
    InputError.

    Args:
      devices: of all processes, which train together.
      local_devices: of this one, which samples and evaluates by itself.
      evaluates: whether something is going to be measured.
    """
    parallel = config.parallel
    require(
        parallel.mode in ("pjit", "pmap"), "config.parallel.mode", parallel.mode, "'pjit' or 'pmap'"
    )
    try:
        sizes = sharding.mesh_sizes(parallel.data, parallel.fsdp, devices)
    except ValueError:
        of_all = f"numbers whose product is {devices} (the devices), one of them -1 for the rest,"
        require(False, "config.parallel.data, fsdp", (parallel.data, parallel.fsdp), of_all)
    pmapped = parallel.mode == "pmap" and sizes[1] > 1
    require(
        not pmapped,
        "config.parallel.fsdp",
        parallel.fsdp,
        "1, or parallel.mode='pjit', for 'pmap' only cuts batches,",
    )
    for number, stage in enumerate(config.stages, 1):
        part, field = (
            stage.training.batch_size // stage.training.accumulate,
            f"config.stage{number}.training.batch_size",
        )
        would_do = f"a multiple of {devices * stage.training.accumulate} ({devices} devices, accumulate={stage.training.accumulate})"
        require(part % devices == 0, field, stage.training.batch_size, would_do)
    for part in (
        ("sampling", "evaluation")
        if evaluates and config.evaluation.features != "none"
        else ("sampling",)
    ):
        batch_size, would_do = (
            getattr(config, part).batch_size,
            f"a multiple of {local_devices} (the devices of a process)",
        )
        require(batch_size % local_devices == 0, f"config.{part}.batch_size", batch_size, would_do)


def evaluated_seeds(config: Config) -> str:
    """The seeds of what an evaluation generates."""
    return config.evaluation.seeds or config.sampling.seeds


def is_generated(image_set: str) -> bool:
    """Whether a part of `evaluation.images` is what stages make."""
    return image_set == "samples" or image_set.startswith("stage")


def measured_sets(config: Config) -> tuple[str, ...]:
    """The sets of images that an evaluation measures, each once."""
    return tuple(dict.fromkeys(parse_list(config.evaluation.images, "config.evaluation.images")))


def require(fine: Any, field: str, value: Any, would_do: str) -> None:
    """Refuses a value. Raises InputError."""
    if not fine:
        raise InputError(f"{field}={value!r} cannot be used; {would_do} would do.")


def _check_stage(stage: Stage, path: str) -> None:
    h_w = stage.resolution
    require(len(h_w) == 2 and min(h_w) > 0, f"{path}.resolution", h_w, "(height, width)")
    for divisor, what in (
        (stage.factor, "process.patch"),
        (stage.network.stride, "the network's stride"),
    ):
        fits = all(side % divisor == 0 for side in h_w)
        require(
            fits, f"{path}.resolution", h_w, f"a height and width divisible by {divisor} ({what})"
        )
    require(0 <= stage.guidance < math.inf, f"{path}.guidance", stage.guidance, "0 or more")
    fine = (
        stage.checkpoint in ("newest", "best")
        or stage.checkpoint.isdecimal()
        or "/" in stage.checkpoint
    )
    require(
        fine,
        f"{path}.checkpoint",
        stage.checkpoint,
        "'newest', 'best', a step, or the path of a step's folder",
    )
    start = stage.training.start_from
    require(
        not start or "/" in start,
        f"{path}.training.start_from",
        start,
        "the path of a step's folder, or '' for none,",
    )


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
        require(
            0 <= process.augment_max < math.inf,
            f"{path}.process.augment_max",
            process.augment_max,
            "0 or more",
        )
    if isinstance(process, processes.Relay):
        require(
            0 <= process.block_scale < math.inf,
            f"{path}.process.block_scale",
            process.block_scale,
            "0 or more",
        )
        require(
            process.block_size >= 0,
            f"{path}.process.block_size",
            process.block_size,
            "0 (for p) or more",
        )
        require(
            process.sigma_floor > 0,
            f"{path}.process.sigma_floor",
            process.sigma_floor,
            "a positive number",
        )
        require(
            0 < process.clock.length < 1,
            f"{path}.process.clock.length",
            process.clock.length,
            "a number between 0 and 1",
        )


def _check_schedule(part: Any, path: str) -> None:
    """The fields that VP, VE and iDDPM have in common."""
    for field in (
        "schedule.beta_d",
        "schedule.beta_min",
        "sigma_min",
        "c1",
        "c2",
        "p_std",
        "clock.p_std",
        "noise_scale",
    ):
        value = functools.reduce(
            lambda owner, name: getattr(owner, name, None), field.split("."), part
        )
        require(value is None or value > 0, f"{path}.{field}", value, "a positive number")
    if (epsilon := getattr(part, "epsilon", None)) is not None:
        require(
            1e-6 <= epsilon < 1,
            f"{path}.epsilon",
            epsilon,
            "a number from 1e-6 (float32 knows no less) to below 1",
        )
    if (times := getattr(part, "times", None)) is not None:
        require(times >= 2, f"{path}.times", times, "2 or more")
    if (sigma_max := getattr(part, "sigma_max", None)) is not None:
        require(
            sigma_max > part.sigma_min,
            f"{path}.sigma_max",
            sigma_max,
            f"more than sigma_min={part.sigma_min}",
        )


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
        require(
            getattr(training, field) > 0,
            f"{path}.training.{field}",
            getattr(training, field),
            "a positive number",
        )
    for field in ("learning_rate", "ema_halflife", "epsilon"):
        require(
            getattr(training, field) > 0,
            f"{path}.training.{field}",
            getattr(training, field),
            "a positive number",
        )
    for field in (
        "warmup",
        "preview_every",
        "evaluate_every",
        "keep_best",
        "max_failed_saves",
        "ema_rampup",
        "checkpoint_minutes",
    ):
        require(
            getattr(training, field) >= 0,
            f"{path}.training.{field}",
            getattr(training, field),
            "0 or more",
        )
    for field in ("label_dropout", "augment", "beta1", "beta2"):
        require(
            0 <= getattr(training, field) < 1,
            f"{path}.training.{field}",
            getattr(training, field),
            "a number from 0 to below 1",
        )
    mirrored = training.flip and training.augment > 0
    require(
        not mirrored,
        f"{path}.training.flip",
        training.flip,
        f"False, for training.augment={training.augment} mirrors itself,",
    )
    conditioned, field = stage.network.augment_labels, f"{path}.network.augment_labels"
    wanted = (augment.LABELS,) if training.augment else (0, augment.LABELS)
    require(
        conditioned in wanted,
        field,
        conditioned,
        f"{' or '.join(map(str, wanted))}, for training.augment={training.augment}",
    )
    divides = training.batch_size % training.accumulate == 0
    require(
        divides,
        f"{path}.training.batch_size",
        training.batch_size,
        f"a multiple of accumulate={training.accumulate}",
    )


def _check_sampler(stage: Stage, path: str) -> None:
    sampler, of_process = (
        stage.sampler,
        {processes.Relay: samplers.RelayHeun, processes.Cascade: samplers.CascadeHeun},
    )
    wanted = of_process.get(type(stage.process), samplers.Heun)
    require(
        type(sampler) is wanted,
        f"{path}.sampler.kind",
        kind_of(type(sampler)),
        repr(kind_of(wanted)),
    )
    require(sampler.steps >= 2, f"{path}.sampler.steps", sampler.steps, "2 or more")
    require(
        0 < sampler.sigma_min < sampler.sigma_max,
        f"{path}.sampler.sigma_min",
        sampler.sigma_min,
        "less than sigma_max, over 0,",
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
    require(
        relayed or sampler.sigma_max <= most, f"{path}.sampler.sigma_max", sampler.sigma_max, within
    )
    if isinstance(sampler, samplers.CascadeHeun):
        known = f"0 to {stage.process.augment_max:g} (process.augment_max)"
        require(
            0 <= sampler.augment <= stage.process.augment_max,
            f"{path}.sampler.augment",
            sampler.augment,
            known,
        )
    require(sampler.order in (1, 2), f"{path}.sampler.order", sampler.order, "1 or 2")
    if relayed:
        averaged = ("slopes", "images")
        require(
            sampler.corrector in averaged,
            f"{path}.sampler.corrector",
            sampler.corrector,
            " or ".join(map(repr, averaged)),
        )
        walked = len(sampler.levels(stage.process).sigma)
        require(
            walked >= 2,
            f"{path}.sampler.steps",
            sampler.steps,
            f"more (only {walked} of them are under truncation_sigma)",
        )


def _check_network(stage: Stage, path: str) -> None:
    network = stage.network
    require(
        network.dtype in ("float32", "bfloat16"),
        f"{path}.network.dtype",
        network.dtype,
        "'float32' or 'bfloat16'",
    )
    require(
        network.remat in REMAT,
        f"{path}.network.remat",
        network.remat,
        " or ".join(map(repr, REMAT)),
    )
    require(
        0 <= network.dropout < 1,
        f"{path}.network.dropout",
        network.dropout,
        "a number from 0 to below 1",
    )
    for field in ("channels", "blocks", "head_channels", "noise_mult", "emb_mult", "patch"):
        value = getattr(network, field, 1)  # not every family has every field
        require(value > 0, f"{path}.network.{field}", value, "a positive number")
    require(
        network.channel_mult and min(network.channel_mult) > 0,
        f"{path}.network.channel_mult",
        network.channel_mult,
        "(1, 2)",
    )
    widths = [network.channels * mult for mult in network.channel_mult]
    widths += [network.channels] if isinstance(network, Song) else []  # its stem
    joined = {a + b for a in widths for b in widths}  # by the skip connections
    fine = all(width % 4 == 0 and width % min(32, width // 4) == 0 for width in {*widths, *joined})
    require(
        fine,
        f"{path}.network.channels",
        network.channels,
        "a multiple of 32, for the groups of normalisation,",
    )
    for level in network.attention_levels:
        count, field = len(network.channel_mult), f"{path}.network.attention_levels"
        require(
            0 <= level < count, field, network.attention_levels, f"levels from 0 to {count - 1}"
        )
    if isinstance(network, Song):
        require(
            network.embedding in ("positional", "fourier"),
            f"{path}.network.embedding",
            network.embedding,
            "'positional' or 'fourier'",
        )
        fine = len(network.filter) % 2 == 0 and len(network.filter) > 0 and sum(network.filter)
        require(
            fine,
            f"{path}.network.filter",
            network.filter,
            "an even number of taps, such as (1, 1) or (1, 3, 3, 1),",
        )
        return
    attending = {
        *network.attention_levels,
        len(network.channel_mult) - 1,
    }  # the deepest always attends, if it is wide enough
    for level in sorted(attending):
        width, head = network.channels * network.channel_mult[level], network.head_channels
        fine = (
            width % (width // head) == 0 if width >= head else level not in network.attention_levels
        )
        require(
            fine,
            f"{path}.network.head_channels",
            head,
            f"a divisor of {width} (the width of level {level})",
        )
