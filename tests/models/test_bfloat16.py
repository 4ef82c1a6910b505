"""Which computations are in bfloat16, and that gradients are close to those in float32."""

import dataclasses
import functools
import math
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh

from rdm_jax.models import adm, attention, convolution, resampling, target
from rdm_jax.models.adm import ADM
from rdm_jax.models.layers import Block, Conv, GroupNorm
from rdm_jax.models.song import Song
from rdm_jax.runtime import sharding
from tests.support.small_networks import AUGMENT, inputs, network, parameters

BFLOAT16, FLOAT32 = jnp.dtype("bfloat16"), jnp.dtype("float32")
ONE_LEVEL = {
    "adm": ADM(16, (1,), 1, (0,), head_channels=8, augment_labels=AUGMENT),
    "song": Song(16, (1,), 1, (0,), embedding="fourier", noise_mult=2, augment_labels=AUGMENT),
}
TWO_LEVELS = {
    "adm": ADM(8, (1, 2), 1, (1,), head_channels=8, augment_labels=AUGMENT),
    "song": Song(8, (1, 2), 1, (1,), residual=True, filter=(1, 3, 3, 1), augment_labels=AUGMENT),
}
NOT_TRAINED = ("frequencies",)


def narrow(config):
    return dataclasses.replace(config, dtype="bfloat16")


def errors(gradients, exact):
    """The distance of each leaf from the exact one, relative to its norm."""
    found = {}
    for (path, one), other in zip(
        jax.tree.leaves_with_path(gradients), jax.tree.leaves(exact), strict=True
    ):
        assert one.dtype == other.dtype == FLOAT32
        if path[-1].key not in NOT_TRAINED:
            found[jax.tree_util.keystr(path)] = np.linalg.norm(one - other) / np.linalg.norm(other)
    return found


@pytest.mark.second
@pytest.mark.parametrize("family", ONE_LEVEL)
def test_network_gradients_are_close_to_float32(family):
    """Sums over 1,024 pixels in bfloat16 have errors above 30 %; 2 % is about the rounding of five
    blocks."""
    args = inputs(4, 16, 16)

    def gradients(config):
        net = network(config)
        return jax.device_get(
            jax.jit(jax.grad(lambda p: ((net.apply(p, *args) - args[0]) ** 2).mean()))(
                parameters(net)
            )
        )

    found = errors(gradients(narrow(ONE_LEVEL[family])), gradients(ONE_LEVEL[family]))
    assert len(found) > 80 and max(found.values()) < 0.02, sorted(
        found.items(), key=lambda pair: -pair[1]
    )[:5]
    assert max(found.values()) > 1e-3  # it is bfloat16


STYLES = {
    "adm": adm.STYLE,
    "song": dataclasses.replace(
        adm.STYLE, scale_shift=False, skip_scale=0.5**0.5, filter=(1, 3, 3, 1)
    ),
}


@pytest.mark.second
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("resample", [None, "down", "up"])
def test_block_gradients_are_close_to_float32(style, resample):
    random = np.random.default_rng(0)
    x, emb = (
        jnp.asarray(random.standard_normal(shape), jnp.float32)
        for shape in ((4, 16, 16, 8), (4, 16))
    )

    def gradients(dtype):
        def block():
            kwargs = {"heads": 1, "resample": resample, "dtype": dtype, "rngs": nnx.Rngs(0)}
            return Block(8, 16, 16, STYLES[style], **kwargs)

        graph, state = nnx.split(nnx.eval_shape(block))
        params = parameters(SimpleNamespace(abstract=nnx.to_pure_dict(state)))

        def loss(params, x, emb):
            nnx.replace_by_pure_dict(state, params)
            y = nnx.merge(graph, state)(x.astype(dtype), emb)
            assert y.dtype == dtype
            return (y.astype(jnp.float32) ** 2).mean()

        return jax.device_get(jax.jit(jax.grad(loss, argnums=(0, 2)))(params, x, emb))

    (narrow_grads, narrow_emb), (exact, exact_emb) = gradients(BFLOAT16), gradients(FLOAT32)
    found = errors(
        {**narrow_grads, "emb": {"emb": narrow_emb}}, {**exact, "emb": {"emb": exact_emb}}
    )
    assert len(found) > 15 and max(found.values()) < 0.02, sorted(
        found.items(), key=lambda pair: -pair[1]
    )[:5]


def computing(jaxpr, names):
    """All equations of the named primitives, including those of inner jaxprs."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in names:
            yield equation
        for inner in jax.tree.leaves(
            equation.params, is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")
        ):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                yield from computing(getattr(inner, "jaxpr", inner), names)


@functools.cache
def traced(family, backward):
    """The jaxpr of a bfloat16 network, or of its gradient."""
    net = network(narrow(TWO_LEVELS[family]))
    assert {leaf.dtype for leaf in jax.tree.leaves(net.abstract)} == {FLOAT32}
    function = (
        jax.grad(lambda params, *args: net.apply(params, *args).sum()) if backward else net.apply
    )
    return jax.make_jaxpr(function)(net.abstract, *inputs()).jaxpr


@pytest.mark.parametrize("family", TWO_LEVELS)
def test_dtypes_of_images_and_embeddings(family):
    convolutions = list(computing(traced(family, backward=False), ("conv_general_dilated",)))
    assert {v.aval.dtype for e in convolutions for v in e.invars} == {BFLOAT16}
    *inner, last = (e.outvars[0].aval for e in convolutions)
    assert (
        {aval.dtype for aval in inner} == {BFLOAT16}
        and last.dtype == FLOAT32
        and last.shape[-1] == 2
    )
    products = [
        tuple(v.aval for v in (*e.invars, *e.outvars))
        for e in computing(traced(family, False), ("dot_general",))
    ]
    embedding = [avals for avals in products if avals[0].ndim == 2]
    assert len(embedding) >= 4 + 10 and {aval.dtype for avals in embedding for aval in avals} == {
        FLOAT32
    }  # 10 blocks' `affine`
    attention = [avals for avals in products if avals[0].ndim > 2]
    assert len(attention) >= 4 and {
        aval.dtype for left, right, _ in attention for aval in (left, right)
    } == {BFLOAT16}


@pytest.mark.parametrize("family", TWO_LEVELS)
def test_logits_and_softmax_are_float32(family):
    jaxpr = traced(family, backward=False)
    exponentials = [
        e.invars[0].aval for e in computing(jaxpr, ("exp",)) if e.invars[0].aval.ndim > 3
    ]
    assert len(exponentials) >= 2 and {aval.dtype for aval in exponentials} == {FLOAT32}
    results = [
        e.outvars[0].aval.dtype
        for e in computing(jaxpr, ("dot_general",))
        if e.outvars[0].aval.ndim > 2
    ]
    assert sorted(map(str, results)) == sorted(
        ["float32", "bfloat16"] * len(exponentials)
    )  # the logits, and what is attended to


@pytest.mark.parametrize("family", TWO_LEVELS)
def test_sums_over_pixels_are_float32(family):
    """H100s accumulate bfloat16 in bfloat16 if the program says so."""
    sums = list(computing(traced(family, backward=True), ("reduce_sum",)))

    def added(e):
        return math.prod(e.invars[0].aval.shape[axis] for axis in e.params["axes"])

    assert len(sums) > 50
    assert all(added(e) == 1 for e in sums if e.invars[0].aval.dtype == BFLOAT16)


@pytest.mark.parametrize("family", TWO_LEVELS)
def test_network_dtypes_of_parameters(family):
    net = network(narrow(TWO_LEVELS[family]))
    found = {
        jax.tree_util.keystr(path): dtype for path, dtype in jax.tree.leaves_with_path(net.dtypes)
    }
    wide = ("map_", "affine", "bias", "scale", "frequencies")
    assert found == {
        name: FLOAT32 if any(part in name for part in wide) else BFLOAT16 for name in found
    }
    assert set(found.values()) == {FLOAT32, BFLOAT16}
    assert set(jax.tree.leaves(network(TWO_LEVELS[family]).dtypes)) == {FLOAT32}
    # Parameters rounded to these dtypes give the same result, so they can be gathered in them.
    params = parameters(net)
    rounded = jax.tree.map(lambda leaf, dtype: leaf.astype(dtype), params, net.dtypes)
    apply = jax.jit(net.apply)
    chex.assert_trees_all_equal(apply(params, *inputs()), apply(rounded, *inputs()))


def test_last_convolution_returns_float32():
    conv = Conv(16, 3, (3, 3), padding=[(1, 1)] * 2, dtype=BFLOAT16, rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 8, 8, 16)), BFLOAT16)
    wide, usual = conv(x, wide=True), conv(x)
    assert (wide.dtype, usual.dtype) == (FLOAT32, BFLOAT16)
    exact_conv = Conv(16, 3, (3, 3), padding=[(1, 1)] * 2, dtype=FLOAT32, rngs=nnx.Rngs(0))
    exact_conv.kernel[...] = conv.kernel[...].astype(BFLOAT16).astype(FLOAT32)
    exact = exact_conv(x.astype(FLOAT32))
    np.testing.assert_allclose(wide, exact, rtol=1e-5, atol=1e-5)
    assert np.abs(np.asarray(usual, np.float32) - exact).max() > 1e-3


def test_modulation_is_rounded_once():
    norm = GroupNorm(8, num_groups=2, dtype=BFLOAT16, rngs=nnx.Rngs(0))
    random = np.random.default_rng(0)
    x, scale, shift = (
        jnp.asarray(random.standard_normal(shape), FLOAT32)
        for shape in ((2, 8, 8, 8), (2, 8), (2, 8))
    )
    x = x.astype(BFLOAT16)
    exact = GroupNorm(8, num_groups=2, dtype=FLOAT32, rngs=nnx.Rngs(0))(
        x.astype(FLOAT32), scale, shift
    )
    found = np.asarray(norm(x, scale, shift), np.float32)
    np.testing.assert_allclose(
        found, exact, rtol=2**-8, atol=1e-6
    )  # half a step of bfloat16, and where float32 falls next to one
    assert np.mean(found == np.asarray(exact.astype(BFLOAT16), np.float32)) > 0.99


@dataclasses.dataclass(frozen=True)
class Device:
    """What a network asks of a device."""

    platform: str
    compute_capability: str = ""


CUDA, TPU, CPU = (Device(platform) for platform in ("gpu", "tpu", "cpu"))


def gpu(capability):
    return Device("gpu", capability)


@pytest.mark.parametrize(
    ("device", "dtype", "width", "wanted"),
    [
        (gpu("9.0"), BFLOAT16, 64, "cudnn"),
        (gpu("8.0"), BFLOAT16, 128, "cudnn"),
        (gpu("12.0"), BFLOAT16, 8, "cudnn"),
        (gpu("7.5"), BFLOAT16, 64, "xla"),
        (gpu("gfx942"), BFLOAT16, 64, "xla"),  # AMD's
        (CUDA, BFLOAT16, 64, "xla"),  # without a compute capability
        (gpu("9.0"), FLOAT32, 64, "xla"),
        (gpu("9.0"), BFLOAT16, 60, "xla"),
        (gpu("9.0"), BFLOAT16, 136, "xla"),
        (TPU, BFLOAT16, 64, "xla"),
        (CPU, BFLOAT16, 64, "xla"),
    ],
)
def test_attention_implementation_by_device(device, dtype, width, wanted, monkeypatch):
    used = []
    monkeypatch.setattr(
        jax.nn,
        "dot_product_attention",
        lambda q, k, v, key_value_seq_lengths, implementation: used.append(implementation) or q,
    )
    q = jnp.zeros((1, 4, 1, width), dtype)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    attention.attend(q, q, q)
    # Under `compiling_for`, the given device decides, not the local one.
    for other in (gpu("9.0"), CPU):
        monkeypatch.setattr(jax, "local_devices", lambda other=other: [other])
        mesh = Mesh(np.array([[device]], object), sharding.AXES)
        with target.compiling_for(mesh):
            attention.attend(q, q, q)
            attention.attend(q, q, q, jnp.ones(1, jnp.int32))
    assert used == [wanted, wanted, "xla", wanted, "xla"]  # lengths are masked by XLA


@pytest.mark.parametrize("resample", ["up", "down"])
def test_resampling_is_that_of_float32_rounded_once(resample):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 8, 6, 3)), BFLOAT16)
    y, backward = jax.vjp(resampling.RESAMPLE[resample], x)
    exact, exact_backward = jax.vjp(resampling.RESAMPLE[resample], x.astype(FLOAT32))
    cotangent = jnp.asarray(np.random.default_rng(1).standard_normal(y.shape), BFLOAT16)
    chex.assert_trees_all_equal(y, exact.astype(BFLOAT16))
    (gradient,), (wanted,) = backward(cotangent), exact_backward(cotangent.astype(FLOAT32))
    assert gradient.dtype == BFLOAT16
    chex.assert_trees_all_close(gradient.astype(FLOAT32), wanted, rtol=2**-8, atol=1e-6)


def test_convolution_of_enlarged_images_is_that_of_float32():
    random = np.random.default_rng(0)
    x, kernel, bias = (
        jnp.asarray(random.standard_normal(shape), FLOAT32)
        for shape in ((2, 5, 6, 4), (3, 3, 4, 7), (7,))
    )
    exact = convolution.convolve(resampling.upsample(x), kernel, bias, ((1, 1), (1, 1)))
    found = convolution.enlarge_and_convolve(x, kernel, bias)
    chex.assert_trees_all_close(found, exact, atol=1e-5)
