"""JiT's published networks (arXiv 2511.13720): settings, parameter names and layouts, and ours.

"The original" is the published code. Its settings are the arguments of its training command, but
most sizes are in the shapes of the parameters only.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

from rdm_jax.config import Stage, kind_of
from rdm_jax.diffusion.linear_path import LinearHeun, LinearProcess
from rdm_jax.diffusion.preconditioning import XPreconditioning
from rdm_jax.diffusion.schedules import Path
from rdm_jax.interop.settings import FIELDS, Described, integer, no_export, number, unusable
from rdm_jax.models.backbone import vector_size
from rdm_jax.models.positions import sine_cosine
from rdm_jax.models.transformer import JiT
from rdm_jax.runtime.errors import InputError

ParamPath = tuple[str, ...]
TensorShapes = dict[str, tuple[int, ...]]

DENOISER = "Denoiser"  # the original's class, in which the network is `net`
PREFIX = "net."
POSITIONS = "net.pos_embed"
TOLERANCE = 1e-5  # of the fixed positions, absolute
SIZES = {
    "JiT-B": JiT(),
    "JiT-L": JiT(hidden=1024, depth=24, heads=16, class_tokens_from=8),
    "JiT-H": JiT(hidden=1280, depth=32, heads=16, bottleneck=256, class_tokens_from=10),
}
PUBLISHED = {
    f"{name}/{patch}": dataclasses.replace(network, patch=patch)
    for name, network in SIZES.items()
    for patch in (16, 32)
}
SIZE_FIELDS = ("patch", "hidden", "depth", "heads", "bottleneck")
SIZE_FIELDS += ("class_tokens", "class_tokens_from", "mlp_ratio")
# Fields that the published networks do not have, and the values that mean so.
UNPUBLISHED = {"stem_blocks": 0, "head_blocks": 0, "multiple": 1, "augment_labels": 0}
# A file is not trusted, and these numbers decide how much memory is used.
MOST = 2**14  # of any axis but that of classes
MOST_BLOCKS = 256
MOST_CLASSES = 10**6

TOP = {
    "time0": "t_embedder.mlp.0",
    "time1": "t_embedder.mlp.2",
    "class_table": "y_embedder.embedding_table.weight",
    "embed0": "x_embedder.proj1",
    "embed1": "x_embedder.proj2",
    "class_positions": "in_context_posemb",
    "out_norm": "final_layer.norm_final",
    "out_modulation": "final_layer.adaLN_modulation.1",
    "out": "final_layer.linear",
}
INNER = {"attention": "attn", "modulation": "adaLN_modulation.1"}
LEAVES = {"kernel": "weight", "scale": "weight"}
EMBEDDINGS = ("x_embedder.proj1.weight", "x_embedder.proj2.weight")


def original_name(path: ParamPath) -> str:
    """The original's name of a parameter at a path such as ('block0', 'attention', 'qkv', 'bias').

    It stands after `PREFIX` in the published files.
    """
    first, *rest = path
    if match := re.fullmatch(r"block(\d+)", first):
        parts = ["blocks", match.group(1)]
    else:
        parts = [TOP[first]]
    return ".".join([*parts, *(INNER.get(part) or LEAVES.get(part, part) for part in rest)])


def to_ours(name: str, array: np.ndarray) -> np.ndarray:
    """The original's layout to ours: (out, in) to (in, out); kernels of patches to matrices."""
    if name in EMBEDDINGS:  # OIHW to (rows, columns, channels; out)
        return array.transpose(2, 3, 1, 0).reshape(-1, array.shape[0])
    if name == TOP["class_positions"]:
        return array[0]
    return array.T if name.endswith("weight") and array.ndim == 2 and not _is_table(name) else array


def to_theirs(name: str, array: np.ndarray, patch: int) -> np.ndarray:
    """The inverse of `to_ours`, for patches of this side."""
    if name in EMBEDDINGS:
        side = patch if name == EMBEDDINGS[0] else 1
        return array.reshape(side, side, -1, array.shape[-1]).transpose(3, 2, 0, 1)
    if name == TOP["class_positions"]:
        return array[None]
    return array.T if name.endswith("weight") and array.ndim == 2 and not _is_table(name) else array


def _is_table(name: str) -> bool:
    return name == TOP["class_table"]


@dataclasses.dataclass(frozen=True)
class JiTFormat:
    """`formats.Format` of a stage with a JiT."""

    networks: ClassVar[tuple[type, ...]] = (JiT,)
    class_names: ClassVar[tuple[str, ...]] = (DENOISER,)
    # The last two where they are of the linear path.
    fields: ClassVar[tuple[str, ...]] = (*FIELDS, "process", "sampler")

    stage: Stage

    @staticmethod
    def describe(
        class_name: str, settings: dict[str, Any], shapes: TensorShapes, stage: Stage
    ) -> Described:
        """Translates the original's settings.

        Sizes are those of the parameters. Two are not in their shapes: `in_context_start` and
        `mlp_ratio` are among the settings, as our exports have them, or follow from `model`, the
        name of a published network, whose other sizes must then agree.

        Args:
          class_name: 'Denoiser'.
          settings: such as {'model': 'JiT-B/16', 'img_size': 256, 'noise_scale': 1.0, ...}.
          shapes: of all parameters, by the original's names.
          stage: for everything else; a linear process and a linear sampler get the settings of the
            training, other kinds stay.

        Raises:
          InputError: the network is not supported.
        """
        if number(settings, "attn_dropout", 0.0, 1.0, least=0.0) > 0:
            raise unusable("attn_dropout", settings["attn_dropout"], "weights trained without it")
        network = _network(settings, shapes, stage.network)
        side = integer(settings, "img_size", 1, MOST)
        path = Path(number(settings, "noise_scale", 1.0))
        classes = _classes(shapes)
        if settings.get("class_num", classes) != classes:
            raise unusable(
                "class_num", settings["class_num"], f"{classes}, as the table of classes has"
            )
        stage = dataclasses.replace(
            _trained(stage, settings, path),
            resolution=(side, side),
            network=network,
            precondition=XPreconditioning(path),
        )
        return Described(stage, _shape(shapes, EMBEDDINGS[0], 4)[1], classes)

    def settings_of(self, channels: int, classes: int) -> tuple[str, dict[str, Any]]:
        """The original's class and settings; the inverse of `describe`.

        Raises:
          InputError: the original has no such network.
        """
        stage, network, precondition = self.stage, self.stage.network, self.stage.precondition
        for field, part, known in (
            ("network", network, JiT),
            ("precondition", precondition, XPreconditioning),
        ):
            if type(part) is not known:
                raise no_export(f"{field}.kind={kind_of(type(part))!r}", repr(kind_of(known)))
        height = stage.resolution[0]
        if stage.resolution != (height, height):
            raise no_export(f"resolution={stage.resolution!r}", repr((height, height)))
        for field, published in UNPUBLISHED.items():
            value = getattr(network, field)
            if value != published:
                raise no_export(f"network.{field}={value!r}", repr(published))
        if stage.process.conditioning_channels(channels):
            raise no_export(f"process.kind={kind_of(type(stage.process))!r}", "'linear'")
        settings = {
            "img_size": height,
            "class_num": vector_size(stage.condition_for(classes).spec),
            "attn_dropout": 0.0,
            "proj_dropout": network.dropout,
            "noise_scale": precondition.path.noise_scale,
            "in_context_start": network.class_tokens_from,
            "mlp_ratio": network.mlp_ratio,
        }
        for name, published in PUBLISHED.items():
            if _sizes(network) == _sizes(published):
                settings["model"] = name
        match stage.process:
            case LinearProcess(p_mean=p_mean, p_std=p_std, t_eps=t_eps):
                settings |= {"P_mean": p_mean, "P_std": p_std, "t_eps": t_eps}
        return DENOISER, settings

    def original_name(self, path: ParamPath) -> str:
        """The name in the published files of a parameter in our tree."""
        return PREFIX + original_name(path)

    def to_ours(self, name: str, array: np.ndarray) -> np.ndarray:
        """As the module's `to_ours`."""
        return to_ours(name.removeprefix(PREFIX), array)

    def to_theirs(self, name: str, array: np.ndarray) -> np.ndarray:
        """The inverse of `to_ours`."""
        return to_theirs(name.removeprefix(PREFIX), array, self.stage.network.patch)

    def classes(self, shapes: TensorShapes) -> int:
        """Rows of the table of classes, without the null class; 0 without a table."""
        return _classes(shapes) if PREFIX + TOP["class_table"] in shapes else 0

    def buffers(self) -> dict[str, np.ndarray]:
        """The fixed embedding of positions (1, tokens, hidden), which the original stores."""
        network = self.stage.network
        height, width = (side // network.patch for side in self.stage.resolution)
        return {POSITIONS: sine_cosine(height, width, network.hidden)[None]}

    def is_buffer(self, name: str) -> bool:
        """The embedding of positions, and tables of rotations, which are ignored."""
        return name == POSITIONS or ("rope" in name and "freqs" in name)

    def check_buffers(self, shapes: TensorShapes, read: Callable[[str], np.ndarray]) -> None:
        """Compares the embedding of positions. Raises InputError if it is another one."""
        if POSITIONS not in shapes:
            return
        network = self.stage.network
        tokens = np.prod([side // network.patch for side in self.stage.resolution], dtype=int)
        wanted = (1, int(tokens), network.hidden)
        if shapes[POSITIONS] != wanted:
            raise InputError(
                f"{POSITIONS!r} of shape {shapes[POSITIONS]} instead of {wanted}",
                "Use weights of the config's resolution and patch.",
            )
        error = np.abs(read(POSITIONS).astype(np.float32) - self.buffers()[POSITIONS]).max()
        if not error <= TOLERANCE:
            raise InputError(
                f"other positions in {POSITIONS!r} than the published ones, by {error:.3g}",
                "Use weights with the published fixed positions.",
            )


def _trained(stage: Stage, settings: dict[str, Any], path: Path) -> Stage:
    """The stage with the training's linear path, where it has a linear process or sampler."""
    t_eps = number(settings, "t_eps", 0.05, 0.99)
    if isinstance(stage.process, LinearProcess):
        process = dataclasses.replace(
            stage.process,
            path=path,
            p_mean=number(settings, "P_mean", -0.8, 100.0, least=-100.0),
            p_std=number(settings, "P_std", 0.8, 100.0),
            t_eps=t_eps,
        )
        stage = dataclasses.replace(stage, process=process)
    if isinstance(stage.sampler, LinearHeun):
        sampler = dataclasses.replace(stage.sampler, t_eps=t_eps)
        stage = dataclasses.replace(stage, sampler=sampler)
    return stage


def _network(settings: dict[str, Any], shapes: TensorShapes, ours: Any) -> JiT:
    """The network of these shapes, with what does not change results from our own."""
    hidden, bottleneck, _, _ = _shape(shapes, EMBEDDINGS[1], 4)
    _, _, patch, _ = _shape(shapes, EMBEDDINGS[0], 4)
    head = _shape(shapes, "blocks.0.attn.q_norm.weight", 1)[0]
    tokens = TOP["class_positions"]
    first_norms = re.compile(re.escape(PREFIX) + r"blocks\.\d+\.norm1\.weight")
    depth = sum(bool(first_norms.fullmatch(name)) for name in shapes)
    if depth > MOST_BLOCKS:
        raise InputError(
            f"the weights have {depth} blocks", f"Use weights of at most {MOST_BLOCKS}."
        )
    model = settings.get("model")
    published = PUBLISHED.get(model) if isinstance(model, str) else None
    if published is None and "in_context_start" not in settings:
        raise InputError(f"the network's model={model!r:.80} is unknown", f"Use {_listed()}.")
    starts = {"in_context_start": published.class_tokens_from} if published else {}
    network = JiT(
        patch=patch,
        hidden=hidden,
        depth=depth,
        heads=hidden // head,
        bottleneck=bottleneck,
        class_tokens=_shape(shapes, tokens, 3)[1] if PREFIX + tokens in shapes else 0,
        class_tokens_from=integer(starts | settings, "in_context_start", 0, MOST_BLOCKS),
        mlp_ratio=number(settings, "mlp_ratio", 4.0, 64.0, least=1.0),
        dropout=number(settings, "proj_dropout", 0.0, 0.99, least=0.0),
        dtype=ours.dtype,
        remat=ours.remat if isinstance(ours, JiT) else "none",
    )
    for field in SIZE_FIELDS if published else ():
        found, wanted = getattr(network, field), getattr(published, field)
        if found != wanted:
            raise InputError(
                f"the weights have {field}={found}, and their model={model!r} has {wanted}",
                "Use a file as it was published.",
            )
    return network


def _sizes(network: JiT) -> tuple[int | float, ...]:
    return tuple(getattr(network, field) for field in SIZE_FIELDS)


def _listed() -> str:
    return " or ".join(map(repr, PUBLISHED))


def _classes(shapes: TensorShapes) -> int:
    return _shape(shapes, TOP["class_table"], 2, MOST_CLASSES + 1)[0] - 1


def _shape(shapes: TensorShapes, name: str, axes: int, most: int = MOST) -> tuple[int, ...]:
    """The shape of a parameter. Raises InputError if it is missing, or cannot be that."""
    name = PREFIX + name
    if name not in shapes:
        raise InputError(
            f"the weights have no parameter {name!r}", "Use a file as it was published."
        )
    shape = shapes[name]
    if len(shape) != axes or not all(1 <= size <= most for size in shape):
        raise InputError(
            f"the weights have {name!r} of shape {shape}",
            f"Use {axes} axes of 1 to {most}, as published.",
        )
    return shape
