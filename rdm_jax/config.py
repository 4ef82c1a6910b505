"""What can be set: frozen dataclasses, their way to and from ml_collections, and the checks before any work starts.

A config file returns `Config(...).to_config_dict()`; `--config.stage1.training.images=1000` overrides a field of it, and
`parse` turns the result back into a checked `Config`. The processes, samplers and networks are their own schema: the
dataclasses that do the work are the ones that are filled in here.
"""

import dataclasses
import difflib
import types
import typing
from typing import Any

from ml_collections import ConfigDict

from rdm_jax.diffusion import preconditioning, processes, samplers
from rdm_jax.errors import InputError
from rdm_jax.models.adm import ADM


@dataclasses.dataclass(frozen=True)
class Data:
    """What is learnt. The images are prepared at the last stage's resolution; earlier stages see their means.

    Attributes:
      source: 'digits', 'folder:PATH' or 'emoji:PATH'.
      directory: where the prepared records are, or are to be written.
      channels: 1 or 3.
      background: colour under transparent pixels, 0 to 255 a channel.
      skin_tones: of emoji: 'mark' makes the skin tone the label, 'drop' leaves the variants out; '' for all else.
      cache_gib: the set is decoded into memory where it is not larger than this.
    """

    source: str = "folder:images"
    directory: str = "data/images"
    channels: int = 3
    background: tuple[int, ...] = (255, 255, 255)
    skin_tones: str = ""
    cache_gib: float = 1.0


@dataclasses.dataclass(frozen=True)
class Training:
    """How a stage is trained. Whatever is counted, is counted in images.

    Attributes:
      images: how many are shown, with repetition.
      batch_size: over all devices.
      accumulate: parts into which a batch is cut, one after the other, to save memory.
      learning_rate, warmup: Adam's, rising linearly over the first `warmup` images.
      beta1, beta2, epsilon: Adam's.
      ema_halflife, ema_rampup: half-life of the averaged parameters, and its bound as a share of the images seen (0: none).
      label_dropout: probability that a label is hidden; guidance needs it.
      checkpoint_every, keep_newest, keep_best: when to save, and how many of the newest and of the best to keep.
      preview_every: when to draw a grid of samples; 0 for never.
      log_every: when to write a line of metrics.
      validation: images whose loss under the averaged parameters, with fixed noise, tells the best checkpoint.
      max_skipped: steps in a row with a loss or gradient that is not finite, before the run stops.
    """

    images: int = 2_500_000
    batch_size: int = 256
    accumulate: int = 1
    learning_rate: float = 1e-4
    warmup: int = 10_000
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    ema_halflife: float = 500_000.0
    ema_rampup: float = 0.05
    label_dropout: float = 0.1
    checkpoint_every: int = 50_000
    keep_newest: int = 2
    keep_best: int = 1
    preview_every: int = 50_000
    log_every: int = 2_000
    validation: int = 256
    max_skipped: int = 10

    @property
    def steps(self) -> int:
        """Steps that show at least `images` images."""
        return -(-self.images // self.batch_size)


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of the relay.

    Attributes:
      resolution: height and width of its images.
      guidance: weight of classifier-free guidance in sampling; 1 for none.
      checkpoint: what to sample from: 'newest', 'best', a step's number, or the path of a checkpoint (folder of a step).
    """

    resolution: tuple[int, ...] = (64, 64)
    network: ADM = ADM()
    precondition: preconditioning.EDM = preconditioning.EDM()
    process: processes.Gaussian | processes.Relay = processes.Gaussian()
    training: Training = Training()
    sampler: samplers.Heun | samplers.RelayHeun = samplers.Heun()
    guidance: float = 1.0
    checkpoint: str = "newest"

    @property
    def factor(self) -> int:
        """By how much this stage enlarges the one before it."""
        return self.process.patch if isinstance(self.process, processes.Relay) else 1


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Which images are made in the end.

    Attributes:
      name: folder under the workdir.
      seeds: '0-499', or '1,5,7-9'; an image is its seed's, whatever else is made with it.
      classes: image of seed s gets class classes[s mod len(classes)]; empty for all classes in turn.
      batch_size: images at a time, over all devices.
    """

    name: str = "samples"
    seeds: str = "0-63"
    classes: tuple[int, ...] = ()
    batch_size: int = 16


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run: a relay is a tuple of stages, `stage1`, `stage2`, ... in the config file.

    Attributes:
      seed: of everything random, but for the images' own seeds.
    """

    seed: int = 0
    data: Data = Data()
    stages: tuple[Stage, ...] = (
        Stage(),
        Stage(resolution=(256, 256), process=processes.Relay(), sampler=samplers.RelayHeun()),
    )
    sampling: Sampling = Sampling()

    def to_config_dict(self) -> ConfigDict:
        """The same as an ml_collections ConfigDict, which `--config.field=value` overrides."""
        fields = _to_plain(self)
        stages = {f"stage{i + 1}": stage for i, stage in enumerate(fields.pop("stages"))}
        return ConfigDict({**fields, **stages}, sort_keys=False)


def parse(values: ConfigDict | dict[str, Any]) -> Config:
    """A checked Config from a ConfigDict or a nested dict (such as a saved config.json).

    Raises:
      InputError: a field is unknown, missing or of the wrong type, or the values do not fit each other.
    """
    values = values.to_dict() if isinstance(values, ConfigDict) else dict(values)
    names = sorted((k for k in values if _stage_number(k)), key=_stage_number)
    if [_stage_number(name) for name in names] != list(range(1, len(names) + 1)) or not names:
        raise InputError(f"config has the stages {', '.join(names) or 'none'}; stage1, stage2 and so on without a gap would do.")
    values["stages"] = tuple(_from_plain(Stage, values.pop(name), f"config.{name}") for name in names)
    config = _from_plain(Config, values, "config")
    check(config)
    return config


def _stage_number(name: str) -> int:
    """3 for 'stage3', 0 for what is no stage's name."""
    number = name.removeprefix("stage")
    return int(number) if number != name and number.isdigit() else 0


def check(config: Config) -> None:
    """Refuses values that cannot work, alone or together.

    Raises:
      InputError: names the first such field, its value and what would do.
    """
    for rule in (_check_stage, _check_training, _check_sampler, _check_network):
        for number, stage in enumerate(config.stages, 1):
            rule(stage, f"config.stage{number}")
    for number, (before, stage) in enumerate(zip(config.stages, config.stages[1:], strict=False), 2):
        fitting = tuple(side * stage.factor for side in before.resolution)
        _require(
            stage.resolution == fitting,
            f"config.stage{number}.resolution",
            stage.resolution,
            f"{fitting} (stage {number - 1}'s {before.resolution} times process.patch={stage.factor})",
        )
    for number, stage in enumerate(config.stages, 1):
        wanted = processes.Gaussian if number == 1 else processes.Relay
        _require(
            isinstance(stage.process, wanted), f"config.stage{number}.process.kind", _kind(type(stage.process)), _kind(wanted)
        )
    _require(config.data.channels in (1, 3), "config.data.channels", config.data.channels, "1 or 3")
    _require(config.seed >= 0, "config.seed", config.seed, "0 or more")
    _require(config.sampling.batch_size > 0, "config.sampling.batch_size", config.sampling.batch_size, "a positive number")
    _require(config.sampling.name.isidentifier(), "config.sampling.name", config.sampling.name, "one word, such as 'samples',")
    parse_seeds(config.sampling.seeds)


def check_classes(config: Config, class_names: tuple[str, ...]) -> None:
    """Refuses classes and guidance that the data has no labels for. Raises InputError."""
    for label in config.sampling.classes:
        would_do = f"0 to {len(class_names) - 1}" if class_names else "() for data without classes"
        _require(0 <= label < len(class_names), "config.sampling.classes", config.sampling.classes, would_do)
    for number, stage in enumerate(config.stages, 1):
        usable = stage.guidance == 1 or (class_names and stage.training.label_dropout > 0)
        would_do = "1.0, for data without classes or training.label_dropout=0,"
        _require(usable, f"config.stage{number}.guidance", stage.guidance, would_do)


def check_devices(config: Config, devices: int) -> None:
    """Refuses batches that the devices cannot share. Raises InputError."""
    for number, stage in enumerate(config.stages, 1):
        part, field = stage.training.batch_size // stage.training.accumulate, f"config.stage{number}.training.batch_size"
        would_do = (
            f"a multiple of {devices * stage.training.accumulate} ({devices} devices, accumulate={stage.training.accumulate})"
        )
        _require(part % devices == 0, field, stage.training.batch_size, would_do)
    batch_size = config.sampling.batch_size
    _require(batch_size % devices == 0, "config.sampling.batch_size", batch_size, f"a multiple of {devices} (the devices)")


def parse_seeds(text: str) -> tuple[int, ...]:
    """'0-3,7' as (0, 1, 2, 3, 7). Raises InputError for anything else, and for seeds outside 0 to 2^32 - 1."""
    seeds: list[int] = []
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        numbers = (first, last or first)
        fine = all(n.isdigit() and int(n) < 2**32 for n in numbers) and int(first) <= int(numbers[1])
        _require(fine, "config.sampling.seeds", text, "ranges of numbers from 0 to 4294967295, such as '0-99,200',")
        seeds.extend(range(int(first), int(numbers[1]) + 1))
    return tuple(seeds)


def _require(fine: Any, field: str, value: Any, would_do: str) -> None:
    if not fine:
        raise InputError(f"{field}={value!r} cannot be used; {would_do} would do.")


def _check_stage(stage: Stage, path: str) -> None:
    h_w = stage.resolution
    _require(len(h_w) == 2 and min(h_w) > 0, f"{path}.resolution", h_w, "(height, width)")
    for divisor, what in ((stage.factor, "process.patch"), (stage.network.stride, "the network's stride")):
        fits = all(side % divisor == 0 for side in h_w)
        _require(fits, f"{path}.resolution", h_w, f"a height and width divisible by {divisor} ({what})")
    _require(stage.guidance >= 0, f"{path}.guidance", stage.guidance, "0 or more")
    if isinstance(stage.process, processes.Relay):
        clock = stage.process.clock
        _require(stage.process.patch >= 2, f"{path}.process.patch", stage.process.patch, "2 or more")
        _require(stage.process.block_scale >= 0, f"{path}.process.block_scale", stage.process.block_scale, "0 or more")
        _require(0 < clock.length < 1, f"{path}.process.clock.length", clock.length, "a number between 0 and 1")


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
        _require(getattr(training, field) > 0, f"{path}.training.{field}", getattr(training, field), "a positive number")
    for field in ("learning_rate", "ema_halflife", "epsilon"):
        _require(getattr(training, field) > 0, f"{path}.training.{field}", getattr(training, field), "a positive number")
    for field in ("warmup", "preview_every", "keep_best", "ema_rampup"):
        _require(getattr(training, field) >= 0, f"{path}.training.{field}", getattr(training, field), "0 or more")
    for field in ("label_dropout", "beta1", "beta2"):
        _require(
            0 <= getattr(training, field) < 1, f"{path}.training.{field}", getattr(training, field), "a number from 0 to below 1"
        )
    divides = training.batch_size % training.accumulate == 0
    _require(divides, f"{path}.training.batch_size", training.batch_size, f"a multiple of accumulate={training.accumulate}")


def _check_sampler(stage: Stage, path: str) -> None:
    relayed, sampler = isinstance(stage.process, processes.Relay), stage.sampler
    wanted = samplers.RelayHeun if relayed else samplers.Heun
    _require(isinstance(sampler, wanted), f"{path}.sampler.kind", _kind(type(sampler)), _kind(wanted))
    _require(sampler.steps >= 2, f"{path}.sampler.steps", sampler.steps, "2 or more")
    _require(
        0 < sampler.sigma_min < sampler.sigma_max, f"{path}.sampler.sigma_min", sampler.sigma_min, "less than sigma_max, over 0,"
    )
    if relayed:
        _require(0 <= sampler.eta <= 1, f"{path}.sampler.eta", sampler.eta, "a number from 0 to 1")
        _require(sampler.order in (1, 2), f"{path}.sampler.order", sampler.order, "1 or 2")
        walked = len(sampler.levels(stage.process).sigma)
        _require(walked >= 2, f"{path}.sampler.steps", sampler.steps, f"more (only {walked} of them are under truncation_sigma)")


def _check_network(stage: Stage, path: str) -> None:
    network = stage.network
    _require(network.dtype in ("float32", "bfloat16"), f"{path}.network.dtype", network.dtype, "'float32' or 'bfloat16'")
    _require(0 <= network.dropout < 1, f"{path}.network.dropout", network.dropout, "a number from 0 to below 1")
    for field in ("channels", "blocks", "head_channels", "emb_mult", "patch"):
        _require(getattr(network, field) > 0, f"{path}.network.{field}", getattr(network, field), "a positive number")
    _require(
        network.channel_mult and min(network.channel_mult) > 0, f"{path}.network.channel_mult", network.channel_mult, "(1, 2)"
    )
    _require(network.channels % 4 == 0, f"{path}.network.channels", network.channels, "a multiple of 4")
    for level in network.attention_levels:
        count, field = len(network.channel_mult), f"{path}.network.attention_levels"
        _require(0 <= level < count, field, network.attention_levels, f"levels from 0 to {count - 1}")
        width = network.channels * network.channel_mult[level]
        _require(
            width % network.head_channels == 0, f"{path}.network.head_channels", network.head_channels, f"a divisor of {width}"
        )


def to_dict(config: Config) -> dict[str, Any]:
    """A nested dict of JSON's types, as `parse` takes it."""
    return config.to_config_dict().to_dict()


def _to_plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        hints = typing.get_type_hints(type(value))
        plain = {f.name: _to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        plain = {k: float(v) if hints[k] is float else v for k, v in plain.items()}
        plain.update({k: {"kind": _kind(type(getattr(value, k))), **plain[k]} for k in plain if _choices(hints[k])})
        return plain
    return tuple(map(_to_plain, value)) if isinstance(value, (tuple, list)) else value


def _choices(hint: Any) -> tuple[type, ...]:
    """The dataclasses of a union, () for any other type."""
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else ()


def _kind(cls: type) -> str:
    return cls.__name__.lower()


def _from_plain(hint: Any, value: Any, path: str) -> Any:
    """The inverse of `_to_plain`: `value` as the type `hint`; `path` names it in errors."""
    if dataclasses.is_dataclass(value):
        return value
    if choices := _choices(hint):
        kinds = {_kind(c): c for c in choices}
        value = dict(value)
        kind = value.pop("kind", None)
        if kind not in kinds:
            raise InputError(f"{path}.kind={kind!r} is not known; {' or '.join(map(repr, kinds))} would do.")
        return _from_plain(kinds[kind], value, path)
    if dataclasses.is_dataclass(hint):
        return _dataclass_from_plain(hint, value, path)
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, (tuple, list)):
            value = (value,)
        item = typing.get_args(hint)[0]
        return tuple(_from_plain(item, v, f"{path}[{i}]") for i, v in enumerate(value))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint:
        raise InputError(f"{path}={value!r} is a {type(value).__name__}; a {hint.__name__} would do.")
    return value


def _dataclass_from_plain(cls: type, value: Any, path: str) -> Any:
    fields = {f.name: typing.get_type_hints(cls)[f.name] for f in dataclasses.fields(cls)}
    if not isinstance(value, dict):
        raise InputError(f"{path}={value!r} is a single value; the fields {', '.join(fields)} would do.")
    for name in value:
        if name not in fields:
            close = difflib.get_close_matches(name, fields, n=1) or sorted(fields)
            raise InputError(f"{path}.{name}={value[name]!r} is not a field of the config; {' or '.join(close)} would do.")
    kwargs = {k: _from_plain(fields[k], v, f"{path}.{k}") for k, v in value.items()}
    return cls(**kwargs)
