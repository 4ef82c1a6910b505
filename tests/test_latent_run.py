"""A relay in the latents of an autoencoder that the run trains itself, from end to end."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import rdm_jax
from rdm_jax.config import Training
from rdm_jax.config.autoencoder import Autoencoder
from rdm_jax.config.rules import refuse_latents
from rdm_jax.data.image_sets import open_prepared
from rdm_jax.diffusion.processes import GaussianProcess
from rdm_jax.interop import autoencoder_files, latent_space
from rdm_jax.models.autoencoder import AutoencoderKL
from rdm_jax.modes import run
from rdm_jax.runtime.errors import InputError
from rdm_jax.stage_datasets import open_sets
from tests.support.autoencoders import SMALL, published, small_params
from tests.support.configs import tiny_config, write_images
from tests.support.pictures import shows_images

NETWORK = AutoencoderKL(latent_channels=2, widths=(4, 8), blocks=1, groups=2)
SHORT = Training(
    images=16,
    batch_size=8,
    label_dropout=0.0,
    checkpoint_every=16,
    preview_every=0,
    log_every=8,
    validation=8,
)


def latent(config, folder, **data):
    """The config on latents of the autoencoder in a folder."""
    data = dataclasses.replace(config.data, autoencoder=str(folder), **data)
    return dataclasses.replace(config, data=data, autoencoder=Autoencoder(NETWORK, training=SHORT))


@pytest.mark.long
def test_relay_in_latents_from_training_to_pixels(tmp_path):
    """Images of 16 x 16, latents of 8 x 8, and of 4 x 4 for the first stage."""
    write_images(tmp_path / "images", size=16)
    workdir = tmp_path / "run"
    config = tiny_config(tmp_path / "images", images=16, checkpoint_every=16, preview_every=16)
    config = latent(config, workdir / "autoencoder")
    config = dataclasses.replace(
        config, sampling=dataclasses.replace(config.sampling, seeds="0-7", batch_size=8)
    )
    run(config, workdir, mode="autoencoder")
    run(config, workdir, mode="all")

    digest = latent_space.digest(config)
    for number in (1, 2):
        (about,) = (workdir / f"stage{number}/checkpoints").glob("*/about/metadata")
        assert json.loads(about.read_text())["latents"]["autoencoder"] == digest
        assert shows_images(workdir / f"stage{number}/previews/0000000016.png")
    assert shows_images(workdir / "contact_sheet.png")
    with np.load(workdir / "samples/samples.npz") as saved:
        assert saved["stage1"].shape == (8, 8, 8, 3) and saved["images"].shape == (8, 16, 16, 3)
        assert saved["images"].dtype == np.uint8 and saved["images"].std() > 0
        made = saved["images"]

    pipe = rdm_jax.load(workdir)
    np.testing.assert_array_equal(pipe.sample(range(8))[-1], made)
    with pytest.raises(InputError, match="small is not supported with config.data.autoencoder"):
        pipe.sample([0], small=made[0])

    other = jax.tree.map(lambda leaf: leaf + 1, small_params(NETWORK))
    autoencoder_files.save(NETWORK, other, tmp_path / "other")
    for folder, pattern in [(tmp_path / "other", "trained on latents"), ("", "gives pixels")]:
        with pytest.raises(InputError, match=pattern):
            rdm_jax.load(workdir, data={"autoencoder": str(folder)})


@pytest.mark.second
def test_prepared_sets_have_latents_beside_pixels(tmp_path):
    write_images(tmp_path / "images")
    published(tmp_path / "vae")
    config = latent(tiny_config(tmp_path / "images", low=(2, 2)), tmp_path / "vae")
    images = open_sets(config, [1, 2])[2]
    assert images.image_shape == (8, 8, 3) and not images.is_cached
    training, held_out = images.split(4)
    assert training.latents.image_shape == held_out.latents.image_shape == (4, 4, 8)
    assert len(training.latents) == 20 and held_out.latents.latent_spec.mean
    elsewhere = latent(config, tmp_path / "vae", source=f"prepared:{config.data.directory}")
    again = open_sets(elsewhere, [2])[2]
    assert again.latents.identity == images.latents.identity
    assert open_sets(config, [2], embeds=False)[2].latents is None
    assert open_prepared(config.data.directory).latents is None


def single(folder, stages=1, **training):
    config = tiny_config("nowhere", **training)
    stage = dataclasses.replace(config.stages[0], process=GaussianProcess())
    return latent(dataclasses.replace(config, stages=(stage,)), folder)


def test_sizes_are_those_of_the_autoencoder(tmp_path):
    published(tmp_path)
    config = single(tmp_path)
    assert latent_space.image_shape(config, 1) == (8, 8, 3)
    assert latent_space.channels(config) == SMALL.latent_channels
    latent_space.check(config)
    own = latent_space.in_pixels(config)
    assert own.stages[0].resolution == (8, 8) and own.data.autoencoder == ""
    assert latent_space.in_pixels(own) == own and latent_space.channels(own) == 3


def test_autoencoders_that_cannot_be_used_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"autoencoder='.*vae' has no config.json. Train one"):
        latent_space.check(single(tmp_path / "vae"))
    published(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(
        InputError, match=r"config\.data\.autoencoder: .*config\.json cannot be rea"
    ):
        latent_space.check(single(tmp_path))


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        (lambda c: c.with_stage(1, source="folder:x"), "config.stage1.source='folder:x'"),
        (lambda c: c.with_stage(1, training={"flip": True}), "config.stage1.training.flip=True"),
        (lambda c: latent(c, c.data.autoencoder, directory=""), "config.data.directory=''"),
        (
            lambda c: latent(c, c.data.autoencoder, channels=1),
            "config.data.autoencoder, of .* 1 ch",
        ),
        (
            lambda c: dataclasses.replace(
                c, sampling=dataclasses.replace(c.sampling, low="folder:x")
            ),
            "config.sampling.low='folder:x'",
        ),
    ],
)
def test_what_latents_cannot_have_is_refused(tmp_path, change, pattern):
    published(tmp_path)
    with pytest.raises(InputError, match=pattern):
        latent_space.check(change(single(tmp_path)))


def test_what_is_for_pixels_is_refused(tmp_path):
    with pytest.raises(InputError, match="a plan is not supported .*Use it for stages of pixels"):
        refuse_latents(single(tmp_path), "a plan")
