"""Checks of a config before any work: bounds of fields, and what concerns several of them.

Every refusal is an InputError that names field, value and remedy. Bounds of single fields are
declared at the fields (`runtime.fields`); `validate_evaluation` has the rules of `evaluation`,
`validate_captions` those of captions.
"""

import math
from collections.abc import Collection, Mapping
from typing import Any

import jax.numpy as jnp

from rdm_jax.config import validate_captions, validate_evaluation
from rdm_jax.config.codec import choices, field_types, kind_of
from rdm_jax.config.rules import IMAGES, check_folder, is_of_kind, require
from rdm_jax.config.schema import Config
from rdm_jax.config.stage import Stage
from rdm_jax.data import augment, images, records, sources
from rdm_jax.data.classes import LABEL_RULES, Classes, parse_labels
from rdm_jax.diffusion import guidance
from rdm_jax.diffusion.dct_error import BLOCK
from rdm_jax.diffusion.protocols import Joins
from rdm_jax.runtime import jax_settings, sharding
from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.fields import check_bounds
from rdm_jax.runtime.files import local_path
from rdm_jax.runtime.ranges import parse_list, parse_numbers


def check_config(config: Config, *, evaluates: bool = True) -> None:
    """Refuses values that cannot work, alone or together, and settings of jax that change seeds.

    Args:
      config: of the run.
      evaluates: whether anything is measured; otherwise `config.evaluation` is not checked.

    Raises:
      InputError: names the first such field, its value and the remedy.
    """
    jax_settings.check()
    if not config.stages:
        raise InputError("the config has no stages", "Give Config(stages=...) one or more.")
    for stage in config.stages:
        _check_stage(stage, f"config.{stage.name}")
        _check_dct(config, stage, f"config.{stage.name}")
        validate_captions.check_network(config, stage, f"config.{stage.name}")
    _check_chain(config)
    check_bounds(config, "config", skip=("evaluation",))
    _check_sampling(config)
    _check_data(config)
    if evaluates:
        validate_evaluation.check(config)


def check_classes(
    config: Config, class_names: tuple[str, ...], trained: Collection[int] = ()
) -> None:
    """Refuses classes and guidance for which the data has no labels. Raises InputError.

    Args:
      config: of the run.
      class_names: of the data.
      trained: numbers of the stages that are trained with this config; for others the checkpoint
        has the settings.
    """
    if config.sampling.labels not in LABEL_RULES:
        parse_labels(config.sampling.labels, Classes(class_names), "config.sampling.labels")
    for stage in config.stages:
        path = f"config.{stage.name}"
        try:
            conditioned = stage.condition_for(len(class_names)).spec is not None
        except InputError as error:
            raise InputError(f"{path}.{error.problem}", error.fix) from error
        has_null = stage.number not in trained or stage.training.label_dropout > 0
        require(
            (conditioned and has_null) or not any(each.needs_null for each in stage.guidance),
            f"{path}.guidance",
            guidance.shown(stage.guidance),
            "Use 1.0 for a stage without a condition or with training.label_dropout=0.",
        )


def check_captions(config: Config, texts: Mapping[int, Any]) -> None:
    """Refuses captions other than those that a stage is conditioned on. Raises InputError.

    Args:
      config: of the run.
      texts: of the images of the stages that are trained, by number: `ImageSet.text`, None for
        images without captions.
    """
    for number, text in texts.items():
        condition, path = config.stage(number).condition, f"config.stage{number}.condition"
        if "text" not in condition.inputs:
            continue
        if text is None:
            raise InputError(
                f"{path}.kind={kind_of(type(condition))!r}, but the images have no captions",
                "Set config.data.captions, or use another condition.",
            )
        known = dict(zip(("tokens", "width"), condition.inputs["text"].shape, strict=True))
        for field, size in known.items():
            given = getattr(text, field)
            require(
                size == given,
                f"{path}.{field}",
                size,
                f"Use {given}, as the captions of the images have ({text.encoder}).",
            )


def check_devices(
    config: Config, devices: int, local_devices: int, *, evaluates: bool = True
) -> None:
    """Refuses a mesh that does not fit the devices, and batches that they cannot share.

    Args:
      config: of the run.
      devices: of all processes, which train together.
      local_devices: of this process, which samples and evaluates by itself.
      evaluates: whether anything is measured.

    Raises:
      InputError: names the field, its value and the remedy.
    """
    parallel = config.parallel
    check_bounds(parallel, "config.parallel")
    try:
        _, fsdp = sharding.mesh_sizes(parallel.data, parallel.fsdp, devices)
    except ValueError as error:
        raise InputError(
            f"config.parallel.data, fsdp={(parallel.data, parallel.fsdp)!r} cannot be used",
            f"Use numbers whose product is {devices} (the devices), one of them -1 for the rest.",
        ) from error
    require(
        parallel.mode != "pmap" or fsdp == 1,
        "config.parallel.fsdp",
        parallel.fsdp,
        "Use 1, or parallel.mode='pjit': 'pmap' shards batches only.",
    )
    for stage in config.stages:
        training = stage.training
        require(
            training.batch_size // training.accumulate % devices == 0,
            f"config.{stage.name}.training.batch_size",
            training.batch_size,
            f"Use a multiple of {devices * training.accumulate} ({devices} devices, "
            f"accumulate={training.accumulate}).",
        )
    batches = {"sampling": config.sampling.batch_size}
    if evaluates and config.evaluation.features != "none":
        batches["evaluation"] = config.evaluation.batch_size
    for part, batch_size in batches.items():
        require(
            batch_size % local_devices == 0,
            f"config.{part}.batch_size",
            batch_size,
            f"Use a multiple of {local_devices} (the devices of a process).",
        )


def _check_stage(stage: Stage, path: str) -> None:
    check_bounds(stage, path)
    stage.network.check(f"{path}.network")
    _check_process(stage, path)
    _check_path(stage, path)
    for i, entry in enumerate(stage.guidance):
        entry.check(f"{path}.guidance[{i}]")
    _check_resolution(stage, path)
    _check_training(stage, path)
    _check_sampler(stage, path)
    checkpoint, start = stage.checkpoint, stage.training.start_from
    require(
        checkpoint in ("newest", "best") or checkpoint.isdecimal() or "/" in checkpoint,
        f"{path}.checkpoint",
        checkpoint,
        "Use 'newest', 'best', a step, or the path of a step's folder.",
    )
    require(
        not start or "/" in start,
        f"{path}.training.start_from",
        start,
        "Use the path of a step's folder, or '' for none.",
    )


def _check_resolution(stage: Stage, path: str) -> None:
    size = stage.resolution
    require(len(size) == 2 and min(size) > 0, f"{path}.resolution", size, "Use (height, width).")
    for divisor, what in (
        (stage.factor, "process.patch"),
        (stage.network.stride, "the network's stride"),
    ):
        require(
            all(side % divisor == 0 for side in size),
            f"{path}.resolution",
            size,
            f"Use a height and width divisible by {divisor} ({what}).",
        )


def _check_process(stage: Stage, path: str) -> None:
    stage.process.check(f"{path}.process")
    stage.precondition.check(f"{path}.precondition")
    assumed, trained = stage.precondition.data_std, stage.process.data_std
    require(
        None in (assumed, trained) or assumed == trained,
        f"{path}.process.sigma_data",
        trained,
        f"Use {assumed} (precondition.sigma_data).",
    )


def _check_path(stage: Stage, path: str) -> None:
    """The network's times must be those of the process."""
    known, trained = (getattr(part, "path", None) for part in (stage.precondition, stage.process))
    require(
        None in (known, trained) or known == trained,
        f"{path}.precondition.path.noise_scale",
        getattr(known, "noise_scale", None),
        f"Use {getattr(trained, 'noise_scale', None)} (process.path.noise_scale).",
    )


def _check_training(stage: Stage, path: str) -> None:
    training = stage.training
    require(
        not (training.flip and training.augment > 0),
        f"{path}.training.flip",
        training.flip,
        f"Use False: training.augment={training.augment} mirrors images itself.",
    )
    fitting = (augment.LABELS,) if training.augment else (0, augment.LABELS)
    require(
        stage.network.augment_labels in fitting,
        f"{path}.network.augment_labels",
        stage.network.augment_labels,
        f"Use {' or '.join(map(str, fitting))} for training.augment={training.augment}.",
    )
    require(
        training.batch_size % training.accumulate == 0,
        f"{path}.training.batch_size",
        training.batch_size,
        f"Use a multiple of accumulate={training.accumulate}.",
    )


def _check_dct(config: Config, stage: Stage, path: str) -> None:
    """The error in the DCT needs whole blocks, of grey or RGB images."""
    quality, channels = stage.training.dct_quality, config.data.channels
    field, whole = f"{path}.training.dct_quality", all(s % BLOCK == 0 for s in stage.resolution)
    require(
        not quality or channels in (1, 3),
        field,
        quality,
        f"Use 0 for images of {channels} channels.",
    )
    require(
        not quality or whole,
        field,
        quality,
        f"Use 0 for images of {stage.resolution}, which are not whole blocks of {BLOCK} x {BLOCK} "
        "pixels.",
    )


def _check_sampler(stage: Stage, path: str) -> None:
    fitting = [kind_of(cls) for cls in _kinds("sampler") if cls().walks(stage.process)]
    require(
        stage.sampler.walks(stage.process),
        f"{path}.sampler.kind",
        kind_of(type(stage.sampler)),
        f"Use {' or '.join(map(repr, fitting)) or 'a sampler for this process (config.extend)'}.",
    )
    stage.sampler.check(f"{path}.sampler", stage.process, stage.precondition)


def _kinds(field: str) -> tuple[type, ...]:
    """The classes that a field of a stage may hold."""
    return choices(field_types(Stage)[field])


def _check_chain(config: Config) -> None:
    """Each stage must continue from the images of the one before."""
    for stage in config.stages:
        first = stage.number == 1
        fitting = [kind_of(cls) for cls in _kinds("process") if (cls().enlarges == 1) == first]
        require(
            (stage.factor == 1) == first,
            f"config.{stage.name}.process.kind",
            kind_of(type(stage.process)),
            f"Use {' or '.join(map(repr, fitting))}.",
        )
    for before, stage in zip(config.stages, config.stages[1:], strict=False):
        fits = tuple(side * stage.factor for side in before.resolution)
        require(
            stage.resolution == fits,
            f"config.{stage.name}.resolution",
            stage.resolution,
            f"Use {fits} ({before.name}'s {before.resolution} times process.patch={stage.factor}).",
        )
    for stage, after in zip(config.stages, (*config.stages[1:], None), strict=True):
        if stage.sampler.stop:
            _check_stop(stage, after)


def _check_stop(stage: Stage, after: Stage | None) -> None:
    """A stage that stops must stop where the next one joins."""
    field, stop = f"config.{stage.name}.sampler.stop", stage.sampler.stop
    joins, fix = 0.0, "Use 0: no stage follows."
    if after is not None:
        fix = f"Use 0, or a sampler of {after.name} that joins, such as 'jumpheun'."
        if isinstance(after.sampler, Joins):
            joins = after.sampler.joins_at(after.process)
            fix = f"Use 0, or {joins:.6g}, where {after.name} joins (sampler.sigma_max / p)."
    require(math.isclose(stop, joins, rel_tol=1e-5), field, stop, fix)
    known = float(stage.precondition.round(jnp.asarray([stop], jnp.float32))[0])
    require(
        math.isclose(stop, known, rel_tol=1e-5),
        field,
        stop,
        f"Use {known:.8g}, the nearest level that the network knows, and for the next stage's "
        "sampler.sigma_max that times its process.patch.",
    )


def _check_sampling(config: Config) -> None:
    sampling = config.sampling
    check_folder(sampling.name, "config.sampling.name")
    require(
        not sampling.low or is_of_kind(sampling.low, IMAGES, "config.sampling.low"),
        "config.sampling.low",
        sampling.low,
        "Use 'folder:PATH', 'zip:PATH', 'tar:PATH', or '' for none.",
    )
    parse_numbers(sampling.seeds, "config.sampling.seeds")
    if sampling.labels not in LABEL_RULES:  # the classes themselves are known later
        require(
            all(parse_list(sampling.labels, "config.sampling.labels")),
            "config.sampling.labels",
            sampling.labels,
            "Use 'balanced', 'random', or names or indices of classes separated by commas, such as "
            "'cat, dog' or '0-3'.",
        )


def _check_data(config: Config) -> None:
    data, last = config.data, config.stages[-1]
    height, width = last.resolution
    try:
        images.ImageSpec(height, width, data.channels, data.background, data.crop).check()
        records.Encoding(data.encoding, data.quality).check()
    except InputError as error:
        raise InputError(f"config.data.{error.problem}", error.fix) from error
    sources.check_local(data.source, "config.data.source")
    local_path(data.directory, "config.data.directory")
    for stage in config.stages:
        sources.check_local(stage.source, f"config.{stage.name}.source")
    require(
        not last.source,
        f"config.{last.name}.source",
        last.source,
        "Use '', and config.data.source for this stage.",
    )
