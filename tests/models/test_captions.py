"""Networks that are conditioned on captions: what they see of them, and of the null caption."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rdm_jax.models.conditions import ClassLabels, Text
from rdm_jax.runtime.errors import InputError
from tests.support.small_networks import parameters
from tests.support.text_networks import (
    CLASSES,
    NETWORKS,
    TEXT,
    TEXT_AND_CLASSES,
    TOKENS,
    WIDTH,
    images,
    text_batch,
    text_network,
)

SECOND = pytest.mark.second
EACH = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[SECOND] * (name == "song")) for name in NETWORKS]
)


def run(name, params, x, time, condition, **options):
    config = dataclasses.replace(NETWORKS[name], **options)
    both = condition is not None and condition["vector"].shape[1] > WIDTH
    network = text_network(config, TEXT_AND_CLASSES if both else TEXT)
    return np.asarray(jax.jit(network.apply)(params, x, time, condition))


@EACH
def test_networks_see_the_tokens_of_their_own_caption(name):
    params, (x, time) = parameters(text_network(NETWORKS[name])), images(3)
    condition = TEXT.encode(text_batch([5, 2, 0]))
    y = run(name, params, x, time, condition)
    assert y.shape == x.shape and y.dtype == np.float32

    def changed(image, token):
        tokens = condition["tokens"].at[image, token].multiply(-1)
        return np.abs(run(name, params, x, time, condition | {"tokens": tokens}) - y).max((1, 2, 3))

    for image, token, seen in [(0, 4, True), (1, 1, True), (1, 2, False), (2, 0, False)]:
        difference = changed(image, token)
        assert (difference[image] > 1e-3) == seen, (image, token)
        assert np.all(np.delete(difference, image) < 1e-5)


@EACH
def test_networks_ignore_what_stands_behind_a_caption(name):
    """Also numbers that are larger than any in a caption."""
    params, (x, time) = parameters(text_network(NETWORKS[name])), images(2)
    condition = TEXT.encode(text_batch([3, 0]))
    behind = condition["tokens"] + 1e4 * (1 - condition["mask"][:, :, None])
    found = run(name, params, x, time, condition | {"tokens": behind})
    np.testing.assert_allclose(found, run(name, params, x, time, condition), atol=1e-5)


@EACH
def test_networks_null_caption_is_no_condition(name):
    params, (x, time) = parameters(text_network(NETWORKS[name])), images(2)
    condition = TEXT.encode(text_batch([3, 4]))
    null = run(name, params, x, time, TEXT.null(condition))
    assert np.isfinite(null).all()
    np.testing.assert_allclose(null, run(name, params, x, time, None), atol=1e-5)
    assert np.abs(null - run(name, params, x, time, condition)).max((1, 2, 3)).min() > 0.01


@EACH
def test_networks_take_classes_and_captions_together(name):
    network = text_network(NETWORKS[name], TEXT_AND_CLASSES)
    params, (x, time) = parameters(network), images(4)
    x, time = x[:1].repeat(4, 0), time[:1].repeat(4, 0)
    condition = TEXT_AND_CLASSES.encode(text_batch([2, 2, 0, 0], labels=[0, 1, 0, -1]))
    condition["tokens"] = condition["tokens"][:1].repeat(4, 0) * condition["mask"][:, :, None]
    condition["vector"] = condition["vector"].at[1, :WIDTH].set(condition["vector"][0, :WIDTH])
    y = run(name, params, x, time, condition)
    for first, second in [(0, 1), (0, 2), (2, 3)]:
        assert np.abs(y[first] - y[second]).max() > 0.01, (first, second)


def loss_and_gradients(name, params, condition=TEXT, **options):
    network = text_network(dataclasses.replace(NETWORKS[name], **options), condition)
    x, time = images(2)
    given = condition.encode(text_batch([4, 1], labels=[0, 1]))

    def loss(params):
        return (network.apply(params, x, time, given) ** 2).mean()

    return jax.jit(jax.value_and_grad(loss))(params)


@EACH
def test_networks_gradients_reach_all_parameters(name):
    network = text_network(NETWORKS[name], TEXT_AND_CLASSES)
    _, gradients = loss_and_gradients(name, parameters(network), TEXT_AND_CLASSES)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.isfinite(leaf).all() and np.any(leaf), jax.tree_util.keystr(path)


def relative_error(found, expected):
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    # Biases of keys have no gradient: softmax does not see them.
    return max(np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in pairs if np.any(abs(b) > 1e-6))


@pytest.mark.second
@EACH
def test_networks_in_bfloat16_are_near_float32(name):
    params = parameters(text_network(NETWORKS[name]))
    exact = loss_and_gradients(name, params)
    other = loss_and_gradients(name, params, dtype="bfloat16")
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(other))
    assert 0 < relative_error(other[0], exact[0]) < 0.03
    assert relative_error(other[1]["text"], exact[1]["text"]) < 0.1


@pytest.mark.second
@pytest.mark.parametrize(
    ("name", "remat"), [("context", "products"), ("cross", "block"), ("adm", "convolutions")]
)
def test_networks_remat_changes_no_gradient(name, remat):
    params = parameters(text_network(NETWORKS[name]))
    expected = loss_and_gradients(name, params)
    assert relative_error(loss_and_gradients(name, params, remat=remat), expected) < 1e-5


@EACH
def test_captions_add_parameters_and_change_none(name):
    """Names and shapes of the others are those of the network without captions."""
    config = NETWORKS[name]
    plain, text = text_network(config, ClassLabels(CLASSES)), text_network(config, TEXT_AND_CLASSES)
    before, after = (
        {
            jax.tree_util.keystr(path): leaf.shape
            for path, leaf in jax.tree_util.tree_leaves_with_path(network.abstract)
        }
        for network in (plain, text)
    )
    assert before.items() < after.items()
    added = {path.split("'")[-2] for path in after.keys() - before.keys()}
    assert added <= {"kernel", "bias", "scale", "first"}


def test_u_nets_begin_without_seeing_tokens():
    """The last layer of cross-attention is zero, so that captions join in slowly."""
    params = text_network(NETWORKS["adm"]).init(jax.random.key(0))
    cross = [block["cross"]["proj"] for block in params.values() if "cross" in block]
    assert len(cross) == 4  # of the deepest level's blocks: one, the middle, two
    assert not any(map(np.any, jax.tree.leaves(cross)))


def test_cross_attention_is_in_attending_blocks_alone():
    config = dataclasses.replace(NETWORKS["cross"], depth=3)
    blocks = text_network(config).abstract
    assert ["cross" in blocks[f"block{i}"] for i in range(3)] == [False, True, True]
    context = text_network(dataclasses.replace(NETWORKS["context"], depth=3)).abstract
    assert not any("cross" in context[f"block{i}"] for i in range(3))


def test_transformer_refuses_captions_that_no_block_sees():
    config = dataclasses.replace(NETWORKS["context"], class_tokens=0, class_tokens_from=2)
    config.check("network")  # nothing to see, nothing to refuse
    with pytest.raises(InputError, match=r"network\.class_tokens_from=2 .* Use 0 to 1\."):
        text_network(config)


def test_u_net_refuses_captions_that_no_block_sees():
    config = dataclasses.replace(NETWORKS["adm"], attention_levels=(), head_channels=64)
    with pytest.raises(InputError, match=r"network\.attention_levels=\(\) has no block that"):
        text_network(config)


def test_text_tree():
    batch = text_batch([2, 0, 5], labels=[1, -1, 2])
    tree = TEXT_AND_CLASSES.encode(batch)
    chex.assert_trees_all_equal_shapes_and_dtypes(
        jax.tree.map(lambda leaf: leaf[0], tree),
        jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), TEXT_AND_CLASSES.spec),
    )
    np.testing.assert_array_equal(tree["mask"].sum(1), [2, 0, 5])
    np.testing.assert_array_equal(tree["tokens"], batch["text"].astype(jnp.float32))
    norms = np.linalg.norm(tree["vector"][:, :WIDTH], axis=1)
    np.testing.assert_allclose(norms, WIDTH**0.5 * np.array([1, 0, 1]), rtol=1e-6)
    mean = np.asarray(batch["text"][0, :2], np.float32).mean(0)
    np.testing.assert_allclose(
        tree["vector"][0, :WIDTH], mean * WIDTH**0.5 / np.linalg.norm(mean), rtol=1e-5
    )
    np.testing.assert_array_equal(tree["vector"][:, WIDTH:], [[0, 1, 0], [0, 0, 0], [0, 0, 1]])


def test_text_of_no_length_is_null():
    null = TEXT_AND_CLASSES.null(TEXT_AND_CLASSES.encode(text_batch([2, 1], labels=[0, 1])))
    chex.assert_trees_all_equal(TEXT_AND_CLASSES.encode(text_batch([0, 0], labels=[-1, -1])), null)
    with pytest.raises(KeyError, match="text"):  # but a batch without captions is a mistake
        TEXT_AND_CLASSES.encode({"label": jnp.asarray([-1, -1])})


def test_text_drops_caption_and_class_together():
    count = 2000
    keys = jax.random.split(jax.random.key(0), count)
    given = TEXT_AND_CLASSES.encode(text_batch([3] * count, labels=[1] * count))
    dropped = TEXT_AND_CLASSES.drop(given, keys, 0.25)
    gone = [~np.any(np.asarray(part).reshape(count, -1), axis=1) for part in dropped.values()]
    assert abs(gone[0].mean() - 0.25) < 4 * (0.25 * 0.75 / count) ** 0.5  # standard errors
    assert all(np.array_equal(part, gone[0]) for part in gone)
    labels = ClassLabels(CLASSES)
    alone = labels.drop(labels.encode({"label": jnp.ones(count, int)}), keys, 0.25)
    np.testing.assert_array_equal(gone[0], alone.sum(1) == 0)  # the draws of classes alone


def test_text_bound_follows_the_data():
    both = Text(classes=True)
    assert both.bound(7).count == 7 and Text().bound(7).count == 0
    with pytest.raises(InputError, match="condition.classes=True, but the data has no classes"):
        both.bound(0)
    with pytest.raises(InputError, match="condition.count=4, but the data has 5 classes"):
        Text(classes=True, count=4).bound(5)


def test_text_inputs_are_what_it_encodes():
    batch = text_batch([TOKENS])
    assert TEXT.inputs.keys() | {"label"} == TEXT_AND_CLASSES.inputs.keys() == batch.keys()
    for name, one in TEXT_AND_CLASSES.inputs.items():
        assert batch[name].shape == (1, *one.shape) and batch[name].dtype == one.dtype
    TEXT.encode({name: batch[name] for name in TEXT.inputs})
