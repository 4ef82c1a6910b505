"""The relays that are compared, as configs: which stages are transformers, and of which kind."""

import dataclasses

from rdm_jax.config import Config, Stage
from rdm_jax.diffusion.preconditioning import XPreconditioning
from rdm_jax.models.transformer import JiT

# For an image of 8 x 8 patches; each is measured at equal training time.
TRANSFORMER = JiT(
    hidden=128,
    depth=4,
    heads=4,
    bottleneck=32,
    class_tokens=0,
    class_tokens_from=0,
    pixel_channels=16,
)
NETWORKS = {
    "transformer": TRANSFORMER,
    "wide": dataclasses.replace(TRANSFORMER, hidden=192, depth=3, heads=3),
    "deep": dataclasses.replace(TRANSFORMER, hidden=96, depth=6, heads=3),
    "class tokens": dataclasses.replace(TRANSFORMER, class_tokens=4, class_tokens_from=1),
    "pixel head": dataclasses.replace(TRANSFORMER, head_blocks=2),
    "stem": dataclasses.replace(TRANSFORMER, stem_blocks=1),
    "stem and head": dataclasses.replace(TRANSFORMER, stem_blocks=1, head_blocks=1, head_kernel=3),
}
RATES = (0.5, 2.0)  # times the config's learning rate
PATCHES = 8  # along a side
# The variants of which a table over seeds is worth its time.
CHOSEN = ("unet", "transformer", "stem and head", "both stages")


def transformer(stage: Stage, network: JiT, **training: float) -> Stage:
    """The stage with this network, on 8 x 8 patches."""
    patch = max(stage.resolution) // PATCHES
    return dataclasses.replace(
        stage,
        network=dataclasses.replace(network, patch=patch),
        training=dataclasses.replace(stage.training, **training),
    )


def x_prediction(stage: Stage) -> Stage:
    """The stage with a network that predicts the image, weighted like velocities."""
    process = dataclasses.replace(stage.process, weighting="velocity", max_weight=400.0)
    return dataclasses.replace(stage, precondition=XPreconditioning(), process=process)


def variants(config: Config) -> dict[str, Config]:
    """The relays by name. 'unet' is the config as it is; all others exchange stage 2's network, and
    'both stages' stage 1's too."""
    first, second = config.stages
    rate = second.training.learning_rate
    plain = transformer(second, TRANSFORMER)
    stages = {name: (first, transformer(second, net)) for name, net in NETWORKS.items()}
    stages["x-prediction"] = first, x_prediction(plain)
    for factor in RATES:
        stages[f"learning rate x {factor:g}"] = (
            first,
            transformer(second, TRANSFORMER, learning_rate=factor * rate),
        )
    stages["both stages"] = transformer(first, TRANSFORMER), stages["stem and head"][1]
    found = {name: dataclasses.replace(config, stages=pair) for name, pair in stages.items()}
    return {"unet": config} | found
