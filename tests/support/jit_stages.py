"""A small JiT stage, and training states for it as the published ones."""

import jax
import numpy as np

from rdm_jax.config import Config, Sampling, Stage, parse
from rdm_jax.config.saved import read_saved
from rdm_jax.diffusion.linear_path import LinearHeun, LinearProcess
from rdm_jax.diffusion.preconditioning import XPreconditioning
from rdm_jax.interop import formats
from rdm_jax.models.transformer import JiT
from rdm_jax.modes import run

# As a training command gives them; most do not matter here.
ARGUMENTS = {"epochs": 600, "lr": None, "blr": 5e-5, "device": "cuda", "distributed": True}
ARGUMENTS |= {"attn_dropout": 0.0, "proj_dropout": 0.2, "online_eval": False, "cfg": 2.9}
ARGUMENTS |= {"P_mean": -0.6, "P_std": 0.9, "noise_scale": 2.0, "t_eps": 0.04}


def config_with(**stage) -> Config:
    """One stage of the linear path, whose network and resolution fit no file."""
    parts = {"process": LinearProcess(), "sampler": LinearHeun(steps=2)} | stage
    return Config(stages=(Stage(**parts),), sampling=Sampling(seeds="0-7", batch_size=8))


def import_file(path, workdir, config=None, *, stage: int = 1, **flags) -> Config:
    """Imports a file as a stage; returns the saved config."""
    values = (config or config_with()).to_config_dict()
    run(values, str(workdir), mode="import", stage=stage, weights=str(path), **flags)
    return parse(read_saved(workdir / "config.json"))


def small_file() -> tuple[dict, dict[str, np.ndarray]]:
    """(arguments, tensors) of a network of 3 blocks, width 16, 2 class tokens and 3 classes."""
    network = JiT(4, 16, 3, 2, 8, class_tokens=2, class_tokens_from=1)
    stage = Stage((8, 8), network, XPreconditioning())
    published, tensors = formats.format_of(stage), dict(formats.format_of(stage).buffers())
    random = np.random.default_rng(0)
    for keys, leaf in jax.tree_util.tree_flatten_with_path(stage.build(3, 3).abstract)[0]:
        name = published.original_name(tuple(key.key for key in keys))
        value = 0.1 * random.standard_normal(leaf.shape).astype(np.float32)
        tensors[name] = published.to_theirs(name, value)
    arguments = {"model": "JiT-Tiny", "img_size": 8, "class_num": 3, "in_context_start": 1}
    return ARGUMENTS | arguments, tensors
