"""CelebA-HQ, 64x64 -> 256x256, unconditional: the settings of the published system.

They are those of arXiv 2309.03350, section 4 and appendix. Sample from the published weights; no
data is needed:

    python -m rdm_jax.main --config configs/celebahq.py --workdir runs/celebahq \\
        --mode import --stage 1 --weights STAGE1.pt
    python -m rdm_jax.main --config configs/celebahq.py --workdir runs/celebahq \\
        --mode import --stage 2 --weights STAGE2.pt
    python -m rdm_jax.main --config configs/celebahq.py --workdir runs/celebahq --mode sample

Train: a folder of the 30,000 images (any size from 256 up, PNG or JPEG, nothing else in it), or a
zip of them. The download that tensorflow-datasets' celeb_a_hq needs is no longer available; copies
of the images at 256 or 1024 are.

    python -m rdm_jax.main --config configs/celebahq.py --workdir runs/celebahq \\
        --config.data.source=folder:celebahq
    python -m rdm_jax.main --config configs/celebahq.py --workdir runs/celebahq \\
        --config.data.source=zip:celebahq.zip

Measure (needs the data as the reference). The released samplers post-process before they measure:

    python -m rdm_jax.main --config configs/celebahq.py --workdir runs/celebahq --mode evaluate \\
        --config.sampling.postprocess=rdm_celebahq

The clock is trained with length 0.89 and sampled with 1.05, as published. Published: FID 3.15;
stage 1 on 32 A100 for 16 hours, stage 2 for 25.5 hours. Not run here yet.
"""

from rdm_jax.config import Config, Data, Evaluation, Published, Sampling, Stage, Training
from rdm_jax.diffusion.processes import GaussianProcess, RelayProcess
from rdm_jax.diffusion.samplers import Heun, RelayHeun
from rdm_jax.diffusion.schedules import Clock
from rdm_jax.models.adm import ADM


def training(images: int) -> Training:
    """The settings that both stages share."""
    return Training(
        images=images,
        batch_size=1024,
        learning_rate=1e-4,
        warmup=10_000_000,
        ema_halflife=500_000.0,
        augment=0.2,
        checkpoint_every=1_000_000,
        preview_every=1_000_000,
        log_every=50_000,
        validation=1024,
    )


def get_config():
    """The config as an ml_collections ConfigDict."""
    small = ADM(
        channels=192,
        channel_mult=(1, 2, 3, 4),
        blocks=3,
        attention_levels=(1, 2, 3),
        augment_labels=9,
        dropout=0.15,
    )
    large = ADM(
        channels=256,
        channel_mult=(1, 1, 2, 2, 4, 4),
        blocks=2,
        attention_levels=(3, 4, 5),
        augment_labels=9,
        dropout=0.2,
    )
    return Config(
        data=Data(source="folder:celebahq", directory="data/celebahq_256"),
        stages=(
            Stage(
                resolution=(64, 64),
                network=small,
                process=GaussianProcess(),
                training=training(70_000_000),
                sampler=Heun(steps=120, rho=7.0, eta=0.05),
            ),
            Stage(
                resolution=(256, 256),
                network=large,
                process=RelayProcess(
                    patch=4, block_scale=0.15, clock=Clock(length=0.89, blur_sigma_max=2.0)
                ),
                training=training(47_000_000),
                sampler=RelayHeun(
                    steps=150, rho=7.0, truncation_sigma=0.95, truncation_time=1.05, eta=0.2
                ),
            ),
        ),
        sampling=Sampling(seeds="0-63", batch_size=16),
        evaluation=Evaluation(
            features="inception",
            seeds="0-49999",
            kept=50_000,
            published=Published("unconditional", fid=3.15, precision=0.77, recall=0.55),
        ),
    ).to_config_dict()
