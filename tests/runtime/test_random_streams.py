"""Random draws follow from the seed, whatever JAX's settings are."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rdm_jax.config.validate import check_config
from rdm_jax.runtime import jax_settings, random_streams
from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.random_streams import RandomStream
from tests.support.configs import tiny_config
from tests.support.paths import ROOT
from tests.support.precision import enable_x64


def drawn(seeds):
    """Noise for a few images, each from its own key."""
    keys = random_streams.image_keys(
        random_streams.stream_key(3, 1, RandomStream.SAMPLE), jnp.asarray(seeds, jnp.uint32)
    )
    return np.asarray(jax.jit(jax.vmap(lambda key: jax.random.normal(key, (2, 3))))(keys))


def test_stream_key_golden_values():
    """Another generator, or other folds, would change every image."""
    key = random_streams.stream_key(3, 1, RandomStream.SAMPLE)
    assert jax.random.key_data(key).tolist() == [1162771976, 1047151509]
    np.testing.assert_allclose(drawn([5])[0, 0], [1.7823627, -0.57366914, -1.2181393], rtol=1e-6)


@pytest.mark.parametrize("generator", ["rbg", "unsafe_rbg"])
def test_draws_ignore_default_generator(generator):
    wanted = drawn([5, 6, 7])
    with jax.default_prng_impl(generator):
        np.testing.assert_array_equal(drawn([5, 6, 7]), wanted)
        np.testing.assert_array_equal(drawn([6]), wanted[1:2])


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("jax_enable_x64", True),
        ("jax_threefry_partitionable", False),
        ("jax_random_seed_offset", 1),
    ],
)
def test_jax_settings_refuses_settings_that_change_draws(setting, value, monkeypatch):
    config = tiny_config("images")
    kept = getattr(jax.config, setting)
    jax.config.update(setting, value)
    try:
        for use in (
            lambda: check_config(config),
            lambda: random_streams.stream_key(0, 0, RandomStream.INIT),
        ):
            with pytest.raises(
                InputError,
                match=f"^{setting}={value} .*{setting.upper()}.* cannot .*Set it to {kept}.$",
            ):
                use()
    finally:
        jax.config.update(setting, kept)
    check_config(config)


def test_refused_settings_do_change_draws(monkeypatch):
    """Otherwise refusing them would be wrong."""
    wanted = drawn([5])
    monkeypatch.setattr(jax_settings, "NEEDED", {})
    with jax.threefry_partitionable(False):
        assert not np.array_equal(drawn([5]), wanted)
    with enable_x64(True):
        assert drawn([5]).dtype == np.float64


def test_jax_settings_logs_matmul_precision_once(caplog):
    caplog.set_level("INFO", logger="rdm_jax")
    jax_settings._log_precision.cache_clear()
    with jax.default_matmul_precision("float32"):
        for _ in range(2):
            jax_settings.check()
    assert caplog.text.count("jax_default_matmul_precision=float32") == 1


def test_root_key_is_the_only_source_of_keys():
    """A key made without naming its generator would follow JAX's default."""
    made = re.compile(r"random\.(key|PRNGKey)\(|import PRNGKey|nnx\.Rngs\(\d")
    files = [
        *ROOT.glob("rdm_jax/**/*.py"),
        *ROOT.glob("experiments/**/*.py"),
        *ROOT.glob("experiments/**/*.ipynb"),
    ]
    assert len(files) > 50
    found = [str(path.relative_to(ROOT)) for path in files if made.search(path.read_text())]
    assert found == ["rdm_jax/runtime/random_streams.py"]
