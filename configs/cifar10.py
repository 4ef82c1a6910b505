"""CIFAR-10, 8x8 -> 32x32, 10 classes: 50,000 photographs on one accelerator.

    python -m rdm_jax.main --config configs/cifar10.py --workdir runs/cifar10

The data, one of these:

- tfds:cifar10: tensorflow-datasets downloads it, with TensorFlow (not needed for reading);
- zip:cifar10-32x32.zip: as EDM's dataset_tool.py makes it
  (--config.data.source=zip:cifar10-32x32.zip);
- folder:cifar10: one folder of images per class.

The run ends with an evaluation of 50,000 images in Inception's features; an error names the command
that downloads their weights. --config.evaluation.features=classifier does without them, none skips
the evaluation.

The settings are EDM's for CIFAR-10 (arXiv 2206.00364, table 7) where it has them. Not trained here
yet; the data path was tried with records of random pixels.
"""

from rdm_jax.config import Config, Data, Evaluation, Sampling, Stage, Training
from rdm_jax.diffusion.processes import GaussianProcess, RelayProcess
from rdm_jax.diffusion.samplers import Heun, RelayHeun
from rdm_jax.models.song import Song


def training(images: int) -> Training:
    """The settings that both stages share."""
    return Training(
        images=images,
        batch_size=512,
        learning_rate=1e-3,
        warmup=10_000_000,
        ema_halflife=500_000.0,
        augment=0.12,
        checkpoint_every=1_000_000,
        preview_every=1_000_000,
        log_every=50_000,
        validation=1024,
    )


def get_config():
    """The config as an ml_collections ConfigDict."""
    shared = {
        "channels": 128,
        "blocks": 4,
        "dropout": 0.13,
        "augment_labels": 9,
        "dtype": "bfloat16",
    }
    return Config(
        data=Data(source="tfds:cifar10", directory="data/cifar10_32", crop="none"),
        stages=(
            Stage(
                resolution=(8, 8),
                network=Song(channel_mult=(2, 2), attention_levels=(0,), **shared),
                process=GaussianProcess(),
                training=training(50_000_000),
                sampler=Heun(steps=18, rho=7.0),
                guidance=1.0,
            ),
            Stage(
                resolution=(32, 32),
                network=Song(channel_mult=(2, 2, 2), attention_levels=(1,), **shared),
                process=RelayProcess(patch=4),
                training=training(100_000_000),
                sampler=RelayHeun(steps=40),
            ),
        ),
        sampling=Sampling(seeds="0-99", batch_size=100),
        evaluation=Evaluation(features="inception", seeds="0-49999"),
    ).to_config_dict()
