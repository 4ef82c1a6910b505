"""1x1 convolutions are products on CPUs, with the same values and gradients, and only there."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rdm_jax.models import convolution
from rdm_jax.models.convolution import convolved
from rdm_jax.models.functional import multiply_adds

NONE, ONE = ((0, 0), (0, 0)), ((1, 1), (1, 1))


def arrays(size=1, dtype=jnp.float32):
    random = np.random.default_rng(0)
    x, kernel = random.normal(size=(4, 5, 6, 3)), random.normal(size=(size, size, 3, 7))
    return jnp.asarray(x, dtype), jnp.asarray(kernel, dtype)


def expected(x, kernel):
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), NONE, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def loss(function, x, kernel):
    return (jnp.sin(function(x, kernel)) ** 2).sum()


def scanned(x, kernel):
    """One image after the other."""
    return jax.lax.map(lambda image: convolved(image[None], kernel, NONE)[0], x)


def mapped(x, kernel):
    return jax.vmap(lambda image: convolved(image[None], kernel, NONE)[0])(x)


FORMS = {
    "plain": lambda x, kernel: convolved(x, kernel, NONE),
    "remat": jax.checkpoint(lambda x, kernel: convolved(x, kernel, NONE)),
    "scan": scanned,
    "vmap": mapped,
}


@pytest.mark.parametrize("form", FORMS)
def test_products_equal_convolutions_and_so_do_gradients(form):
    both = [
        jax.jit(jax.value_and_grad(functools.partial(loss, function), (0, 1)))(*arrays())
        for function in (FORMS[form], expected)
    ]
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), *both)


def test_sharded_batches_stay_sharded():
    x, kernel = arrays()
    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4])
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    result = jax.jit(FORMS["plain"])(jax.device_put(x, spec), kernel)
    assert len({str(shard.index) for shard in result.addressable_shards}) == 4
    np.testing.assert_allclose(result, expected(x, kernel), rtol=1e-5, atol=1e-5)


def gradients(x, kernel, padding=ONE):
    function = functools.partial(loss, lambda x, kernel: convolved(x, kernel, padding))
    return jax.grad(function, (0, 1))(x, kernel)


def lowered(platform, x, kernel, padding):
    gradient = jax.jit(functools.partial(gradients, padding=padding))
    return gradient.trace(x, kernel).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_other_platforms_get_convolutions(platform):
    text = lowered(platform, *arrays(), NONE)
    assert text.count("stablehlo.convolution") == 3 and "dot_general" not in text


def test_cpus_get_products_for_1x1_kernels_in_float32():
    text = lowered("cpu", *arrays(), NONE)
    assert text.count("dot_general") == 3 and "stablehlo.convolution" not in text
    for others in ((*arrays(3), ONE), (*arrays(), ONE), (*arrays(dtype=jnp.bfloat16), NONE)):
        text = lowered("cpu", *others)
        assert "dot_general" not in text and text.count("stablehlo.convolution") == 3


def test_multiply_adds_are_counted_once():
    assert multiply_adds(FORMS["plain"], *arrays()) == 4 * 5 * 6 * 3 * 7


@pytest.fixture
def small_cache(monkeypatch):
    """The kernel's gradient of a batch of 16 comes in parts on eight devices, and on one."""
    monkeypatch.setattr(convolution, "CACHED", 5 * 6 * 7)
    random = np.random.default_rng(1)
    x, kernel = random.normal(size=(16, 5, 6, 3)), random.normal(size=(3, 3, 3, 7))
    return jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32)


def test_gradients_in_parts_equal_those_of_the_whole(small_cache, monkeypatch):
    assert convolution._parts(*small_cache) == 16 // jax.device_count() > 1
    found = jax.jit(gradients)(*small_cache)
    text = lowered("cpu", *small_cache, ONE)
    assert text.count("stablehlo.convolution") == 2 + 16 // jax.device_count()
    assert lowered("tpu", *small_cache, ONE).count("stablehlo.convolution") == 3
    monkeypatch.setattr(convolution, "CACHED", 10**9)
    jax.clear_caches()
    whole = jax.jit(gradients)(*small_cache)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), found, whole)


def test_parts_of_a_shared_batch_move_no_images(small_cache):
    x, kernel = small_cache
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    text = jax.jit(gradients).lower(jax.device_put(x, spec), kernel).compile().as_text()
    assert "all-reduce" in text
    assert not [kind for kind in ("all-to-all", "all-gather", "permute") if kind in text]


@pytest.mark.parametrize(("batch", "parts"), [(0, 1), (1, 1), (7, 7), (8, 1), (24, 3), (31, 31)])
def test_parts_divide_the_batch(monkeypatch, batch, parts):
    monkeypatch.setattr(convolution, "CACHED", 5 * 6 * 7)
    x, kernel = jnp.zeros((batch, 5, 6, 3)), jnp.zeros((3, 3, 3, 7))
    assert convolution._parts(x, kernel) == parts
