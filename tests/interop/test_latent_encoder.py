"""A published autoencoder between pixels and latents, and the loss of a stage on them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rdm_jax.data.image_sets import open_prepared
from rdm_jax.data.images import ImageSpec
from rdm_jax.data.latents import add_latents, open_latents
from rdm_jax.data.prepare import prepare
from rdm_jax.diffusion.latents import Latents
from rdm_jax.interop.latent_encoder import PixelCodec
from rdm_jax.runtime.errors import InputError
from rdm_jax.training.program import build_objective
from tests.support.autoencoders import SMALL, published
from tests.support.configs import tiny_config, write_images


@pytest.fixture
def directory(tmp_path):
    write_images(tmp_path / "images", count=6)
    return prepare(f"folder:{tmp_path / 'images'}", tmp_path / "data", ImageSpec(8, 8))


@pytest.mark.second
def test_another_factor_is_refused_before_anything_is_encoded(directory, tmp_path):
    config = dataclasses.replace(SMALL, widths=(4,) * 5)
    published(tmp_path / "autoencoder", config)
    with pytest.raises(InputError, match="of 8 x 8 pixels, does not divide.*divisible by 16"):
        add_latents(directory, PixelCodec(tmp_path / "autoencoder"))


@pytest.mark.second
def test_a_stage_is_trained_on_normalised_latents(directory, tmp_path):
    """And an image's loss depends on its own key alone."""
    published(tmp_path / "autoencoder")
    codec = PixelCodec(tmp_path / "autoencoder")
    add_latents(directory, codec)
    pixels = open_prepared(directory).batch(np.arange(6))["image"]
    found = open_latents(directory, codec.digest, ())
    batch = found.images.batch(np.arange(6))
    expected = codec(pixels)
    np.testing.assert_allclose(batch["image"], expected, rtol=2e-3, atol=2e-3)
    assert codec.decode(expected[..., :4]).shape == pixels.shape

    form = Latents(found.mean, found.deviation)
    stage = tiny_config("nowhere").stages[0]
    objective = build_objective(stage, found.images.image_shape, 0, latents=form)
    assert objective.inputs(found.images.image_shape)["image"].dtype == np.float16
    keys = jax.random.split(jax.random.key(0), 6)
    params = jax.jit(objective.network.init)(jax.random.key(1))

    losses = jax.jit(lambda batch, keys: objective.loss(params, batch, keys, dropout=False))
    every = losses(batch, keys)
    turned = losses({name: values[::-1] for name, values in batch.items()}, keys[::-1])
    np.testing.assert_allclose(every[::-1], turned, rtol=1e-4)
    assert np.isfinite(every).all()
    normalised = np.asarray(form.draw(jnp.asarray(batch["image"]), 1, keys))
    np.testing.assert_allclose(normalised.std((0, 1, 2)), 1, rtol=0.25)


@pytest.mark.parametrize("changes", [{"flip": True}, {"augment": 0.1}, {"dct_quality": 50}])
def test_what_needs_pixels_is_refused(changes):
    stage = tiny_config("nowhere", **changes).stages[0]
    with pytest.raises(InputError, match=rf"config\.stage1\.training\.{next(iter(changes))}="):
        build_objective(stage, (4, 4, 8), 0, latents=Latents((0.0,) * 4, (1.0,) * 4))
