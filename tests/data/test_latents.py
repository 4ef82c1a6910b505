"""Latents beside prepared images: encoded once, normalised, and refused where they do not fit."""

import dataclasses
import json
import pickle

import jax
import numpy as np
import pytest

from rdm_jax.data import latents
from rdm_jax.data.image_sets import open_prepared
from rdm_jax.data.images import ImageSpec
from rdm_jax.data.latents import add_latents, folder_of, open_latents, statistics, verify_latents
from rdm_jax.data.prepare import prepare
from rdm_jax.diffusion.latents import Latents
from rdm_jax.runtime.errors import InputError
from tests.support.configs import write_images
from tests.support.small_folder import flip_bit

COUNT = 7


class Encoder:
    """Half the size: means and log-variances are pixels, scaled."""

    def __init__(self, digest="a" * 64):
        self.digest, self.calls = digest, 0

    def check(self, image_shape):
        if image_shape[0] % 2:
            raise InputError("it does not divide", "Use an even height.")

    def __call__(self, images):
        self.calls += 1
        mean = images[:, ::2, ::2, :2].astype(np.float32) / 16
        return np.concatenate([mean, mean / 8 - 2], -1)


@pytest.fixture
def directory(tmp_path):
    write_images(tmp_path / "images", count=COUNT)
    return prepare(f"folder:{tmp_path / 'images'}", tmp_path / "data", ImageSpec(8, 8))


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(latents, "CHUNK", 3)


def test_latents_are_those_of_the_images_in_their_order(directory, small_chunks):
    encoder = Encoder()
    add_latents(directory, encoder)
    calls = encoder.calls
    add_latents(directory, encoder)
    assert encoder.calls == calls > 1  # encoded once
    images = open_prepared(directory)
    found = open_latents(directory, encoder.digest, images.class_names)
    everything = np.arange(COUNT)
    made = pickle.loads(pickle.dumps(found.images)).batch(everything)
    expected = Encoder()(images.batch(everything)["image"]).astype(np.float16)
    np.testing.assert_array_equal(made["image"], expected)
    np.testing.assert_array_equal(made["label"], images.labels())
    assert found.images.identity != images.identity
    training, held_out = found.images.split(2)
    assert training.batch([0])["image"].dtype == held_out.batch([0])["image"].dtype == np.float16
    found.images.cache("reading")
    np.testing.assert_array_equal(found.images.batch(everything)["image"], expected)


def test_statistics_are_those_of_draws(small_chunks):
    random = np.random.default_rng(0)
    mean = random.normal(3, 2, (10, 4, 4, 2)).astype(np.float16)
    moments = np.concatenate([mean, np.full_like(mean, np.log(0.5))], -1)
    noise = random.standard_normal((2000, *mean.shape)) * np.sqrt(0.5)
    draws = mean.astype(np.float64) + noise
    found = statistics(moments)
    np.testing.assert_allclose(found[0], draws.mean((0, 1, 2, 3)), rtol=2e-3)
    np.testing.assert_allclose(found[1], draws.std((0, 1, 2, 3)), rtol=2e-3)


def test_an_interrupted_run_is_resumed_with_the_same_result(directory, small_chunks):
    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        add_latents(directory, Encoder(), stop)
    resumed = Encoder()
    add_latents(directory, resumed)
    assert resumed.calls == 3  # the shape, and two of three chunks
    images = open_prepared(directory).batch(np.arange(COUNT))["image"]
    found = open_latents(directory, resumed.digest, ()).images.batch(np.arange(COUNT))["image"]
    np.testing.assert_array_equal(found, Encoder()(images).astype(np.float16))


def test_latents_that_do_not_fit_are_refused(directory):
    with pytest.raises(InputError, match="has no latents of the autoencoder with SHA-256 aaaa"):
        open_latents(directory, "a" * 64, ())
    add_latents(directory, Encoder())
    with pytest.raises(InputError, match="bbbb, but those of others .latents_aaaa.*--mode=prepare"):
        open_latents(directory, "b" * 64, ())
    folder = folder_of(directory, "a" * 64)
    manifest = folder / "manifest.json"
    text = manifest.read_text()
    for changes, pattern in [
        ({"of": "others"}, "latents of other images"),
        ({"autoencoder": "a" * 16 + "c" * 48}, "latents of another autoencoder"),
        ({"mean": [0.0]}, "statistics of other latents"),
        ({"version": 9}, "version is 9"),
    ]:
        manifest.write_text(json.dumps(json.loads(text) | changes))
        with pytest.raises(InputError, match=pattern):
            open_latents(directory, "a" * 64, ())
    manifest.write_text(text)
    flip_bit(folder / latents.MOMENTS, 9)
    with pytest.raises(InputError, match=r"moments\.bin"):
        verify_latents(directory)
    (folder / latents.MOMENTS).write_bytes(b"")
    with pytest.raises(InputError, match=r"moments\.bin"):
        open_latents(directory, "a" * 64, ())


def test_values_that_do_not_fit_in_float16_are_refused(directory, monkeypatch):
    for value in (1e6, np.nan):
        monkeypatch.setattr(
            Encoder, "__call__", lambda _, x, v=value: np.full((len(x), 4, 4, 4), v, np.float32)
        )
        with pytest.raises(InputError, match="records 0 to 6 do not fit in float16"):
            add_latents(directory, Encoder())


@pytest.mark.second
def test_draws_have_the_posterior_and_depend_on_their_key_alone():
    form = Latents(mean=(1.0, -2.0), deviation=(2.0, 0.5))
    moments = np.zeros((512, 4, 4, 4), np.float16) + np.float16([3.0, -1.0, np.log(0.25), 0.0])
    keys = jax.random.split(jax.random.key(0), 512)

    @jax.jit
    def seen(moments, keys):
        means = dataclasses.replace(form, sampled=False).draw(moments, 2, keys)
        alone = form.draw(moments[5:6], 1, keys[5:6])
        return form.draw(moments, 1, keys), alone, means, form.decode(means)

    drawn, alone, means, decoded = map(np.asarray, seen(moments, keys))
    np.testing.assert_allclose(drawn.mean((0, 1, 2)), [1.0, 2.0], atol=0.1)
    np.testing.assert_allclose(drawn.std((0, 1, 2)), [0.25, 2.0], rtol=0.05)
    np.testing.assert_allclose(drawn[5:6], alone, atol=1e-6)
    np.testing.assert_allclose(means, np.broadcast_to([1.0, 2.0], (512, 2, 2, 2)), atol=1e-6)
    np.testing.assert_allclose(decoded[0, 0, 0], [3.0, -1.0], atol=1e-6)
