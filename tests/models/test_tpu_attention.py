"""The TPU's attention kernel, interpreted, against plain attention; and when it is used."""

import functools
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rdm_jax.models import adm, layers, tpu_attention, transformer_layers
from rdm_jax.models.attention import attend, contiguous
from rdm_jax.models.positions import Rotary
from rdm_jax.models.tpu_attention_kernels import HeadGroups
from tests.support.small_networks import parameters


def plain(x, heads):
    """Attention of columns (head, channel, [q, k, v])."""
    b, n, _ = x.shape
    x = contiguous(x, heads=heads.heads)
    q, k, v = (a.reshape(b, n, heads.heads, heads.width) for a in jnp.split(x, 3, axis=-1))
    return attend(q, k, v).reshape(b, n, -1)


def in_kernel(x, heads):
    """The same by the kernel, back from groups to heads."""
    unit = heads.rows(jnp.eye(heads.heads * heads.width, dtype=x.dtype))
    return tpu_attention.attention(heads.columns(x), heads, True) @ unit


def values(shape, seed):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize(
    ("heads", "pixels"),
    [
        pytest.param(HeadGroups(2, 64), 256, marks=pytest.mark.second),
        (HeadGroups(3, 64), 256),  # the last group is half empty
        # A head that does not fill its lanes, four heads in a group, three blocks of rows.
        pytest.param(HeadGroups(1, 72), 256, marks=pytest.mark.second),
        pytest.param(HeadGroups(5, 32), 256, marks=pytest.mark.second),
        pytest.param(HeadGroups(2, 128), 1152, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_kernel_is_plain_attention_with_its_gradients(heads, pixels):
    shape = (1, pixels, heads.heads * heads.width)
    x, cotangent = values((*shape[:2], 3 * shape[2]), 0), values(shape, 1)

    @functools.partial(jax.jit, static_argnums=0)
    def both(function):
        out, backward = jax.vjp(lambda x: function(x, heads), x)
        return out, *backward(cotangent)

    chex.assert_trees_all_close(both(in_kernel), both(plain), atol=2e-5)


@pytest.mark.second
def test_kernel_in_bfloat16_is_as_exact_as_plain_attention():
    heads = HeadGroups(2, 64)
    x, cotangent = values((1, 256, 384), 0), values((1, 256, 128), 1)

    def both(function, dtype):
        out, backward = jax.vjp(lambda x: function(x, heads), x.astype(dtype))
        return [np.asarray(a, np.float32) for a in (out, *backward(cotangent.astype(dtype)))]

    exact = both(plain, jnp.float32)
    for one, other, true in zip(
        both(in_kernel, jnp.bfloat16), both(plain, jnp.bfloat16), exact, strict=True
    ):
        assert 0 < np.abs(one - true).max() < 1.5 * np.abs(other - true).max()


@pytest.mark.parametrize(
    ("dtype", "pixels", "heads", "used"),
    [
        ("bfloat16", 1024, HeadGroups(8, 64), True),
        ("bfloat16", 4096, HeadGroups(6, 72), True),
        ("float32", 1024, HeadGroups(8, 64), False),
        ("bfloat16", 64, HeadGroups(12, 64), False),  # logits are small
        ("bfloat16", 16384, HeadGroups(8, 64), False),  # do not fit
        ("bfloat16", 1024, HeadGroups(1, 256), False),
    ],
)
def test_kernel_takes_what_fills_the_matrix_unit(dtype, pixels, heads, used):
    assert tpu_attention.applies(jnp.dtype(dtype), pixels, heads) is used


@pytest.mark.second
@pytest.mark.parametrize("heads", [2, 3])
def test_attention_layer_is_the_same_on_a_tpu(heads, monkeypatch):
    def build():
        kwargs = {"dtype": jnp.dtype("bfloat16"), "rngs": nnx.Rngs(0)}
        return layers.Attention(64 * heads, heads, adm.STYLE, **kwargs)

    graph, state = nnx.split(nnx.eval_shape(build))
    params = parameters(SimpleNamespace(abstract=nnx.to_pure_dict(state)))
    x, cotangent = (values((2, 16, 16, 64 * heads), i).astype(jnp.bfloat16) for i in range(2))

    def run(params, x):
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graph, state)(x)

    def both():
        out, backward = jax.vjp(run, params, x)
        return jax.tree.map(lambda a: np.asarray(a, np.float32), (out, backward(cotangent)))

    expected = both()
    used = []
    kernel = tpu_attention.attention
    monkeypatch.setattr(
        tpu_attention,
        "attention",
        lambda x, heads, _=True: used.append(x) or kernel(x, heads, True),
    )
    monkeypatch.setattr(jax, "local_devices", lambda: [SimpleNamespace(platform="tpu")])
    found = both()
    assert used
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(one - other) <= 0.02 * np.linalg.norm(other)


@pytest.mark.parametrize(
    ("heads", "width", "grid", "before"),
    [
        (3, 64, (16, 16), 32),  # a group half empty, class tokens, rows that fill no tile
        pytest.param(2, 80, (16, 16), 0, marks=pytest.mark.second),
    ],
)
def test_kernel_normalises_and_turns_as_the_transformer(heads, width, grid, before, monkeypatch):
    def build():
        kwargs = {"dropout": 0.0, "dtype": jnp.dtype("float32"), "rngs": nnx.Rngs(0)}
        return transformer_layers.Attention(heads * width, heads, **kwargs)

    graph, state = nnx.split(nnx.eval_shape(build))
    params = parameters(SimpleNamespace(abstract=nnx.to_pure_dict(state)))
    rotary = Rotary.of(*grid, width, before=before)
    shape = (2, before + grid[0] * grid[1], heads * width)
    x, cotangent = values(shape, 0), values(shape, 1)

    def both():
        @jax.jit
        def run(params, x):
            nnx.replace_by_pure_dict(state, params)
            return nnx.merge(graph, state)(x, rotary, None)

        out, backward = jax.vjp(run, params, x)
        return out, *backward(cotangent)

    expected = both()
    kernel = functools.partial(tpu_attention.positioned_attention, interpret=True)
    monkeypatch.setattr(transformer_layers, "attend_positioned_on_tpu", kernel)
    monkeypatch.setattr(transformer_layers, "kernel_on_tpu", lambda *_: True)
    for one, other in zip(jax.tree.leaves(both()), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(one - other) <= 1e-5 * np.linalg.norm(other)
