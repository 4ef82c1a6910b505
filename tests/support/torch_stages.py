"""Two small stages with all published options, and random weights for them."""

import dataclasses

import jax
import ml_collections
import numpy as np

from rdm_jax.config import Config, Stage
from rdm_jax.diffusion.samplers import Heun, RelayHeun
from rdm_jax.interop import pytorch_names
from rdm_jax.models.adm import ADM
from rdm_jax.models.song import Song
from tests.support.configs import tiny_config

CLASSES = 3
NETWORK = ADM(channels=8, channel_mult=(1,), blocks=1, attention_levels=(), dropout=0.1)
NCSN = Song(
    8,
    (1, 2),
    1,
    attention_levels=(1,),
    embedding="fourier",
    noise_mult=2,
    residual=True,
    filter=(1, 3, 3, 1),
)


def config_for(folder, **sampling) -> Config:
    """Two stages, 4x4 -> 8x8, with every published option of sampling."""
    config = tiny_config(folder / "images", preview_every=0)
    churned = Heun(steps=4, churn=40.0, churn_min=0.05, churn_max=50.0, churn_noise=1.003)
    truncated = RelayHeun(steps=12, rho=100.0, truncation_sigma=0.9, truncation_time=0.93)
    first, second = config.stages
    stages = (
        dataclasses.replace(first, network=NETWORK, sampler=churned),
        dataclasses.replace(second, network=NETWORK, sampler=truncated, guidance=3.5),
    )
    return dataclasses.replace(
        config, stages=stages, sampling=dataclasses.replace(config.sampling, **sampling)
    )


def values_of(config: Config) -> ml_collections.ConfigDict:
    return config.to_config_dict()


def tensors_of(stage: Stage, classes: int, seed: int, dtype=np.float32) -> dict[str, np.ndarray]:
    """Random tensors for a stage, with the original's names and layout."""
    rng, tensors = np.random.default_rng(seed), {}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(stage.build(3, classes).abstract)[0]:
        name = pytorch_names.original_name(
            tuple(key.key for key in keys), stage.network, stage.resolution[0]
        )
        value = rng.standard_normal(leaf.shape) / np.sqrt(max(1, np.prod(leaf.shape[:-1])))
        tensors[name] = pytorch_names.to_theirs(value).astype(dtype)
    return tensors | {
        name: value.astype(dtype) for name, value in pytorch_names.buffers(stage).items()
    }


def settings_for(stage: Stage, classes: int = CLASSES) -> tuple[str, dict]:
    return pytorch_names.settings_of(stage, 3, classes)
