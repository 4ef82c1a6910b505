"""The relays that are compared, as configs: which stages are transformers, and of which kind."""

import dataclasses

from rdm_jax.config import Config, Stage
from rdm_jax.diffusion.preconditioning import XPreconditioning
from rdm_jax.models.transformer import JiT

PATCHES = 8  # along a side
# Each network is trained for the same time. The learning rate and the batch size are in units of
# the config's, which were found for U-Nets.
RATE, BATCH = 2.0, 0.5
TRANSFORMER = JiT(
    hidden=128,
    depth=4,
    heads=4,
    bottleneck=32,
    class_tokens=0,
    class_tokens_from=0,
    init="open",
)


def _changed(**fields) -> JiT:
    return dataclasses.replace(TRANSFORMER, **fields)


NETWORKS = {
    "transformer": TRANSFORMER,
    "adaLN-zero": _changed(init="published"),
    "wide": _changed(hidden=192, depth=3, heads=3),
    "deep": _changed(hidden=96, depth=6, heads=3),
    "class tokens": _changed(class_tokens=4, class_tokens_from=1),
    "pixel head": _changed(head_blocks=2, pixel_channels=16),
    "convolutions on pixels": _changed(
        stem_blocks=1, head_blocks=1, head_kernel=3, pixel_channels=16
    ),
}
# Convolutions on the grid of patches, as the U-Nets of the small configs have them.
MIXED = _changed(depth=2, stem_blocks=1, head_blocks=1, head_kernel=3, pixel_channels=64)
RATES = (1.0, 4.0)
# Those of which a table over seeds is worth its time.
CHOSEN = ("unet", "unet half batch", "transformer", "mixed", "both stages")


def patch_of(stage: Stage) -> int:
    """The side of a patch."""
    return max(1, max(stage.resolution) // PATCHES)


def transformer(stage: Stage, network: JiT, *, rate: float = RATE, batch: float = BATCH) -> Stage:
    """The stage with this network, on a grid of `PATCHES` patches a side."""
    network = dataclasses.replace(network, patch=patch_of(stage))
    return trained_with(dataclasses.replace(stage, network=network), rate, batch)


def trained_with(stage: Stage, rate: float, batch: float) -> Stage:
    """The stage with another learning rate and batch size, in units of its own."""
    training = dataclasses.replace(
        stage.training,
        learning_rate=rate * stage.training.learning_rate,
        batch_size=round(batch * stage.training.batch_size),
    )
    return dataclasses.replace(stage, training=training)


def mixed(stage: Stage) -> Stage:
    """The stage with a network of convolutions on the grid of patches, and a transformer inside."""
    network = dataclasses.replace(MIXED, pixel_fold=patch_of(stage))
    return transformer(stage, network)


def x_prediction(stage: Stage) -> Stage:
    """The stage with a network that predicts the image, weighted like velocities."""
    process = dataclasses.replace(stage.process, weighting="velocity", max_weight=400.0)
    return dataclasses.replace(stage, precondition=XPreconditioning(), process=process)


def variants(config: Config) -> dict[str, Config]:
    """The relays by name. 'unet' is the config as it is; all others change stage 2, and
    'both stages' stage 1's too."""
    first, second = config.stages
    plain = transformer(second, TRANSFORMER)
    seconds = {name: transformer(second, net) for name, net in NETWORKS.items()}
    seconds |= {"mixed": mixed(second), "x-prediction": x_prediction(plain)}
    for rate in RATES:
        seconds[f"learning rate x {rate:g}"] = transformer(second, TRANSFORMER, rate=rate)
    seconds["whole batch"] = transformer(second, TRANSFORMER, batch=1.0)
    seconds["unet half batch"] = trained_with(second, 1.0, BATCH)
    stages = {name: (first, stage) for name, stage in seconds.items()}
    stages["both stages"] = transformer(first, TRANSFORMER), plain
    found = {name: dataclasses.replace(config, stages=pair) for name, pair in stages.items()}
    return {"unet": config} | found
