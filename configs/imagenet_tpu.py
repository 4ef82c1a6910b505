"""ImageNet, 64x64 -> 256x256, with channels that fill a TPU's 128 lanes.

    python -m rdm_jax.main --config configs/imagenet_tpu.py --workdir runs/imagenet_tpu
    python -m rdm_jax.main --config configs/imagenet_tpu.py --mode plan --target v5e-16 \\
        --classes 1000

`configs/imagenet.py` explains how to get the data, and keeps the published networks, whose weights
fit no others. A TPU pads their 192 channels to 256 and 576 to 640, and attention heads of 64
channels fill half of a multiplication; this config uses these lanes. Networks compute in bfloat16,
blocks are rematerialised in the backward pass, and parameters are sharded over the chips.

Hardware: 16 chips of 16 GB or more (experiments/benchmarks has the compiler's figures). Not trained
yet.
"""

from ml_collections import ConfigDict

from . import imagenet


def get_config() -> ConfigDict:
    """The config as an ml_collections ConfigDict."""
    config = imagenet.get_config()
    with config.unlocked():
        config.parallel.data, config.parallel.fsdp = 1, -1
        for stage in (config.stage1, config.stage2):
            stage.network.update(dtype="bfloat16", remat="block", head_channels=128)
        # 16 and 8 images on each of 16 chips: multiples of 8 are fastest (docs/scaling.md).
        config.stage1.training.accumulate, config.stage2.training.accumulate = 16, 32
        # 256, 384, 512 and 768 channels for 192, 384, 576 and 768; the embedding stays at 768.
        config.stage1.network.update(channels=128, channel_mult=(2, 3, 4, 6), emb_mult=6)
    return config
