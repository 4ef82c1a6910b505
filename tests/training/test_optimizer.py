"""Schedules, weight decay and clipping, against optax's own."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rdm_jax.config import Training
from rdm_jax.training.count import Count
from rdm_jax.training.optimizer import are_kernels, build_optimizer, learning_rate

SETTINGS = {"images": 1000, "batch_size": 10, "learning_rate": 0.1, "warmup": 100}
PARAMS = {"layer": {"kernel": jnp.asarray([[1.0, -2.0]]), "bias": jnp.asarray([3.0, 4.0])}}


def rates(**fields):
    rate = learning_rate(Training(**SETTINGS, **fields))
    return np.asarray([rate(step) for step in range(101)])


def after(optimizer, steps=5):
    """The parameters after some steps with random gradients."""
    params, state = PARAMS, optimizer.init(PARAMS)
    for step in range(steps):
        keys = jax.random.split(jax.random.key(step), 2)
        grads = {
            "layer": {
                name: 10 * jax.random.normal(key, PARAMS["layer"][name].shape)
                for name, key in zip(("kernel", "bias"), keys, strict=True)
            }
        }
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize("schedule", ["constant", "inverse_sqrt", "cosine"])
def test_schedules_begin_with_warmup(schedule):
    found = rates(schedule=schedule)
    assert found[0] == 0 and (np.diff(found[:10]) > 0).all()


def test_constant_rate():
    np.testing.assert_allclose(rates()[10:], 0.1, rtol=1e-6)


def test_inverse_sqrt_rate():
    found = rates(schedule="inverse_sqrt", decay_from=250)
    np.testing.assert_allclose(found[10:26], 0.1, rtol=1e-6)
    np.testing.assert_allclose(found[100], 0.1 / np.sqrt(1000 / 250), rtol=1e-6)


def test_cosine_rate():
    found = rates(schedule="cosine")
    expected = [0.1 * (1 + np.cos(np.pi * share)) / 2 for share in (0.25, 0.5, 0.75, 1.0)]
    np.testing.assert_allclose(found[[25, 50, 75, 100]], expected, atol=1e-8)


@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_optimizer_is_optax(weight_decay, clip_norm):
    training = Training(**SETTINGS, weight_decay=weight_decay, clip_norm=clip_norm)
    ours = build_optimizer(training, Count(10))
    theirs = optax.chain(
        optax.clip_by_global_norm(clip_norm or 1e9),
        optax.adamw(learning_rate(training), b2=0.999, weight_decay=weight_decay, mask=are_kernels),
    )
    chex.assert_trees_all_close(after(ours), after(theirs), rtol=1e-6)


def test_state_is_the_same_for_all_settings():
    """So that a run can change them."""
    plain, other = (
        build_optimizer(Training(**SETTINGS, **fields), Count(10)).init(PARAMS)
        for fields in ({}, {"weight_decay": 0.1, "clip_norm": 1.0, "schedule": "cosine"})
    )
    chex.assert_trees_all_equal(plain, other)
