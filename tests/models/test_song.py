import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rdm_jax.models import layers, resampling
from rdm_jax.models.functional import functional
from rdm_jax.models.song import Song
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

DDPM = Song(
    channels=8,
    channel_mult=(1, 2),
    blocks=1,
    attention_levels=(1,),
    dropout=0.3,
    augment_labels=AUGMENT,
)
NCSN = dataclasses.replace(
    DDPM, embedding="fourier", noise_mult=2, residual=True, filter=(1, 3, 3, 1)
)
SMALLEST = Song(
    channels=4, channel_mult=(1,), blocks=1, attention_levels=(), augment_labels=AUGMENT
)
FOURIER = dataclasses.replace(SMALLEST, channels=16, embedding="fourier", noise_mult=2)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.fixture(scope="module")
def ncsn():
    """The compiled `apply` and the parameters of a small NCSN++."""
    net = network(NCSN)
    return jax.jit(net.apply), parameters(net)


@pytest.fixture(scope="module")
def born():
    """Initial parameters of a network with one block of each kind."""
    return jax.jit(network(FOURIER).init)(jax.random.key(0))


# Resampling


def correlation(taps, size, margin):
    """The matrix of `downsample` along one axis of `size` pixels, with `margin` zeros on both
    sides."""
    rows = (size + 2 * margin - len(taps)) // 2 + 1
    matrix = np.zeros((rows, size + 2 * margin))
    for row, k in np.ndindex(rows, len(taps)):
        matrix[row, 2 * row + k] = taps[k] / sum(taps)
    return matrix[:, margin : margin + size]


def along_both(rows, columns, x):
    return np.einsum("ij,bjkc,lk->bilc", rows, np.asarray(x, np.float64), columns)


down = jax.jit(resampling.downsample, static_argnums=1, static_argnames="padded")
up = jax.jit(resampling.upsample, static_argnums=1)
# One filter of each length that is in use, an asymmetric one, and a longer one.
every_filter = pytest.mark.parametrize(
    "taps", [(1, 1), (1, 3, 3, 1), (1, 2, 5, 3), (1, 5, 10, 10, 5, 1)], ids=str
)


@every_filter
def test_resampling_is_strided_correlation_and_transpose(taps):
    large, small = normal(2, 6, 10, 3), normal(2, 3, 5, 3)
    rows, columns = (correlation(taps, n, (len(taps) - 1) // 2) for n in (6, 10))
    # float32 sums of numbers up to 4
    chex.assert_trees_all_close(
        np.asarray(down(large, taps), np.float64), along_both(rows, columns, large), atol=2e-6
    )
    enlarged = along_both(2 * rows.T, 2 * columns.T, small)
    chex.assert_trees_all_close(np.asarray(up(small, taps), np.float64), enlarged, atol=4e-6)


def test_resampling_keeps_constants():
    one = jnp.full((1, 8, 12, 1), 3.0)
    smaller, larger = (
        np.asarray(down(one, (1, 3, 3, 1)))[0, ..., 0],
        np.asarray(up(one, (1, 3, 3, 1)))[0, ..., 0],
    )
    chex.assert_shape([smaller, larger], [(4, 6), (16, 24)])
    np.testing.assert_allclose(smaller[1:-1, 1:-1], 3, rtol=1e-6)
    np.testing.assert_allclose(larger[1:-1, 1:-1], 3, rtol=1e-6)
    # At the border one tap of weight 1/8 falls outside in the one, one of weight 1/4 in the other.
    np.testing.assert_allclose(smaller[0, 1:-1], 3 * 7 / 8, rtol=1e-6)
    np.testing.assert_allclose(larger[1:-1, -1], 3 * 3 / 4, rtol=1e-6)


def test_resampling_of_two_taps_averages_and_repeats():
    x = normal(2, 4, 6, 3)
    means = np.asarray(x).reshape(2, 2, 2, 3, 2, 3).mean((2, 4))
    np.testing.assert_allclose(down(x, (1, 1)), means, atol=1e-6)
    np.testing.assert_array_equal(up(x, (1, 1)), np.kron(x, np.ones((1, 2, 2, 1))))


@pytest.mark.parametrize("taps", [(1, 3, 3, 1), (1, 5, 10, 10, 5, 1)], ids=str)
def test_downsample_of_padded_input(taps):
    margin = (len(taps) - 1) // 2
    wide = normal(1, 4 + 2 * margin, 8 + 2 * margin, 2)
    matrices = (correlation(taps, n + 2 * margin, 0) for n in (4, 8))
    expected = along_both(*matrices, wide)
    chex.assert_trees_all_close(
        np.asarray(down(wide, taps, padded=True), np.float64), expected, atol=2e-6
    )
    zeros = jnp.pad(wide, [(0, 0), (margin, margin), (margin, margin), (0, 0)])
    chex.assert_trees_all_close(
        down(zeros, taps, padded=True), down(wide, taps), atol=2e-7
    )  # two programs: sums in other orders


# Initialisation


def test_initialisation_is_xavier(born):
    gains = {"conv1": 1e-5, "proj": 1e-5, "out_conv": 1e-5, "qkv": 0.2**0.5}
    kinds = set()
    for path, values in jax.tree.leaves_with_path(born):
        *_, layer, name = [None, *(p.key for p in path)]
        values = np.asarray(values, np.float64)
        if name == "bias":
            assert not values.any(), path
        elif name == "scale":
            assert (values == 1).all(), path
        elif name == "kernel":
            kinds.add(layer)
            taps = np.prod(values.shape[:-2])
            bound = gains.get(layer, 1.0) * np.sqrt(6 / (taps * sum(values.shape[-2:])))
            assert np.abs(values).max() <= bound * (1 + 1e-6), path
            # The variance of U(-b, b) is b^2 / 3, and the standard error of n draws' b^2 sqrt(4 /
            # 45 n).
            assert abs(np.var(values) / bound**2 - 1 / 3) < 5 * np.sqrt(4 / 45 / values.size), path
    common = {"stem", "conv0", "conv1", "affine", "skip", "qkv", "proj", "out_conv"}
    assert kinds == common | {"map_layer0", "map_layer1", "map_label", "map_augment"}
    frequencies = (
        np.asarray(born["frequencies"]) / 16
    )  # N(0, 16^2): 5 standard errors of its variance
    assert abs(np.var(frequencies) - 1) < 5 * np.sqrt(2 / frequencies.size)


def test_output_is_near_zero_at_initialisation(born):
    output = jax.jit(network(FOURIER).apply)(born, *inputs())
    # Of unit inputs behind silu (mean square 0.36) Xavier's kernel makes 0.36 2 c / (c + 2), c =
    # 16, times 1e-5 squared.
    assert np.std(output) == pytest.approx(0.8e-5, rel=0.3)


def style_of(config):
    return nnx.eval_shape(lambda: config.build(shapes(CHANNELS, 0), rngs=nnx.Rngs(0))).style


@pytest.mark.parametrize(("heads", "scale"), [(0, 0.5**0.5), (1, 0.5)])
def test_block_is_scaled_skip_at_initialisation(heads, scale):
    x, emb, style = normal(2, 4, 4, 8), normal(2, 16, seed=1), style_of(SMALLEST)

    @jax.jit
    def block(x, emb):
        return layers.Block(
            8, 8, 16, style, heads=heads, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0)
        )(x, emb)

    chex.assert_trees_all_close(
        block(x, emb), scale * x, atol=1e-4
    )  # each branch ends in a kernel of 1e-5
    assert np.any(np.asarray(block(x, emb)) != np.asarray(scale * x))


# The parts against NumPy


def silu(x):
    return x / (1 + np.exp(-x))


@pytest.mark.parametrize("config", [DDPM, NCSN], ids=["ddpm++", "ncsn++"])
def test_embedding_matches_numpy(config):
    _, noise, label, augment = inputs()
    params = parameters(network(config))

    def embedding(params, *labels):
        module = nnx.eval_shape(lambda: config.build(shapes(CHANNELS, CLASSES), rngs=nnx.Rngs(0)))
        nnx.update(module, params)
        noise, label, augment = labels
        return module._embedding(noise, label, None, augment)

    out = jax.jit(embedding)(params, noise, label, augment)
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    noise, label, augment = (np.asarray(a, np.float64) for a in (noise, label, augment))
    half = config.noise_mult * config.channels // 2
    ramp = np.arange(half) / (half - 1)
    frequencies = 2 * np.pi * p["frequencies"] if "frequencies" in p else 10000.0**-ramp
    angle = np.outer(noise, frequencies)
    emb = np.concatenate([np.sin(angle), np.cos(angle)], axis=1)
    emb = emb + np.sqrt(CLASSES) * label @ p["map_label"]["kernel"] + p["map_label"]["bias"]
    emb = emb + augment @ p["map_augment"]["kernel"]
    for name in ("map_layer0", "map_layer1"):
        emb = silu(emb @ p[name]["kernel"] + p[name]["bias"])
    chex.assert_trees_all_close(np.asarray(out, np.float64), emb, atol=FLOAT32)


def test_attention_matches_numpy():
    heads, size, x = 2, 4, normal(2, 3, 4, 8)
    module = layers.Attention(
        8, heads, style_of(SMALLEST), dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0)
    )
    for seed, layer in enumerate((module.norm, module.qkv, module.proj)):
        layer.bias[...] = normal(*layer.bias.shape, seed=seed)
    module.proj.kernel[...] = normal(1, 1, 8, 8, seed=3)
    out = nnx.jit(lambda module, x: module(x))(module, x)

    def weights(layer):
        return (np.asarray(a[...], np.float64).squeeze() for a in (layer.kernel, layer.bias))

    groups = np.asarray(x, np.float64).reshape(2, 12, 2, 4)
    groups = (groups - groups.mean((1, 3), keepdims=True)) / np.sqrt(
        groups.var((1, 3), keepdims=True) + 1e-6
    )
    h = groups.reshape(2, 12, 8) + np.asarray(module.norm.bias[...], np.float64)
    kernel, bias = weights(module.qkv)
    qkv, attended = h @ kernel + bias, np.zeros((2, 12, 8))
    for head in range(heads):
        channels = [3 * np.arange(head * size, (head + 1) * size) + part for part in range(3)]
        q, k, v = (qkv[..., c] for c in channels)
        exponent = np.einsum("bqc,bkc->bqk", q, k) / np.sqrt(size)
        share = np.exp(exponent - exponent.max(-1, keepdims=True))
        attended[..., head * size : (head + 1) * size] = share / share.sum(-1, keepdims=True) @ v
    kernel, bias = weights(module.proj)
    chex.assert_trees_all_close(
        np.asarray(out, np.float64).reshape(2, 12, 8), attended @ kernel + bias, atol=1e-4
    )


def test_residual_encoder_adds_downsampled_image():
    config = Song(
        channels=4,
        channel_mult=(1, 2, 1),
        blocks=1,
        attention_levels=(),
        residual=True,
        filter=(1, 3, 3, 1),
    )
    net = functional(lambda rngs: config.build(shapes(CHANNELS, 0), rngs=rngs))
    params, image = parameters(net), normal(2, 8, 16, CHANNELS)

    @jax.jit
    def encode(params, x):
        """The outputs of the encoder, and those of its blocks without the residual input."""
        module = nnx.eval_shape(lambda: config.build(shapes(CHANNELS, 0), rngs=nnx.Rngs(0)))
        nnx.update(module, params)
        emb = jnp.ones((2, 16))
        outputs = module._encode(x, emb, None, None)
        return outputs, [
            getattr(module, name)(h, emb) for name, h in zip(module.encoder, outputs, strict=False)
        ]

    outputs, blocks = jax.tree.map(lambda a: np.asarray(a, np.float64), encode(params, image))
    # stem, encoder0_0, down1, encoder1_0, down2, encoder2_0
    aux = np.asarray(image, np.float64)
    for level, place in ((1, 2), (2, 4)):
        kernel, bias = (
            np.asarray(params[f"residual{level}"][name], np.float64) for name in ("kernel", "bias")
        )
        # Beyond the image the filter sees the result of the 3x3 convolution, not zero.
        wide = np.pad(aux, [(0, 0), (2, 2), (2, 2), (0, 0)])
        _, h, w, _ = aux.shape
        taps = (wide[:, i : i + h + 2, j : j + w + 2] @ kernel[i, j] for i, j in np.ndindex(3, 3))
        matrices = (correlation((1, 3, 3, 1), n + 2, 0) for n in (h, w))
        shrunken = along_both(*matrices, sum(taps) + bias)
        assert np.std(shrunken) > 0.1
        aux = (shrunken + blocks[place - 1]) * np.sqrt(0.5)
        np.testing.assert_allclose(outputs[place], aux, atol=FLOAT32)
    for place in (1, 3, 5):  # all other blocks get the previous output unchanged
        np.testing.assert_allclose(outputs[place], blocks[place - 1], atol=FLOAT32)


def test_attention_blocks():
    config = dataclasses.replace(DDPM, channel_mult=(1, 1, 1), blocks=2, attention_levels=(0, 1))
    attending = {name for name, block in network(config).abstract.items() if "attention" in block}
    encoder = {f"encoder{level}_{i}" for level in (0, 1) for i in (0, 1)}
    assert attending == encoder | {"middle0", "decoder1_2", "decoder0_2"}


# The whole network


def test_null_label_is_zero_or_none(ncsn):
    apply, params = ncsn
    x, noise, label, augment = inputs()
    with_label = apply(params, x, noise, label, augment)
    no_label = apply(params, x, noise, None, augment)
    chex.assert_trees_all_close(
        apply(params, x, noise, jnp.zeros_like(label), augment), no_label, atol=FLOAT32
    )
    no_augment = apply(params, x, noise, label, None)
    chex.assert_trees_all_close(
        apply(params, x, noise, label, jnp.zeros_like(augment)), no_augment, atol=FLOAT32
    )
    for other in (no_label, no_augment):
        assert np.max(np.abs(with_label - other)) > 1e-2


@pytest.mark.parametrize("which", [0, 1, 2, 3], ids=["image", "noise", "class", "augment"])
def test_inputs_affect_only_their_image(ncsn, which):
    apply, params = ncsn
    args = list(inputs())
    before = np.asarray(apply(params, *args))
    other = np.asarray(args[which]).copy()
    other[1] = np.roll(other[1], 1) if which == 2 else other[1] + 0.5
    args[which] = jnp.asarray(other)
    change = np.max(np.abs(np.asarray(apply(params, *args)) - before), axis=(1, 2, 3))
    assert change[1] > 1e-3 and change[0] < FLOAT32


def test_gradients_reach_all_but_frequencies():
    net = network(FOURIER)
    params = parameters(net)
    loss = jax.jit(jax.value_and_grad(lambda params: (net.apply(params, *inputs()) ** 2).mean()))
    value, grads = loss(params)
    frequencies = grads.pop("frequencies")
    chex.assert_trees_all_equal(frequencies, jnp.zeros(FOURIER.noise_mult * FOURIER.channels // 2))
    for path, gradient in jax.tree.leaves_with_path(grads):
        assert np.max(np.abs(np.asarray(gradient))) > 1e-6, jax.tree_util.keystr(path)
    other, _ = loss({**params, "frequencies": params["frequencies"] + 1})
    assert abs(other - value) > 1e-3  # but the output depends on them


def test_network_commutes_with_transpose(ncsn):
    """Holds only if rows and columns of a non-square image are never exchanged."""
    apply, params = ncsn
    x, *labels = inputs()
    transposed = jax.tree.map(lambda a: a.swapaxes(0, 1) if a.ndim == 4 else a, params)
    there = apply(transposed, x.swapaxes(1, 2), *labels)
    chex.assert_trees_all_close(there.swapaxes(1, 2), apply(params, x, *labels), atol=FLOAT32)


def test_patch_folds_pixels_into_channels():
    folded = functional(lambda rngs: SMALLEST.build(shapes(4 * CHANNELS, CLASSES), rngs=rngs))
    patched = network(dataclasses.replace(SMALLEST, patch=2))
    chex.assert_trees_all_equal(folded.abstract, patched.abstract)
    params, (x, *labels) = parameters(patched), inputs(batch=2)
    by_hand = (
        np.asarray(x)
        .reshape(2, 2, 2, 4, 2, CHANNELS)
        .transpose(0, 1, 3, 2, 4, 5)
        .reshape(2, 2, 4, 4 * CHANNELS)
    )
    out = np.asarray(jax.jit(folded.apply)(params, jnp.asarray(by_hand), *labels))
    unfolded = out.reshape(2, 2, 4, 2, 2, CHANNELS).transpose(0, 1, 3, 2, 4, 5).reshape(x.shape)
    chex.assert_trees_all_close(
        np.asarray(jax.jit(patched.apply)(params, x, *labels)), unfolded, atol=FLOAT32
    )


def test_outputs_are_concatenated():
    one, two = network(SMALLEST), network(SMALLEST, outputs=2)
    params = parameters(two)
    both = jax.jit(two.apply)(params, *inputs(batch=2))
    chex.assert_shape(both, (2, 4, 8, 2 * CHANNELS))
    apply = jax.jit(one.apply)
    for i, part in enumerate(jnp.split(both, 2, axis=-1)):
        half = jax.tree.map(
            lambda a, i=i: a[..., i * CHANNELS : (i + 1) * CHANNELS], params["out_conv"]
        )
        chex.assert_trees_all_close(
            apply({**params, "out_conv": half}, *inputs(batch=2)), part, atol=FLOAT32
        )


def test_bfloat16_is_close_to_float32(ncsn):
    apply, params = ncsn
    net = network(dataclasses.replace(NCSN, dtype="bfloat16"))
    assert {p.dtype for p in jax.tree.leaves(net.abstract)} == {jnp.dtype("float32")}
    half = jax.jit(net.apply)(params, *inputs())
    assert half.dtype == jnp.float32
    half, full = np.asarray(half), np.asarray(apply(params, *inputs()))
    error = np.sqrt(np.mean((half - full) ** 2) / np.mean(full**2))
    # bfloat16 rounds by up to 2^-9 = 0.002, here some 50 times in a row: 0.002 sqrt(50) = 0.014
    # where errors are independent.
    assert 1e-4 < error < 0.05
