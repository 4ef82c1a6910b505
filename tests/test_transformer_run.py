"""A relay of two transformers, from images to samples."""

import dataclasses

import numpy as np
import pytest

from rdm_jax.diffusion.guidance import ClassifierFree
from rdm_jax.diffusion.linear_path import LinearHeun, LinearProcess
from rdm_jax.diffusion.preconditioning import XPreconditioning
from rdm_jax.models.transformer import JiT
from rdm_jax.modes import run
from tests.support.configs import tiny_config, write_images

NETWORK = JiT(
    patch=2, hidden=16, depth=2, heads=2, bottleneck=8, class_tokens=2, class_tokens_from=1
)


@pytest.mark.long
def test_linear_path_hands_over_to_a_relay_of_transformers(tmp_path, caplog):
    caplog.set_level("INFO", "rdm_jax")
    write_images(tmp_path / "images")
    config = tiny_config(tmp_path / "images").with_stage(
        1,
        network=NETWORK,
        precondition=XPreconditioning(),
        process=LinearProcess(),
        sampler=LinearHeun(steps=4),
        guidance=ClassifierFree(2.0, (0.0, 9.0)),
    )
    network = dataclasses.replace(NETWORK, head_blocks=1, stem_blocks=1, pixel_channels=8)
    config = config.with_stage(2, network=network)
    run(config.to_config_dict(), str(tmp_path / "run"))
    with np.load(tmp_path / "run/samples/samples.npz") as made:
        images, small = made["images"], made["stage1"]
    assert images.shape[1:] == (8, 8, 3) and small.shape[1:] == (4, 4, 3)
    assert len(np.unique(images)) > 10 and len(np.unique(small)) > 10
    assert "stage1 from step 20, average ema, NFE 7 per image, guidance 2" in caplog.text
    assert "starts at sigma" in caplog.text
