"""Conditions: the arrays that a network is conditioned on, their null and their dropout."""

import chex
import jax
import jax.numpy as jnp
import pytest

from rdm_jax.models.adm import ADM
from rdm_jax.models.backbone import Shapes
from rdm_jax.models.conditions import ClassLabels, Nothing
from rdm_jax.models.functional import functional
from rdm_jax.models.song import Song
from rdm_jax.runtime.errors import InputError


def test_class_labels_are_one_hot_with_zero_null():
    condition = ClassLabels().bound(3)
    assert condition == ClassLabels(3) and condition.spec.shape == (3,)
    expected = jnp.asarray([[0.0, 0, 1], [1, 0, 0], [0, 0, 0]])
    chex.assert_trees_all_equal(condition.encode({"label": jnp.asarray([2, 0, -1])}), expected)
    chex.assert_trees_all_equal(condition.null(expected), jnp.zeros((3, 3)))


def test_drop_uses_key_per_image():
    condition, keys = ClassLabels(3), jax.random.split(jax.random.key(0), 2000)
    labels = condition.encode({"label": jnp.arange(2000) % 3})
    dropped = condition.drop(labels, keys, 0.25)
    gone = dropped.sum(-1) == 0
    assert abs(float(gone.mean()) - 0.25) < 4 * (0.25 * 0.75 / 2000) ** 0.5  # standard errors
    chex.assert_trees_all_equal(dropped[~gone], labels[~gone])
    chex.assert_trees_all_equal(condition.drop(labels[5:7], keys[5:7], 0.25), dropped[5:7])
    chex.assert_trees_all_equal(condition.drop(labels, keys, 0.0), labels)


def test_nothing_has_no_arrays():
    condition, labels = Nothing().bound(7), jnp.arange(3)
    keys = jax.random.split(jax.random.key(0), 3)
    assert (condition.spec, condition.encode({"label": labels}), condition.inputs) == (
        None,
        None,
        {},
    )
    assert condition.null(None) is None and condition.drop(None, keys, 0.5) is None


def test_bound_follows_the_data():
    assert ClassLabels().bound(0) == Nothing() and ClassLabels(4).bound(0) == Nothing()
    assert ClassLabels(4).bound(4) == ClassLabels(4)
    with pytest.raises(InputError, match="condition.count=4, but the data has 5 classes"):
        ClassLabels(4).bound(5)


@pytest.mark.parametrize("network", [ADM(), Song()], ids=["adm", "song"])
def test_u_nets_refuse_a_tree(network):
    code = {"code": jax.ShapeDtypeStruct((3,), jnp.float32)}
    with pytest.raises(
        InputError, match="takes a condition of one vector per image, .* gives {'code'"
    ):
        functional(lambda rngs: network.build(Shapes(3, 3, code), rngs=rngs))
