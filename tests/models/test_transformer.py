"""The transformer: sizes, shapes, precision, rematerialisation, dropout, conditions, pixels.

`tests/test_jit_reference.py` compares its values with the original's.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rdm_jax.models.functional import functional
from rdm_jax.models.transformer import JiT
from rdm_jax.runtime.errors import InputError
from tests.support.small_networks import AUGMENT, CHANNELS, inputs, network, parameters, shapes

SECOND = pytest.mark.second
SMALL = JiT(
    patch=2,
    hidden=32,
    depth=4,
    heads=2,
    bottleneck=8,
    class_tokens=3,
    class_tokens_from=1,
    augment_labels=AUGMENT,
)
WITH_PIXELS = {"stem_blocks": 1, "head_blocks": 2, "pixel_channels": 8}
SIZES = {
    "B": JiT(),
    "L": JiT(hidden=1024, depth=24, heads=16, class_tokens_from=8),
    "H": JiT(hidden=1280, depth=32, heads=16, bottleneck=256, class_tokens_from=10),
}


def changed(**options):
    return dataclasses.replace(SMALL, **options)


def run(config, params, *arguments, keys=None):
    return jax.jit(network(config).apply)(params, *arguments, keys)


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


@pytest.mark.parametrize(
    ("size", "patch", "count"),
    [
        ("B", 16, 131_123_712),
        ("B", 32, 133_190_400),
        ("L", 16, 458_877_664),
        ("L", 32, 461_534_176),
        ("H", 16, 952_514_368),
        ("H", 32, 956_055_616),
    ],
)
def test_transformer_parameters_as_published(size, patch, count):
    config = dataclasses.replace(SIZES[size], patch=patch)
    built = functional(lambda rngs: config.build(shapes(3, 1000), rngs=rngs))
    assert built.num_parameters == count


@pytest.mark.parametrize(
    ("height", "width"),
    [(4, 8), pytest.param(6, 2, marks=SECOND), pytest.param(2, 2, marks=SECOND)],
)
@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param(WITH_PIXELS, marks=SECOND),
        WITH_PIXELS | {"pixel_fold": 2},
    ],
    ids=["tokens", "pixels", "cells"],
)
def test_transformer_of_any_grid_sees_all_pixels_of_its_image_alone(height, width, options):
    config = changed(**options)
    params = parameters(network(config))
    x, *rest = inputs(2, height, width)
    y = run(config, params, x, *rest)
    assert y.shape == (2, height, width, CHANNELS) and y.dtype == jnp.float32

    def first_value(x):
        return network(config).apply(params, x, *rest)[0, -1, -1, 0]

    influence = np.asarray(jax.jit(jax.grad(first_value))(x))
    assert np.all(influence[0] != 0) and np.all(influence[1] == 0)


def test_transformer_tells_rows_from_columns():
    """Positions are two-dimensional: a transposed image is another image."""
    params = parameters(network(SMALL))
    x, *rest = inputs(2, 8, 8)
    transposed = run(SMALL, params, x.swapaxes(1, 2), *rest).swapaxes(1, 2)
    assert np.abs(transposed - run(SMALL, params, x, *rest)).max() > 0.01


def losses_and_gradients(config, params, keys=None):
    x, *rest = inputs(2)

    def loss(params):
        return (network(config).apply(params, x, *rest, keys) ** 2).mean()

    return jax.jit(jax.value_and_grad(loss))(params)


def relative_error(found, expected):
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return max(np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in pairs if np.any(b))


@pytest.mark.second
@pytest.mark.parametrize(
    "options", [{}, pytest.param(WITH_PIXELS, marks=SECOND)], ids=["tokens", "pixels"]
)
def test_transformer_in_bfloat16_is_near_float32(options):
    config, narrow = changed(**options), changed(**options, dtype="bfloat16")
    params = parameters(network(config))
    exact, other = (losses_and_gradients(c, params) for c in (config, narrow))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(other))
    assert 0 < relative_error(other[0], exact[0]) < 0.02
    assert relative_error(other[1], exact[1]) < 0.1


@pytest.mark.second
@pytest.mark.parametrize("remat", [pytest.param("block", marks=SECOND), "products"])
def test_transformer_remat_changes_no_gradient(remat):
    config = changed(dropout=0.3)
    params = parameters(network(config))
    expected = losses_and_gradients(config, params, keys(2))
    found = losses_and_gradients(changed(dropout=0.3, remat=remat), params, keys(2))
    assert relative_error(found, expected) < 1e-5


def test_transformer_dropout_depends_on_the_key_of_the_image_alone():
    config = changed(dropout=0.3)
    params, arguments = parameters(network(config)), inputs(3)
    of_three = run(config, params, *arguments, keys=keys(3))
    alone = run(config, params, *(a[1:2] for a in arguments), keys=keys(3)[1:2])
    np.testing.assert_allclose(of_three[1:2], alone, atol=1e-5)
    other_key = run(config, params, *(a[1:2] for a in arguments), keys=keys(3)[2:])
    assert np.abs(alone - other_key).max() > 0.01


@pytest.mark.parametrize(
    ("depth", "first", "end"), [(2, 0, 0), (4, 1, 3), pytest.param(8, 2, 6, marks=SECOND)]
)
def test_transformer_dropout_in_the_middle_half(depth, first, end):
    """A block has dropout if and only if the output changes with it, the others' branches zero."""
    config = changed(depth=depth, dropout=0.3)
    params, arguments = parameters(network(config)), inputs(1)
    gates = {f"block{i}": params[f"block{i}"]["modulation"] for i in range(depth)}
    closed = jax.tree.map(jnp.zeros_like, gates)
    for i in range(depth):
        opened = {name: {**params[name], "modulation": closed[name]} for name in gates}
        opened[f"block{i}"] = params[f"block{i}"]
        one = {**params, **opened}
        change = run(config, one, *arguments, keys=keys(1)) - run(config, one, *arguments)
        assert (np.abs(change).max() > 1e-3) == (first <= i < end), i


def test_transformer_null_class_is_no_condition():
    params, (x, time, condition, augment) = parameters(network(SMALL)), inputs(2)
    null = run(SMALL, params, x, time, jnp.zeros_like(condition), augment)
    none = run(SMALL, params, x, time, None, augment)
    np.testing.assert_allclose(null, none, atol=1e-5)  # another program, another order of sums
    assert np.abs(null - run(SMALL, params, x, time, condition, augment)).max() > 0.01


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stem_blocks": 1},
        {"head_blocks": 2},
        {"stem_blocks": 2, "head_blocks": 1, "head_kernel": 3},
    ],
    ids=str,
)
def test_transformer_of_pixels_starts_from_zero(options):
    """Pixels' blocks change what reads and writes pixels, and nothing else."""
    config = changed(pixel_channels=8, **options)
    params = network(config).init(jax.random.key(0))
    assert np.all(np.asarray(run(config, params, *inputs(2))) == 0)
    plain = network(SMALL).abstract
    assert set(params) - set(plain) == ({"pixels"} if options else set())
    at_pixels = {"embed0"} if options.get("stem_blocks") else set()
    at_pixels |= {"out"} if options.get("head_blocks") else set()
    differing = {
        name
        for name in plain
        if jax.tree.map(jnp.shape, params[name]) != jax.tree.map(jnp.shape, plain[name])
    }
    assert differing == at_pixels


def test_transformer_gradients_reach_all_parameters():
    config = changed(**WITH_PIXELS)
    _, gradients = losses_and_gradients(config, parameters(network(config)))
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.any(leaf), jax.tree_util.keystr(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pixel_fold": 3}, "network.pixel_fold=3 does not divide network.patch=2"),
        ({"hidden": 36}, r"network\.hidden=36 .* Use a multiple of 8\."),
        ({"class_tokens_from": 4}, r"network\.class_tokens_from=4 .* Use 0 to 3"),
    ],
)
def test_transformer_refuses(options, message):
    with pytest.raises(InputError, match=message):
        changed(**options).check("network")


def test_transformer_with_open_gates_uses_its_blocks_at_once():
    """As published, blocks join in from zero."""
    config = changed(**WITH_PIXELS, augment_labels=0)
    first = {
        init: network(dataclasses.replace(config, init=init)).init(jax.random.key(0))
        for init in ("published", "open")
    }
    hidden = SMALL.hidden
    bias = first["open"]["block0"]["modulation"]["bias"].reshape(6, hidden)
    np.testing.assert_array_equal(bias, np.repeat([[0], [0], [1]] * 2, hidden, axis=1))
    bias = first["open"]["pixels"]["head0"]["modulation"]["bias"].reshape(3, -1)
    np.testing.assert_array_equal(bias.sum(1), [0, 0, 8])
    assert not first["published"]["block0"]["modulation"]["bias"].any()
    assert first["open"]["class_table"].std() > 10 * first["published"]["class_table"].std()
