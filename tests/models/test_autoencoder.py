"""The autoencoder: dtypes, memory, tiles, devices, refusals. Numbers: `test_autoencoder_files`."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rdm_jax.models.attention import attend
from rdm_jax.models.autoencoder import AutoencoderKL, Moments, attend_in_parts
from rdm_jax.models.codec import Codec, in_tiles
from rdm_jax.runtime import sharding
from rdm_jax.runtime.errors import InputError
from tests.support.autoencoders import SMALL, small_params


def images(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def codec(config=SMALL, devices=1, tile=0):
    mesh = sharding.make_mesh(devices=jax.devices()[:devices])
    return Codec(
        config.build(), small_params(dataclasses.replace(config, dtype="float32")), mesh, tile
    )


def test_autoencoder_shapes_and_dtypes():
    for dtype in ("float32", "bfloat16"):
        model = dataclasses.replace(SMALL, dtype=dtype).build()
        moments = jax.eval_shape(model.encode, model.parts.abstract, jnp.zeros((2, 8, 12, 3)))
        assert {(leaf.shape, leaf.dtype.name) for leaf in moments} == {((2, 4, 6, 4), "float32")}
        decoded = jax.eval_shape(model.decode, model.parts.abstract, moments.mean)
        assert (decoded.shape, decoded.dtype) == ((2, 8, 12, 3), jnp.float32)
        leaves = jax.tree.leaves(model.parts.abstract)
        assert {leaf.dtype.name for leaf in leaves} == {"float32"}
    assert AutoencoderKL().factor == 8 and SMALL.factor == 2


def test_bfloat16_is_near_float32():
    """Each of about ten roundings, to 2^-9 of a value, adds to the error of the next."""
    x, narrow = images(2, 8, 8, 3), dataclasses.replace(SMALL, dtype="bfloat16")
    (wide, z), (y, w) = (
        (made.encode(x).mean, made.decode(images(2, 4, 4, 4))) for made in (codec(), codec(narrow))
    )
    for exact, rounded in ((wide, y), (z, w)):
        error = np.sqrt(((exact - rounded) ** 2).mean() / exact.var())
        assert 2**-9 < error < 10 * 2**-9, error


def test_moments_sample():
    moments = Moments(jnp.full((1, 2, 2, 1), 3.0), jnp.full((1, 2, 2, 1), math.log(4.0)))
    np.testing.assert_allclose(moments.sample(jnp.full((1, 2, 2, 1), -0.5)), 2.0)


def largest(jaxpr):
    """Elements of the largest array of a computation, also inside of loops."""
    sizes = [0]
    for equation in jaxpr.eqns:
        sizes += [math.prod(out.aval.shape) for out in equation.outvars]
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            sizes += [largest(inner)] if hasattr(inner, "eqns") else []
    return max(sizes)


@pytest.mark.parametrize("most", [1, 100, 300, 899])
def test_attention_in_parts(most):
    q, k, v = (jnp.asarray(images(2, 30, 1, 4, seed=s)) for s in range(3))
    whole = jax.jit(jax.value_and_grad(lambda q, k, v: (attend(q, k, v) ** 2).sum(), (0, 1, 2)))
    in_parts = jax.value_and_grad(
        lambda q, k, v: (attend_in_parts(q, k, v, most) ** 2).sum(), (0, 1, 2)
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
        whole(q, k, v),
        jax.jit(in_parts)(q, k, v),
    )
    weights = 2 * 30 * 30
    assert largest(jax.make_jaxpr(whole)(q, k, v).jaxpr) == weights
    assert largest(jax.make_jaxpr(in_parts)(q, k, v).jaxpr) < weights


def waves(height, width):
    """Smooth images whose statistics are the same in every tile."""
    rows, columns = np.meshgrid(
        *(2 * np.pi * np.arange(n) / 8 for n in (height, width)), indexing="ij"
    )
    return np.stack([np.sin(rows), np.cos(columns), np.sin(rows + columns)], -1)[None].astype(
        np.float32
    )


@pytest.mark.second
def test_tiles_have_no_seams():
    """What is left is what tiles cannot know: normalisation's statistics of the whole image."""
    whole, tiled = codec(), codec(tile=32)
    x = waves(128, 64)
    z = whole.encode(x).mean
    y, blended = (made.decode(z) for made in (whole, tiled))
    z_error, error = tiled.encode(x).mean - z, blended - y
    assert np.abs(z_error).max() < 0.1 * np.abs(z).max()
    assert np.abs(error).max() < 0.12 * np.abs(y).max()
    bare = np.concatenate([whole.decode(z[:, :32]), whole.decode(z[:, 32:])], 1) - y
    blended_jump, bare_jump = (np.abs(np.diff(each, axis=1)).max() for each in (error, bare))
    assert blended_jump < bare_jump / 4


@pytest.mark.parametrize(("shape", "tile"), [((17, 5), 8), ((16, 16), 4), ((5, 33), 16)])
def test_tiles_of_a_local_function_are_exact(shape, tile):
    """Whatever the weights are: their sum is 1 everywhere."""
    x = images(2, *shape, 3)
    sizes = set()

    def doubled(part):
        sizes.add(part.shape[1:3])
        return 2 * np.repeat(np.repeat(part, 2, 1), 2, 2)

    np.testing.assert_allclose(in_tiles(doubled, x, tile, 1, 2), doubled(x), rtol=1e-5)
    assert sizes == {tuple(min(n, tile) for n in shape), shape}
    y = np.repeat(np.repeat(x, 2, 1), 2, 2)
    halved = in_tiles(lambda part: part[:, ::2, ::2], y, tile, 2, 1)
    np.testing.assert_allclose(halved, x, rtol=1e-5)


@pytest.mark.second
def test_batches_are_sharded():
    x = images(11, 8, 8, 3)
    one, eight = codec(), codec(devices=8)
    exact, sharded = one.encode(x), eight.encode(x)
    np.testing.assert_allclose(sharded.mean, exact.mean, atol=1e-5)
    np.testing.assert_allclose(eight.decode(exact.mean), one.decode(exact.mean), atol=1e-5)
    model, mesh = SMALL.build(), sharding.make_mesh()
    batch = sharding.batch_of(jax.ShapeDtypeStruct((8, 8, 3), jnp.float32), 16, mesh)
    shardings = (sharding.replicated(mesh), sharding.batched(mesh))
    jitted = jax.jit(model.encode, in_shardings=shardings, out_shardings=shardings[1])
    compiled = jitted.lower(model.parts.abstract, batch).compile()
    assert not sharding.collectives(compiled)


def test_images_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="image.shape, of 9 x 8 pixels, does not divide"):
        codec().encode(images(1, 9, 8, 3))
    with pytest.raises(
        InputError, match="image.shape, of images of 1 channels, does not fit.*Use images of 3"
    ):
        codec().encode(images(1, 8, 8, 1))
    with pytest.raises(InputError, match=r"images.dtype=uint8.* Scale the images to \[-1, 1\]"):
        codec().encode(np.zeros((1, 8, 8, 3), np.uint8))
    with pytest.raises(InputError, match=r"latents.shape=\(1, 4, 4, 3\) .* Use latents of 4"):
        codec().decode(images(1, 4, 4, 3))
    with pytest.raises(InputError, match="tile=3 cannot be used. Use 4 or more, or 0"):
        codec(tile=3)
    with pytest.raises(InputError, match="config.x.groups=4 does not divide the width 6"):
        AutoencoderKL(widths=(6, 8), groups=4).check("config.x")


def test_batches_of_any_size_are_few_programs():
    """Each device has 1, 2, 4, ... images; none is a size too."""
    made, traced = codec(devices=2), []
    real = made._decode
    made._decode = lambda params, x: (traced.append(len(x)), real(params, x))[1]
    whole = made.decode(images(5, 2, 2, 4))
    for count in (4, 3, 1, 0):
        found = made.decode(images(5, 2, 2, 4)[:count])
        np.testing.assert_allclose(found, whole[:count], atol=1e-5)
    assert traced == [8, 4, 4, 2, 2]
