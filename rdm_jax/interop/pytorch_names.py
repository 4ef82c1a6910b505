"""The published U-Nets: settings, parameter names and layouts, and ours for each.

"The original" is the published code of EDM and RDM.
"""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

from rdm_jax.config import Stage, kind_of
from rdm_jax.diffusion import preconditioning
from rdm_jax.diffusion.schedules import Linear
from rdm_jax.interop.settings import (
    FIELDS,
    Described,
    integer,
    is_integer,
    no_export,
    number,
    unusable,
)
from rdm_jax.models.adm import ADM
from rdm_jax.models.backbone import vector_size
from rdm_jax.models.song import Song
from rdm_jax.models.unet import UNet
from rdm_jax.runtime.console import log
from rdm_jax.runtime.errors import InputError

ParamPath = tuple[str, ...]

PRECONDITIONS = {
    "EDMPrecond": preconditioning.EDMPreconditioning,
    "VPPrecond": preconditioning.VPPreconditioning,
    "VEPrecond": preconditioning.VEPreconditioning,
    "iDDPMPrecond": preconditioning.IDDPMPreconditioning,
}
NETWORKS = {"DhariwalUNet": ADM, "SongUNet": Song}
# The original's defaults, for files without these settings.
DEFAULT_NETWORK = {
    "EDMPrecond": "DhariwalUNet",
    "VPPrecond": "SongUNet",
    "VEPrecond": "SongUNet",
    "iDDPMPrecond": "DhariwalUNet",
}
DEFAULTS = {
    "DhariwalUNet": {
        "model_channels": 192,
        "channel_mult": [1, 2, 3, 4],
        "num_blocks": 3,
        "attn_resolutions": [32, 16, 8],
    },
    "SongUNet": {
        "model_channels": 128,
        "channel_mult": [1, 2, 2, 2],
        "num_blocks": 4,
        "attn_resolutions": [16],
    },
}
# The original's name to our field. Other settings are handled one by one.
NETWORK_FIELDS = {
    "model_channels": "channels",
    "channel_mult": "channel_mult",
    "num_blocks": "blocks",
    "channel_mult_emb": "emb_mult",
    "augment_dim": "augment_labels",
    "dropout": "dropout",
}
SONG_FIELDS = {
    "embedding_type": "embedding",
    "channel_mult_noise": "noise_mult",
    "resample_filter": "filter",
}
# Bounds of settings: a file is not trusted, and these numbers decide how much memory is used.
INTEGERS = {
    "img_resolution": (1, 2**14),
    "img_channels": (1, 64),
    "label_dim": (0, 10**6),
    "model_channels": (1, 2**14),
    "num_blocks": (1, 64),
    "channel_mult_emb": (1, 64),
    "channel_mult_noise": (1, 64),
    "augment_dim": (0, 64),
    "M": (2, 10**5),
}
LISTS = {"channel_mult": (1, 64), "attn_resolutions": (1, 2**14), "resample_filter": (0, 64)}
WORDS = ("model_type", "embedding_type", "encoder_type", "decoder_type")
# Handled one by one, or without a meaning here (`use_fp16`, `label_dropout`).
IGNORED = {"use_fp16", "label_dropout", "model_type", "img_resolution", "img_channels", "label_dim"}
IGNORED |= {"attn_resolutions", "encoder_type", "decoder_type", "sigma_min", "sigma_max"}
IGNORED |= {"sigma_data", "beta_d", "beta_min", "M", "epsilon_t", "C_1", "C_2"}


def describe(class_name: str, settings: dict[str, Any], stage: Stage) -> Described:
    """Translates the original's settings.

    Args:
      class_name: of the original's preconditioning, one of `PRECONDITIONS`.
      settings: of its constructor, such as {'img_resolution': 64, 'model_channels': 192, ...}.
      stage: for everything that is not in the settings (process, training, sampler, dtype).

    Raises:
      InputError: the network is not supported.
    """
    _check_settings(settings)
    family = settings.get("model_type", DEFAULT_NETWORK[class_name])
    if family not in NETWORKS:
        raise InputError(
            f"the network's model_type={family!r} is unknown", f"Use {' or '.join(NETWORKS)}."
        )
    for name in sorted(settings.keys() - IGNORED - NETWORK_FIELDS.keys() - SONG_FIELDS.keys()):
        log.info("the weights' setting %.40r=%.80r is unknown and ignored", name, settings[name])
    settings = {**DEFAULTS[family], **settings}
    side = settings["img_resolution"]
    stage = dataclasses.replace(
        stage,
        resolution=(side, side),
        network=_network(family, settings, stage.network),
        precondition=_precondition(class_name, settings),
    )
    return Described(stage, settings["img_channels"], settings.get("label_dim", 0))


def _check_settings(settings: dict[str, Any]) -> None:
    """Raises InputError for settings of a wrong type or out of bounds, before anything is built."""

    for name, (least, most) in INTEGERS.items():
        if name in settings or name in ("img_resolution", "img_channels"):
            integer(settings, name, least, most)
    for name, (least, most) in LISTS.items():
        values = settings.get(name, [])
        is_list = isinstance(values, list | tuple) and len(values) <= 16
        if not is_list or not all(is_integer(value, least, most) for value in values):
            raise unusable(name, values, f"a list of at most 16 integers from {least} to {most}")
    for name in WORDS:
        if not isinstance(settings.get(name, ""), str):
            raise unusable(name, settings[name], "a string")


def _network(family: str, settings: dict[str, Any], ours: UNet) -> UNet:
    cls = NETWORKS[family]
    side = settings["img_resolution"]
    values = {"emb_mult": 4, "augment_labels": 0, "dtype": ours.dtype}
    fields = NETWORK_FIELDS | (SONG_FIELDS if cls is Song else {})
    values |= {field: settings[name] for name, field in fields.items() if name in settings}
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    levels = range(len(values["channel_mult"]))
    values["attention_levels"] = tuple(
        level for level in levels if side >> level in settings["attn_resolutions"]
    )
    values["dropout"] = number(settings, "dropout", 0.1, 0.99, least=0.0)
    if cls is Song:
        encoder = settings.get("encoder_type", "standard")
        decoder = settings.get("decoder_type", "standard")
        if encoder not in ("standard", "residual") or decoder != "standard":
            raise InputError(
                f"the network's encoder_type={encoder!r} with decoder_type={decoder!r} is unknown",
                "Use 'standard' or 'residual', with decoder_type 'standard'.",
            )
        values["residual"] = encoder == "residual"
    return cls(**values)


def _precondition(class_name: str, settings: dict[str, Any]) -> preconditioning.Preconditioning:
    value = functools.partial(number, settings)
    if class_name == "EDMPrecond":
        return preconditioning.EDMPreconditioning(sigma_data=value("sigma_data", 0.5))
    if class_name == "VPPrecond":
        schedule = Linear(value("beta_d", 19.9), value("beta_min", 0.1))
        return preconditioning.VPPreconditioning(
            schedule, settings.get("M", 1000), value("epsilon_t", 1e-5)
        )
    if class_name == "VEPrecond":
        return preconditioning.VEPreconditioning(
            value("sigma_min", 0.02), value("sigma_max", 100.0)
        )
    return preconditioning.IDDPMPreconditioning(
        value("C_1", 0.001), value("C_2", 0.008), settings.get("M", 1000)
    )


def settings_of(stage: Stage, channels: int, classes: int) -> tuple[str, dict[str, Any]]:
    """The original's class and settings of a stage's network; the inverse of `describe`.

    Raises:
      InputError: the original has no such network.
    """
    network, precondition = stage.network, stage.precondition
    height = stage.resolution[0]
    class_names = {cls: name for name, cls in PRECONDITIONS.items()}
    families = {cls: name for name, cls in NETWORKS.items()}
    for field, part, known in (
        ("network", network, families),
        ("precondition", precondition, class_names),
    ):
        if type(part) not in known:
            kinds = " or ".join(repr(kind_of(cls)) for cls in known)
            raise no_export(f"{field}.kind={kind_of(type(part))!r}", kinds)
    for field, value, published in (
        ("resolution", stage.resolution, (height, height)),
        ("network.patch", network.patch, 1),
        ("network.head_channels", getattr(network, "head_channels", 64), 64),
        ("precondition.noise_scale", getattr(stage.precondition, "noise_scale", 0.25), 0.25),
    ):
        if value != published:
            raise no_export(f"{field}={value!r}", repr(published))
    class_name, family = class_names[type(precondition)], families[type(network)]
    settings = {
        "img_resolution": height,
        "img_channels": channels,
        "label_dim": vector_size(stage.condition_for(classes).spec),
        "model_type": family,
    }
    fields = NETWORK_FIELDS | (SONG_FIELDS if family == "SongUNet" else {})
    settings |= {name: getattr(network, field) for name, field in fields.items()}
    settings["attn_resolutions"] = [height >> level for level in network.attention_levels]
    if family == "SongUNet":
        settings["encoder_type"] = "residual" if network.residual else "standard"
        settings["decoder_type"] = "standard"
    match precondition:
        case preconditioning.EDMPreconditioning():
            settings["sigma_data"] = precondition.sigma_data
        case preconditioning.VPPreconditioning():
            settings["beta_d"] = precondition.schedule.beta_d
            settings["beta_min"] = precondition.schedule.beta_min
            settings["M"] = precondition.times
            settings["epsilon_t"] = precondition.epsilon
        case preconditioning.VEPreconditioning():
            settings["sigma_min"] = precondition.sigma_min
            settings["sigma_max"] = precondition.sigma_max
        case preconditioning.IDDPMPreconditioning():
            settings["C_1"] = precondition.c1
            settings["C_2"] = precondition.c2
            settings["M"] = precondition.times
    return class_name, {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}


def original_name(path: ParamPath, network: UNet, side: int) -> str:
    """The original's name of a parameter.

    Args:
      path: of the parameter in our tree, such as ('encoder0_1', 'conv0', 'kernel').
      network: the config of the network.
      side: height and width of the images.
    """
    block, *inner, leaf = path if len(path) > 1 else (path[0], "")
    inner = ["norm2" if part == "norm" else part for part in inner if part != "attention"]
    return ".".join(["model", *_block_name(block, network, side), *inner, *_leaf_name(leaf)])


def _leaf_name(leaf: str) -> list[str]:
    return [{"kernel": "weight", "scale": "weight"}.get(leaf, leaf)] if leaf else []


def _block_name(block: str, network: UNet, side: int) -> list[str]:
    deepest = side >> (len(network.channel_mult) - 1)
    if match := re.fullmatch(r"(encoder|decoder)(\d+)_(\d+)", block):
        half, level, number = match.groups()
        size = side >> int(level)
        return [half[:3], f"{size}x{size}_block{number}"]
    if match := re.fullmatch(r"(down|up|residual)(\d+)", block):
        kind, level = match.groups()
        size = side >> int(level)
        name = "aux_residual" if kind == "residual" else kind
        return ["dec" if kind == "up" else "enc", f"{size}x{size}_{name}"]
    if match := re.fullmatch(r"middle(\d)", block):
        return ["dec", f"{deepest}x{deepest}_in{match.group(1)}"]
    if block == "stem":
        return ["enc", f"{side}x{side}_conv"]
    if block == "frequencies":
        return ["map_noise", "freqs"]
    if block in ("out_norm", "out_conv") and isinstance(network, Song):
        return ["dec", f"{side}x{side}_aux_{block.removeprefix('out_')}"]
    return [block]


def buffers(stage: Stage) -> dict[str, np.ndarray]:
    """The original's buffers, float32: resampling filters (1, 1, n, n), iDDPM's noise levels."""
    network, side = stage.network, stage.resolution[0]
    taps = np.asarray(getattr(network, "filter", (1, 1)), np.float32)
    value = (np.outer(taps, taps) / taps.sum() ** 2)[None, None]
    names = []
    for level in range(1, len(network.channel_mult)):
        down = _block_name(f"down{level}", network, side)
        up = _block_name(f"up{level - 1}", network, side)
        names += [[*block, layer] for block in (down, up) for layer in ("conv0", "skip")]
        if getattr(network, "residual", False):
            names.append(_block_name(f"residual{level}", network, side))
    filters = {".".join(["model", *name, "resample_filter"]): value for name in names}
    levels = getattr(stage.precondition, "levels", None)
    return filters if levels is None else {**filters, "u": levels().astype(np.float32)}


def to_ours(array: np.ndarray) -> np.ndarray:
    """The original's layout to ours: OIHW to HWIO, (out, in) to (in, out)."""
    if array.ndim == 4:
        return array.transpose(2, 3, 1, 0)
    return array.T if array.ndim == 2 else array


def to_theirs(array: np.ndarray) -> np.ndarray:
    """Our layout to the original's: HWIO to OIHW, (in, out) to (out, in)."""
    if array.ndim == 4:
        return array.transpose(3, 2, 0, 1)
    return array.T if array.ndim == 2 else array


@dataclasses.dataclass(frozen=True)
class UNetFormat:
    """`formats.Format` of a stage with a U-Net."""

    networks: ClassVar[tuple[type, ...]] = (ADM, Song)
    class_names: ClassVar[tuple[str, ...]] = tuple(PRECONDITIONS)
    fields: ClassVar[tuple[str, ...]] = FIELDS

    stage: Stage

    @staticmethod
    def describe(
        class_name: str,
        settings: dict[str, Any],
        shapes: dict[str, tuple[int, ...]],
        stage: Stage,
    ) -> Described:
        """As the module's `describe`, which does not need the shapes."""
        return describe(class_name, settings, stage)

    def settings_of(self, channels: int, classes: int) -> tuple[str, dict[str, Any]]:
        """As the module's `settings_of`."""
        return settings_of(self.stage, channels, classes)

    def original_name(self, path: ParamPath) -> str:
        """As the module's `original_name`."""
        return original_name(path, self.stage.network, self.stage.resolution[0])

    def to_ours(self, name: str, array: np.ndarray) -> np.ndarray:
        """As the module's `to_ours`; the layout does not depend on the name."""
        return to_ours(array)

    def to_theirs(self, name: str, array: np.ndarray) -> np.ndarray:
        """The inverse of `to_ours`."""
        return to_theirs(array)

    def classes(self, shapes: dict[str, tuple[int, ...]]) -> int:
        """Columns of the kernel on labels; 0 without one."""
        shape = shapes.get("model.map_label.weight", ())
        return shape[1] if len(shape) == 2 else 0

    def buffers(self) -> dict[str, np.ndarray]:
        """As the module's `buffers`."""
        return buffers(self.stage)

    def is_buffer(self, name: str) -> bool:
        """Whether it is one of `buffers`."""
        return name in buffers(self.stage)

    def check_buffers(
        self, shapes: dict[str, tuple[int, ...]], read: Callable[[str], np.ndarray]
    ) -> None:
        """Buffers follow from the settings, and are not compared."""
