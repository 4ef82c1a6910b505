"""ImageNet, 64x64 -> 256x256, 1000 classes: the settings of the published system.

They are those of arXiv 2309.03350, section 4 and appendix. Sample from the published weights (EDM's
ImageNet-64 snapshot for stage 1, RDM's state for stage 2); no data is needed:

    python -m rdm_jax.main --config configs/imagenet.py --workdir runs/imagenet \\
        --mode import --stage 1 --weights STAGE1.pkl
    python -m rdm_jax.main --config configs/imagenet.py --workdir runs/imagenet \\
        --mode import --stage 2 --weights STAGE2.pt
    python -m rdm_jax.main --config configs/imagenet.py --workdir runs/imagenet --mode sample

Measure 50,000 samples as the paper does, against ADM's statistics, which are published beside its
code. The released samplers post-process (brightness 1.06) before they measure:

    base=https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches
    curl -LO $base/imagenet/256/VIRTUAL_imagenet256_labeled.npz
    python -m rdm_jax.main --config configs/imagenet.py --workdir runs/imagenet --mode evaluate \\
        --config.sampling.postprocess=rdm_imagenet

Train: a folder of 1,000 folders of images, 138 GB. After registering at image-net.org, from
ILSVRC2012_img_train.tar:

    mkdir -p imagenet/train && tar xf ILSVRC2012_img_train.tar -C imagenet/train
    for t in imagenet/train/*.tar; do mkdir ${t%.tar} && tar xf $t -C ${t%.tar} && rm $t; done
    python -m rdm_jax.main --config configs/imagenet.py --workdir runs/imagenet --mode prepare
    python -m rdm_jax.main --config configs/imagenet.py --workdir runs/imagenet --mode train \\
        --config.data.workers=8

`tfds:imagenet2012`, prepared on a machine with TensorFlow, or a zip in EDM's layout, works as well
as a folder. The released stage 1 was trained on records of its own, ADM's crop at 64:
`--config.stage1.source=folder:imagenet/train` makes the same.

Networks compute in bfloat16 (the released ones were trained in float16);
`--config.stage1.network.dtype=float32` and the same for stage 2 sample in float32, at twice the
time or more. `training.accumulate` is for your devices: 8 to 128 images on each at a time.

Published: FID 1.99 (1.87 with balanced classes); stage 1 on 32 V100 for 13 days, stage 2 on 64 A100
for 12.5 days. Not run here yet.
"""

from rdm_jax.config import Config, Data, Evaluation, Published, Sampling, Stage, Training
from rdm_jax.diffusion.processes import GaussianProcess, RelayProcess
from rdm_jax.diffusion.samplers import Heun, RelayHeun
from rdm_jax.diffusion.schedules import Clock
from rdm_jax.models.adm import ADM


def training(images: int, ema_halflife: float) -> Training:
    """The settings that both stages share."""
    return Training(
        images=images,
        batch_size=4096,
        learning_rate=1e-4,
        warmup=10_000_000,
        ema_halflife=ema_halflife,
        # The released training command cannot enable it, though guidance needs it.
        label_dropout=0.1,
        checkpoint_every=10_000_000,
        preview_every=10_000_000,
        log_every=200_000,
        validation=4096,
    )


def get_config():
    """The config as an ml_collections ConfigDict."""
    return Config(
        data=Data(source="folder:imagenet/train", directory="data/imagenet_256", crop="adm"),
        stages=(
            Stage(
                resolution=(64, 64),
                network=ADM(
                    channels=192,
                    channel_mult=(1, 2, 3, 4),
                    blocks=3,
                    attention_levels=(1, 2, 3),
                    dropout=0.1,
                    dtype="bfloat16",
                ),
                process=GaussianProcess(),
                training=training(2_500_000_000, 50_000_000.0),
                sampler=Heun(
                    steps=256,
                    rho=7.0,
                    churn=40.0,
                    churn_min=0.05,
                    churn_max=50.0,
                    churn_noise=1.003,
                ),
            ),
            Stage(
                resolution=(256, 256),
                network=ADM(
                    channels=256,
                    channel_mult=(1, 1, 2, 2, 4, 4),
                    blocks=2,
                    attention_levels=(3, 4, 5),
                    dropout=0.1,
                    dtype="bfloat16",
                ),
                process=RelayProcess(
                    patch=4, block_scale=0.15, clock=Clock(length=0.93, blur_sigma_max=3.0)
                ),
                training=training(1_250_000_000, 500_000.0),
                sampler=RelayHeun(
                    steps=200, rho=100.0, truncation_sigma=0.9, truncation_time=0.93, eta=0.2
                ),
                guidance=3.5,
            ),
        ),
        sampling=Sampling(seeds="0-63", batch_size=16),
        evaluation=Evaluation(
            features="inception",
            reference="npz:VIRTUAL_imagenet256_labeled.npz",
            seeds="0-49999",
            kept=50_000,
            published=Published("guided, balanced labels", 1.87, 3.97, 278.75, 0.81, 0.59),
        ),
    ).to_config_dict()
