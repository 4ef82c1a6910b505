"""5,000 MNIST digits, 8x8 -> 32x32: two stages, trained and sampled on a laptop.

    python -m rdm_jax.main --config configs/digits.py --workdir runs/digits

Two cores of an AMD EPYC: 5 to 9 minutes, with evaluations. A classifier that was trained on the
data assigns the requested class to 96.2 % of 500 samples, 83.8 % without guidance; Frechet distance
in its features 0.77, that of held-out digits 0.36 (experiments/digits/README.md).
"""

from rdm_jax.config import Config, Data, Evaluation, Sampling, Stage, Training
from rdm_jax.diffusion.preconditioning import EDMPreconditioning
from rdm_jax.diffusion.processes import GaussianProcess, RelayProcess
from rdm_jax.diffusion.samplers import Heun, RelayHeun
from rdm_jax.diffusion.schedules import Clock
from rdm_jax.models.adm import ADM


def training(images: int) -> Training:
    """The settings that both stages share."""
    return Training(
        images=images,
        batch_size=64,
        learning_rate=1.5e-3,
        warmup=1_000,
        ema_halflife=3_000.0,
        checkpoint_every=6_400,
        preview_every=12_800,
        evaluate_every=12_800,
        log_every=640,
    )


def get_config():
    """The config as an ml_collections ConfigDict."""
    return Config(
        data=Data(source="digits", directory="data/digits", channels=1, held_out=500),
        stages=(
            Stage(
                resolution=(8, 8),
                network=ADM(
                    channels=32,
                    channel_mult=(1, 2),
                    blocks=1,
                    attention_levels=(0,),
                    head_channels=32,
                    dropout=0.0,
                ),
                # 1/4 tells so small a network too little about the noise level.
                precondition=EDMPreconditioning(noise_scale=1.0),
                process=GaussianProcess(),
                training=training(44_800),
                sampler=Heun(steps=12),
                guidance=2.0,
            ),
            Stage(
                resolution=(32, 32),
                # Pixels folded 4x4 into channels: the network works at 8x8, where two cores can
                # keep up.
                network=ADM(
                    channels=64,
                    channel_mult=(1,),
                    blocks=1,
                    attention_levels=(0,),
                    dropout=0.0,
                    patch=4,
                ),
                precondition=EDMPreconditioning(noise_scale=1.0),
                process=RelayProcess(
                    patch=4, block_scale=0.15, clock=Clock(length=0.93, blur_sigma_max=3.0)
                ),
                training=training(38_400),
                # Of six levels three are below the end of the clock; with more levels the first
                # step would be shorter.
                sampler=RelayHeun(steps=6, rho=7.0, truncation_sigma=1.76, eta=0.2),
            ),
        ),
        sampling=Sampling(seeds="0-499", batch_size=64),
        evaluation=Evaluation(
            features="classifier", images="held_out, stage1, samples", seeds_in_training="0-255"
        ),
    ).to_config_dict()
