"""ImageNet, 256x256 or 512x512 in one stage: JiT, a transformer on pixels (arXiv 2511.13720).

The published networks and settings, by size and patch: B16 (the default), L16, H16 at 256x256; B32,
L32, H32 at 512x512. Sample from published weights; no data is needed:

    python -m rdm_jax.main --config configs/imagenet_jit.py:B16 --workdir runs/jit_b16 \\
        --mode import --stage 1 --weights checkpoint-last.pth
    python -m rdm_jax.main --config configs/imagenet_jit.py:B16 --workdir runs/jit_b16 --mode sample

`configs/imagenet.py` explains how to get the data and ADM's statistics. Train on 16 chips of 16 GB:

    python -m rdm_jax.main --config configs/imagenet_jit.py:B16 --workdir runs/jit_b16 \\
        --mode train --config.stage1.training.accumulate=4

Published FID, 50 Heun steps, guided, 600 epochs: B16 3.66, L16 2.36, H16 1.86. It depends on the
average and on guidance, which were swept there. Not run here yet.
"""

import dataclasses
import math

from ml_collections import ConfigDict

from rdm_jax.config import Config, Data, Evaluation, Published, Sampling, Stage, Training
from rdm_jax.diffusion.guidance import ClassifierFree
from rdm_jax.diffusion.linear_path import LinearHeun, LinearProcess
from rdm_jax.diffusion.preconditioning import XPreconditioning
from rdm_jax.diffusion.schedules import Path
from rdm_jax.models.transformer import JiT
from rdm_jax.runtime.errors import InputError

NETWORKS = {
    "B": JiT(dtype="bfloat16"),
    "L": JiT(hidden=1024, depth=24, heads=16, class_tokens_from=8, dtype="bfloat16"),
    "H": JiT(
        hidden=1280,
        depth=32,
        heads=16,
        bottleneck=256,
        class_tokens_from=10,
        dropout=0.2,
        dtype="bfloat16",
    ),
}
GUIDANCE = {"B": 2.9, "L": 2.4, "H": 2.2}
FID = {"B16": 3.66, "L16": 2.36, "H16": 1.86}
EPOCH = 1_281_167  # images


def training(epochs: int) -> Training:
    """The published settings; every network is trained alike."""
    return Training(
        images=epochs * EPOCH,
        batch_size=1024,
        learning_rate=2e-4,
        warmup=5 * EPOCH,
        beta2=0.95,
        # 0.9999 per step; the published runs also keep 0.9996.
        ema_halflife=float(round(1024 * math.log(2) / 1e-4)),
        ema_rampup=0.0,
        label_dropout=0.1,
        flip=True,
        checkpoint_every=10 * EPOCH,
        preview_every=10 * EPOCH,
        log_every=200_000,
        validation=4096,
    )


def get_config(size: str = "B16") -> ConfigDict:
    """The config as an ml_collections ConfigDict.

    Args:
      size: of the network, 'B', 'L' or 'H', and its patch, '16' or '32'.
    """
    letter, patch = size[:1], size[1:]
    if letter not in NETWORKS or patch not in ("16", "32"):
        raise InputError(
            f"the size {size!r} of this config is unknown", "Use B16, L16, H16, B32, L32 or H32."
        )
    side = 16 * int(patch)
    path = Path(noise_scale=side / 256)
    network = NETWORKS[letter]
    return Config(
        data=Data(source="folder:imagenet/train", directory=f"data/imagenet_{side}", crop="adm"),
        stages=(
            Stage(
                resolution=(side, side),
                network=dataclasses.replace(network, patch=int(patch)),
                precondition=XPreconditioning(path),
                process=LinearProcess(path),
                training=training(600),
                sampler=LinearHeun(steps=50),
                # Times 0.1 to 1.
                guidance=(ClassifierFree(GUIDANCE[letter], (0.0, 9.0 * path.noise_scale)),),
            ),
        ),
        sampling=Sampling(seeds="0-63", batch_size=16),
        evaluation=Evaluation(
            features="inception",
            reference=f"npz:VIRTUAL_imagenet{side}_labeled.npz",
            seeds="0-49999",
            kept=50_000,
            published=Published("table 7, guided", FID[size]) if size in FID else Published(),
        ),
    ).to_config_dict()
