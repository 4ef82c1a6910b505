"""ImageNet, 64x64 -> 256x256, with a transformer in both stages of the relay.

    python -m rdm_jax.main --config configs/imagenet_relay_jit.py --workdir runs/imagenet_relay_jit
    python -m rdm_jax.main --config configs/imagenet_relay_jit.py --mode plan --target v5e-16 \\
        --classes 1000

`configs/imagenet.py` explains how to get the data. Stage 1 is JiT-B/4 (arXiv 2511.13720), which
generates 64x64 along the linear path; stage 2 continues from its images with the published relay's
blur and block noise. Its network has JiT-B's width and depth on patches of 16 pixels, and a head on
pixels, in cells of 4x4 of them: the relay works at low noise, where large patches alone are weak
(DeCo, arXiv 2511.19365).
Widths are multiples of 128, which fill the matrix units of TPUs and GPUs.

Nobody has trained this yet.
"""

import dataclasses

from ml_collections import ConfigDict

from rdm_jax.config import Config, Data, Evaluation, Sampling, Stage
from rdm_jax.diffusion.guidance import ClassifierFree
from rdm_jax.diffusion.linear_path import LinearHeun, LinearProcess
from rdm_jax.diffusion.preconditioning import XPreconditioning
from rdm_jax.diffusion.processes import RelayProcess
from rdm_jax.diffusion.samplers import RelayHeun
from rdm_jax.diffusion.schedules import Clock

from . import imagenet_jit

NETWORK = dataclasses.replace(imagenet_jit.NETWORKS["B"], multiple=128)


def get_config() -> ConfigDict:
    """The config as an ml_collections ConfigDict."""
    training = imagenet_jit.training(200)
    return Config(
        data=Data(source="folder:imagenet/train", directory="data/imagenet_256", crop="adm"),
        stages=(
            Stage(
                resolution=(64, 64),
                network=dataclasses.replace(NETWORK, patch=4),
                precondition=XPreconditioning(),
                process=LinearProcess(),
                training=training,
                sampler=LinearHeun(steps=50),
                guidance=(ClassifierFree(imagenet_jit.GUIDANCE["B"], (0.0, 9.0)),),
            ),
            Stage(
                resolution=(256, 256),
                network=dataclasses.replace(
                    NETWORK, patch=16, head_blocks=3, pixel_fold=4, pixel_channels=128
                ),
                precondition=XPreconditioning(),
                process=RelayProcess(
                    patch=4,
                    block_scale=0.15,
                    clock=Clock(length=0.93, blur_sigma_max=3.0),
                    weighting="velocity",
                    max_weight=400.0,
                ),
                training=training,
                sampler=RelayHeun(steps=60, truncation_sigma=1.76, eta=0.2),
                guidance=1.5,
            ),
        ),
        sampling=Sampling(seeds="0-63", batch_size=16),
        evaluation=Evaluation(
            features="inception",
            reference="npz:VIRTUAL_imagenet256_labeled.npz",
            seeds="0-49999",
            kept=50_000,
        ),
    ).to_config_dict()
