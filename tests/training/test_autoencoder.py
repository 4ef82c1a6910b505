"""An autoencoder that a run trains for itself."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rdm_jax.config import Training, validate_autoencoder
from rdm_jax.config.autoencoder import Autoencoder
from rdm_jax.diffusion.pixels import Pixels
from rdm_jax.interop import autoencoder_files
from rdm_jax.models.autoencoder import AutoencoderKL, Moments
from rdm_jax.modes import run
from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.signals import StopOnSignal
from rdm_jax.training.autoencoder import AutoencoderTrainer, Reconstruction, kl_divergence, measure
from tests.support.autoencoders import small_params
from tests.support.checkpoints import assert_equal, state
from tests.support.configs import tiny_config
from tests.support.image_sets import image_set
from tests.support.pictures import shows_images

NETWORK = AutoencoderKL(latent_channels=2, widths=(4, 8), blocks=1, groups=2)
TRAINING = Training(
    images=64,
    batch_size=8,
    learning_rate=1e-2,
    warmup=8,
    ema_halflife=20.0,
    label_dropout=0.0,
    checkpoint_every=32,
    preview_every=0,
    log_every=8,
    validation=8,
)
SETTINGS = Autoencoder(NETWORK, training=TRAINING)


def config(folder="nowhere", **changes):
    return dataclasses.replace(
        tiny_config(folder), autoencoder=dataclasses.replace(SETTINGS, **changes)
    )


def test_kl_divergence_is_that_of_the_samples():
    """Against a Monte Carlo mean of log N(z; mean, variance) - log N(z; 0, 1)."""
    moments = Moments(jnp.full((1, 1, 1, 1), 0.7), jnp.full((1, 1, 1, 1), -0.8))
    noise = np.random.default_rng(0).standard_normal((100_000, 1, 1, 1)).astype(np.float32)
    z = np.asarray(moments.sample(jnp.asarray(noise)))
    measured = (-(noise**2) / 2 + 0.4 + z**2 / 2).mean()
    np.testing.assert_allclose(kl_divergence(moments), measured, atol=0.02)
    assert kl_divergence(Moments(jnp.zeros((1, 1, 1, 1)), jnp.zeros((1, 1, 1, 1)))).item() == 0


@pytest.mark.parametrize("error", ["l1", pytest.param("l2", marks=pytest.mark.second)])
def test_loss_is_error_and_divergence(error):
    images = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), np.uint8)
    keys = jax.random.split(jax.random.key(0), 2)

    @jax.jit
    def both(params):
        """The loss, and its two parts computed here."""
        objective = Reconstruction(dataclasses.replace(SETTINGS, error=error, kl_weight=2.0))
        loss = objective.loss(params, {"image": jnp.asarray(images)}, keys, dropout=True)
        model, x = NETWORK.build(), Pixels().encode(jnp.asarray(images))
        moments = model.encode(params, x)
        noise_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, 1)
        noise = jax.vmap(lambda key: jax.random.normal(key, (2, 2, 2)))(noise_keys)
        made = model.decode(params, moments.sample(noise))
        size = jnp.abs(made - x) if error == "l1" else (made - x) ** 2
        return loss, size.mean((1, 2, 3)), kl_divergence(moments).mean((1, 2, 3))

    loss, size, divergence = both(small_params(NETWORK))
    np.testing.assert_allclose(loss, size + 2 * divergence, rtol=1e-4)
    assert (size > 0.1).all() and (divergence > 0.01).all()


def train(directory, images):
    training = dataclasses.replace(TRAINING, images=images)
    trainer = AutoencoderTrainer(config(training=training), image_set(), directory)
    trainer.run(StopOnSignal())
    return trainer


@pytest.mark.second
def test_training_resumes_bit_equal(tmp_path):
    """It also gets better."""
    trainer = train(tmp_path / "whole", 64)
    for images in (32, 64):
        train(tmp_path / "parts", images)
    assert_equal(*(state(tmp_path, 8, name) for name in ("whole", "parts")))
    text = (tmp_path / "whole/metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0] and trainer.objective.network.num_parameters > 1000


@pytest.mark.second
def test_measured_latents_have_unit_deviation():
    images = image_set()
    found = measure(NETWORK, small_params(NETWORK), images, 20)
    indices = np.linspace(0, len(images) - 1, 20).astype(int)
    x = Pixels().encode(jnp.asarray(images.batch(indices)["image"]))
    model = NETWORK.build()
    z = np.asarray(model.encode(small_params(NETWORK), x).mean)
    scaled = (z - found.network.shift) * found.network.scale
    assert abs(scaled.mean()) < 1e-4 and abs(scaled.std() - 1) < 1e-4
    made = Pixels().decode(model.decode(small_params(NETWORK), jnp.asarray(z)))
    error = ((np.asarray(made, float) - images.batch(indices)["image"]) ** 2).mean()
    np.testing.assert_allclose(found.psnr, 10 * np.log10(255**2 / error), atol=0.05)


@pytest.mark.second
def test_mode_writes_a_published_autoencoder(image_folder, tmp_path):
    settings = config(image_folder, training=dataclasses.replace(TRAINING, preview_every=64))
    for _ in range(2):  # the second time nothing is trained
        run(settings, tmp_path / "run", mode="autoencoder")
    found = autoencoder_files.load(tmp_path / "run/autoencoder")
    assert dataclasses.replace(found.config, scale=1.0, shift=0.0) == dataclasses.replace(
        NETWORK, scale=1.0
    )
    assert found.config.scale != NETWORK.scale
    assert shows_images(tmp_path / "run/autoencoder/previews/0000000064.png")


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"network": dataclasses.replace(NETWORK, groups=3)}, "network.groups=3 does not divide"),
        ({"network": dataclasses.replace(NETWORK, widths=(4,) * 5)}, "of 8 x 8 pixels, .*by 16"),
        ({"network": dataclasses.replace(NETWORK, channels=1)}, "of 3 channels.*Use images of 1"),
        ({"training": dataclasses.replace(TRAINING, augment=0.1)}, "training.augment=0.1"),
        ({"training": dataclasses.replace(TRAINING, start_from="a/b")}, "start_from='a/b'"),
        ({"training": dataclasses.replace(TRAINING, batch_size=7)}, "batch_size=7.*multiple of 8"),
    ],
)
def test_unusable_settings_are_refused(changes, pattern):
    with pytest.raises(InputError, match=pattern):
        validate_autoencoder.check(config(**changes), devices=8)
