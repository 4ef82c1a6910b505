"""8,105 drawings from the Open Clip Art Library, 64x64 -> 256x256, from words and classes.

The drawings come as they are: nested folders, links, palettes, transparency, and 16 that are too
large, which --skip_bad leaves out. A class is a folder at the top, a caption the words of a file's
name. The networks are for one accelerator. Get the data (131 MB, public domain; makes usr/), then
run:

    apt-get download openclipart-png && dpkg-deb -x openclipart-png_*.deb .
    python -m rdm_jax.main --config configs/openclipart.py --workdir runs/openclipart --skip_bad

The same path on two cores, in minutes:

    python -m rdm_jax.main --config configs/openclipart.py:tiny --workdir runs/clipart --skip_bad

Two cores of an AMD EPYC, tiny: 5 minutes with the preparation; it shows that everything runs, its
pictures are still noise. Full size: not run yet.
"""

import dataclasses

from rdm_jax.config import Config, Data, Sampling, Stage, Training
from rdm_jax.diffusion.processes import GaussianProcess, RelayProcess
from rdm_jax.diffusion.samplers import Heun, RelayHeun
from rdm_jax.models.adm import ADM
from rdm_jax.models.conditions import Text
from rdm_jax.runtime.errors import InputError

TOKENS = 32


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
    width, blocks = (32, 1) if tiny else (128, 2)
    small = ADM(
        channels=width,
        channel_mult=(1, 2, 3, 4),
        blocks=blocks,
        attention_levels=(1, 2, 3),
        dropout=0.0 if tiny else 0.1,
        dtype="bfloat16",
    )
    large = ADM(
        channels=width,
        channel_mult=(1, 1, 2, 2, 4, 4),
        blocks=blocks,
        attention_levels=(4, 5),
        dtype="bfloat16",
    )
    if tiny:  # pixels are folded into channels: the networks work at 16 x 16 and 32 x 32
        shrunk = {"dtype": "float32", "channel_mult": (1, 2), "attention_levels": (1,)}
        small = dataclasses.replace(small, patch=4, **shrunk)
        large = dataclasses.replace(large, patch=8, **shrunk)
    condition = Text(tokens=TOKENS, width=384, classes=True)
    return Config(
        data=Data(
            source="folder:usr/share/openclipart/png",
            directory="data/openclipart_256",
            crop="pad",
            classes="top",
            captions="names",
            text_tokens=TOKENS,
            held_out=256,
        ),
        stages=(
            Stage(
                resolution=(64, 64),
                network=small,
                process=GaussianProcess(),
                condition=condition,
                training=training(
                    2_000 if tiny else 10_000_000, 16 if tiny else 256, 1_000 if tiny else 500_000
                ),
                sampler=Heun(steps=10 if tiny else 32),
                guidance=2.0,
            ),
            Stage(
                resolution=(256, 256),
                network=large,
                process=RelayProcess(patch=4),
                condition=condition,
                training=training(
                    1_000 if tiny else 4_000_000, 8 if tiny else 64, 500 if tiny else 200_000
                ),
                sampler=RelayHeun(steps=10 if tiny else 32),
                guidance=1.5,
            ),
        ),
        sampling=Sampling(seeds="0-15" if tiny else "0-63", batch_size=8 if tiny else 16),
    ).to_config_dict()
