import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rdm_jax.models import adm, layers, resampling
from rdm_jax.models.adm import ADM
from rdm_jax.models.functional import functional
from tests.support.small_networks import (
    AUGMENT,
    CHANNELS,
    CLASSES,
    FLOAT32,
    inputs,
    network,
    parameters,
    shapes,
)

TINY = ADM(
    channels=8,
    channel_mult=(1, 2),
    blocks=1,
    attention_levels=(1,),
    head_channels=8,
    dropout=0.3,
    augment_labels=AUGMENT,
)
ADM_64 = ADM()
ADM_256 = ADM(channels=256, channel_mult=(1, 1, 2, 2, 4, 4), blocks=2, attention_levels=(3, 4, 5))
SMALLEST = ADM(
    channels=4,
    channel_mult=(1,),
    blocks=1,
    attention_levels=(),
    head_channels=4,
    augment_labels=AUGMENT,
)


@pytest.fixture(scope="module")
def tiny():
    """The compiled `apply` and the parameters of a small network."""
    net = network(TINY)
    return jax.jit(net.apply), parameters(net)


@pytest.fixture(scope="module")
def smallest():
    """The same with one block of each kind."""
    net = network(SMALLEST)
    return jax.jit(net.apply), parameters(net)


@pytest.fixture(scope="module")
def init():
    """The compiled `init` of the smallest network."""
    return jax.jit(network(SMALLEST).init)


@pytest.mark.parametrize(
    ("config", "side", "count", "giga"),
    [(ADM_64, 64, 295_899_267, 109.7), (ADM_256, 256, 553_831_171, 1119.4)],
    ids=["adm-64", "adm-256"],
)
def test_adm_published_sizes(config, side, count, giga):
    net = functional(lambda rngs: config.build(shapes(3, 1000), rngs=rngs))
    assert net.num_parameters == count
    assert net.multiply_adds((side, side, 3), shapes(3, 1000).condition) == pytest.approx(
        giga * 1e9, rel=0.01
    )


def test_stem_is_as_wide_as_level_0():
    """As in the released code. In DDPM++ and NCSN++ the stem is `channels` wide."""
    abstract = functional(
        lambda rngs: dataclasses.replace(SMALLEST, channel_mult=(2, 2)).build(
            shapes(CHANNELS, 0), rngs=rngs
        )
    ).abstract
    assert abstract["stem"]["kernel"].shape == (3, 3, CHANNELS, 8)
    assert "skip" not in abstract["encoder0_0"]
    assert abstract["decoder0_1"]["conv0"]["kernel"].shape == (3, 3, 16, 8)
    assert abstract["map_layer0"]["kernel"].shape == (4, 16)


@pytest.mark.second
def test_output_is_zero_at_initialisation(init, smallest):
    apply, _ = smallest
    params = init(jax.random.key(0))
    assert np.any(params["stem"]["kernel"]) and not np.any(params["out_conv"]["kernel"])
    output = apply(params, *inputs())
    chex.assert_trees_all_equal(output, jnp.zeros_like(output))


@pytest.mark.parametrize(("patch", "batch", "height", "width"), [(2, 1, 2, 6), (4, 5, 16, 8)])
def test_output_has_image_shape(patch, batch, height, width):
    config = dataclasses.replace(SMALLEST, patch=patch)
    assert config.stride == patch and dataclasses.replace(TINY, patch=patch).stride == 2 * patch
    net = network(config)
    output = jax.jit(net.apply)(parameters(net), *inputs(batch, height, width))
    chex.assert_shape(output, (batch, height, width, CHANNELS))
    assert 0.1 < np.std(output) < 10
    chex.assert_tree_all_finite(output)


def test_block_is_skip_at_initialisation():
    x, emb = (
        jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)
        for shape in ((2, 4, 4, 8), (2, 16))
    )

    @jax.jit
    def block(x, emb):
        return layers.Block(
            8, 8, 16, adm.STYLE, heads=1, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0)
        )(x, emb)

    chex.assert_trees_all_equal(block(x, emb), x)


def test_initialisation_variance_follows_fan_in():
    shape = (3, 3, 32, 64)
    kernel, bias = (
        np.asarray(init(jax.random.key(0), shape))
        for init in (adm.DEFAULT.kernel, adm.DEFAULT.bias(288))
    )
    bound = 1 / np.sqrt(288)
    for values in (kernel, bias):
        assert np.max(np.abs(values)) <= bound
        # The variance of U(-b, b) is b^2 / 3, and the standard error of n draws' b^2 sqrt(4 / 45
        # n).
        assert abs(np.var(values) / bound**2 - 1 / 3) < 5 * np.sqrt(4 / 45 / values.size)


def test_null_label_is_zero_or_none(smallest):
    apply, params = smallest
    x, noise, label, augment = inputs()
    chex.assert_trees_all_equal(
        apply(params, x, noise, jnp.zeros_like(label), augment),
        apply(params, x, noise, None, augment),
    )
    chex.assert_trees_all_equal(
        apply(params, x, noise, label, jnp.zeros_like(augment)),
        apply(params, x, noise, label, None),
    )


@pytest.mark.parametrize("which", [0, 1, 2, 3], ids=["image", "noise", "class", "augment"])
def test_inputs_affect_only_their_image(tiny, which):
    apply, params = tiny
    args = list(inputs())
    before = np.asarray(apply(params, *args))
    other = np.asarray(args[which]).copy()
    other[1] = np.roll(other[1], 1) if which == 2 else other[1] + 0.5
    args[which] = jnp.asarray(other)
    change = np.max(np.abs(np.asarray(apply(params, *args)) - before), axis=(1, 2, 3))
    assert change[1] > 1e-3
    np.testing.assert_array_less(change[[0, 2]], FLOAT32)


def test_output_is_independent_of_batch(smallest):
    apply, params = smallest
    args = inputs()
    alone = apply(params, *(jnp.asarray(np.asarray(a)[1:2]) for a in args))
    chex.assert_trees_all_close(
        np.asarray(alone), np.asarray(apply(params, *args))[1:2], atol=FLOAT32
    )


def test_dropout_follows_key(smallest):
    apply, params = smallest
    x, *labels = (jnp.asarray(np.repeat(a[:1], 3, axis=0)) for a in inputs())
    off = apply(params, x, *labels)
    chex.assert_trees_all_equal(off, apply(params, x, *labels))
    first, again, second = (
        apply(params, x, *labels, jax.random.split(jax.random.key(seed), 3)) for seed in (0, 0, 1)
    )
    chex.assert_trees_all_equal(first, again)
    off, first, second = map(np.asarray, (off, first, second))
    for a, b in [(first, off), (first, second), (first[0], first[1])]:  # an image's mask is its own
        assert np.max(np.abs(a - b)) > 1e-2


def test_dropout_of_zero_is_identity(smallest):
    apply, params = smallest
    without = network(dataclasses.replace(SMALLEST, dropout=0.0)).apply
    keys = jax.random.split(jax.random.key(0), 3)
    chex.assert_trees_all_close(
        jax.jit(without)(params, *inputs(), keys), apply(params, *inputs()), atol=FLOAT32
    )


def test_gradients_reach_every_parameter(tiny):
    apply, params = tiny
    grads = jax.jit(jax.grad(lambda params: (apply(params, *inputs()) ** 2).mean()))(params)
    chex.assert_trees_all_equal_shapes_and_dtypes(grads, params)
    for path, gradient in jax.tree.leaves_with_path(grads):
        assert np.max(np.abs(np.asarray(gradient))) > 1e-6, jax.tree_util.keystr(path)


def test_bfloat16_is_close_to_float32(tiny):
    apply, params = tiny
    half = jax.jit(network(dataclasses.replace(TINY, dtype="bfloat16")).apply)(params, *inputs())
    assert half.dtype == jnp.float32
    half, full = np.asarray(half), np.asarray(apply(params, *inputs()))
    error = np.sqrt(np.mean((half - full) ** 2) / np.mean(full**2))
    # bfloat16 rounds by up to 2^-9 = 0.002, here some 40 times in a row: 0.002 sqrt(40) = 0.013
    # where errors are independent.
    assert 1e-4 < error < 0.05


def test_group_norm_statistics_are_float32():
    norm = jax.jit(
        lambda x: layers.group_norm(8, epsilon=1e-5, dtype=jnp.dtype("bfloat16"), rngs=nnx.Rngs(0))(
            x
        )
    )
    x = jnp.asarray(20 + np.random.default_rng(0).standard_normal((2, 8, 8, 8)), jnp.bfloat16)
    groups = np.asarray(x, np.float64).reshape(2, 64, 2, 4)
    centred = groups - groups.mean((1, 3), keepdims=True)
    expected = (centred / np.sqrt((centred**2).mean((1, 3), keepdims=True) + 1e-5)).reshape(x.shape)
    # The result is rounded to bfloat16, 2^-9 of numbers up to 4; sums in bfloat16 would be off by a
    # whole standard deviation.
    chex.assert_trees_all_close(np.asarray(norm(x), np.float64), expected, atol=0.02)


@pytest.mark.parametrize(("factor", "height", "width"), [(1, 2, 3), (2, 4, 6), (4, 4, 8)])
def test_depth_to_space_inverts_space_to_depth(factor, height, width):
    x = np.arange(2 * height * width * 3, dtype=np.float32).reshape(2, height, width, 3)
    folded = jax.jit(resampling.space_to_depth, static_argnums=1)(jnp.asarray(x), factor)
    chex.assert_shape(folded, (2, height // factor, width // factor, 3 * factor**2))
    np.testing.assert_array_equal(
        jax.jit(resampling.depth_to_space, static_argnums=1)(folded, factor), x
    )
    np.testing.assert_array_equal(
        np.asarray(folded)[:, 0, 0].reshape(2, factor, factor, 3), x[:, :factor, :factor]
    )


def test_resampling_repeats_and_averages():
    x = np.random.default_rng(0).standard_normal((2, 4, 6, 3), np.float32)
    up, down = jax.jit(resampling.upsample), jax.jit(resampling.downsample)
    np.testing.assert_allclose(down(up(jnp.asarray(x))), x, rtol=1e-6)
    means = np.asarray(down(jnp.asarray(x)))
    np.testing.assert_allclose(means[:, 1, 2], x[:, 2:4, 4:6].mean((1, 2)), rtol=1e-5, atol=1e-6)
    for i, j in np.ndindex(2, 2):
        np.testing.assert_array_equal(np.asarray(up(jnp.asarray(means)))[:, i::2, j::2], means)


def test_functional_matches_module(smallest):
    apply, params = smallest
    module = nnx.eval_shape(lambda: SMALLEST.build(shapes(CHANNELS, CLASSES), rngs=nnx.Rngs(0)))
    nnx.update(module, params)
    expected = jax.jit(lambda *args: module(*args))(*inputs())
    chex.assert_trees_all_close(apply(params, *inputs()), expected, atol=FLOAT32)


def test_initialisation_follows_key(init):
    one, again, other = (init(jax.random.key(seed)) for seed in (0, 0, 1))
    chex.assert_trees_all_equal(one, again)
    chex.assert_trees_all_equal_shapes_and_dtypes(one, other)
    # Kernels within a network differ too.
    kernels = [
        np.asarray(params[name]["conv0"]["kernel"])
        for params in (one, other)
        for name in ("encoder0_0", "middle0")
    ]
    assert len({kernel.tobytes() for kernel in kernels}) == 4


def test_apply_is_pure_and_traced_once(init, smallest):
    _, trained = smallest
    born = init(jax.random.key(0))
    kept = jax.tree.map(np.array, trained)
    chex.clear_trace_counter()
    compiled = jax.jit(chex.assert_max_traces(n=1)(network(SMALLEST).apply))
    first = compiled(trained, *inputs())
    assert not np.any(compiled(born, *inputs(seed=1)))
    chex.assert_trees_all_equal(compiled(trained, *inputs()), first)
    chex.assert_trees_all_equal(trained, kept)


def test_apply_leaks_no_tracers(smallest):
    _, params = smallest
    with jax.checking_leaks():
        jax.jit(network(SMALLEST).apply).lower(params, *inputs())


def test_functional_refuses_other_parameters(smallest):
    _, params = smallest
    wider = network(dataclasses.replace(SMALLEST, channels=8))
    with pytest.raises((ValueError, TypeError)):
        jax.eval_shape(wider.apply, params, *inputs())


def test_unconditional_network_has_no_label_parameters():
    net = functional(
        lambda rngs: dataclasses.replace(SMALLEST, augment_labels=0).build(
            shapes(CHANNELS, 0), rngs=rngs
        )
    )
    params = jax.eval_shape(net.init, jax.random.key(0))
    assert not {"map_label", "map_augment"} & set(params)
    x, noise, *_ = inputs()
    chex.assert_shape(jax.eval_shape(net.apply, params, x, noise), x.shape)
