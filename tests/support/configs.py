"""A run in small for the tests: a folder of 8x8 images, two stages, networks of some thousand
parameters."""

import numpy as np
from PIL import Image

from rdm_jax.config import Config, Data, Sampling, Stage, Training
from rdm_jax.diffusion.processes import GaussianProcess, RelayProcess
from rdm_jax.diffusion.samplers import Heun, RelayHeun
from rdm_jax.models.adm import ADM

LOW = (4, 6)
NETWORK = ADM(
    channels=8, channel_mult=(1,), blocks=1, attention_levels=(), head_channels=8, dropout=0.0
)


def write_images(folder, count: int = 24, size: int = 8):
    """Two classes of random images, as PNG files in class folders."""
    random = np.random.default_rng(0)
    for i in range(count):
        path = folder / "ab"[i % 2] / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (size, size, 3), np.uint8)).save(path)


def tiny_config(folder, low=(4, 4), **training) -> Config:
    """A two-stage config on the images in `folder`, prepared beside it: images of the size `low`
    and twice that."""
    settings = {
        "images": 160,
        "batch_size": 8,
        "learning_rate": 1e-3,
        "warmup": 32,
        "ema_halflife": 40.0,
        "log_every": 16,
    }
    settings |= {
        "checkpoint_every": 40,
        "preview_every": 80,
        "validation": 8,
        "keep_newest": 3,
    } | training
    return Config(
        data=Data(source=f"folder:{folder}", directory=f"{folder}_prepared"),
        stages=(
            Stage(
                low,
                NETWORK,
                process=GaussianProcess(),
                training=Training(**settings),
                sampler=Heun(steps=3),
            ),
            Stage(
                (2 * low[0], 2 * low[1]),
                NETWORK,
                process=RelayProcess(patch=2),
                training=Training(**settings),
                sampler=RelayHeun(steps=12, rho=7.0),
            ),
        ),
        sampling=Sampling(seeds="0-11", batch_size=8),
    )


def get_config(folder: str):
    """The same for images that are no squares, as a config file: `--config
    tests/support/configs.py:FOLDER`."""
    return tiny_config(folder, low=LOW).to_config_dict()
