import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rdm_jax.diffusion.guidance import ClassifierFree, compose
from rdm_jax.models.conditions import ClassLabels

LABELS = jax.nn.one_hot(jnp.asarray([2, 0, 1]), 4)


def conditional(x, sigma, labels):
    """Depends on the image, the level and the label; the null label differs from all others."""
    sigma = jnp.broadcast_to(sigma, x.shape[:1])[:, None, None, None]
    return jnp.tanh(x) / (1 + sigma) + (labels @ jnp.asarray([1.0, -2.0, 3.0, 5.0]))[
        :, None, None, None
    ] * jnp.cos(x + sigma)


def guided(conditional, labels, weight):
    """The guided denoiser for fixed labels."""
    denoise = ClassifierFree(weight, ClassLabels(labels.shape[1]))(conditional)
    return lambda x, sigma: denoise(x, sigma, labels)


def counted(calls):
    def network(x, sigma, labels):
        calls.append((x, sigma, labels))
        return conditional(x, sigma, labels)

    return network


@pytest.fixture
def x():
    return jax.random.normal(jax.random.key(0), (3, 4, 6, 2))


LEVELS = pytest.mark.parametrize(
    "sigma", [jnp.asarray(0.7), jnp.asarray([0.1, 0.7, 9.0])], ids=["one-level", "level-an-image"]
)


@LEVELS
def test_guidance_of_one_is_conditional(x, sigma):
    calls = []
    out = guided(counted(calls), LABELS, 1.0)(x, sigma)
    ((seen, _, labels),) = calls
    chex.assert_shape(seen, x.shape)
    chex.assert_trees_all_equal(labels, LABELS)
    chex.assert_trees_all_equal(out, conditional(x, sigma, LABELS))


@LEVELS
@pytest.mark.parametrize("weight", [0.0, 0.5, 2.0, 3.5])
def test_guidance_extrapolates_from_null(x, sigma, weight):
    out = guided(conditional, LABELS, weight)(x, sigma)
    expected = weight * conditional(x, sigma, LABELS) - (weight - 1) * conditional(
        x, sigma, jnp.zeros_like(LABELS)
    )
    chex.assert_trees_all_close(out, expected, atol=5e-6)  # float32 roundings of numbers up to 20


def test_guidance_of_zero_is_unconditional(x):
    out = guided(conditional, LABELS, 0.0)(x, jnp.asarray(0.7))
    chex.assert_trees_all_close(
        out, conditional(x, jnp.asarray(0.7), jnp.zeros_like(LABELS)), atol=1e-6
    )


def test_guidance_is_continuous_at_one(x):
    near, one = (guided(conditional, LABELS, w)(x, jnp.asarray(0.7)) for w in (1 + 1e-4, 1.0))
    # The two passes differ by at most 3, so the outputs by at most 3e-4.
    assert 0 < np.max(np.abs(near - one)) < 3.1e-4


@LEVELS
def test_guidance_batches_both_passes(x, sigma):
    calls = []
    guided(counted(calls), LABELS, 3.5)(x, sigma)
    ((seen, levels, labels),) = calls
    chex.assert_shape(seen, (6, *x.shape[1:]))
    for which, expected in (
        (slice(0, None, 2), LABELS),
        (slice(1, None, 2), jnp.zeros_like(LABELS)),
    ):
        chex.assert_trees_all_equal(seen[which], x)
        chex.assert_trees_all_equal(levels[which], jnp.broadcast_to(sigma, (3,)))
        chex.assert_trees_all_equal(labels[which], expected)


@pytest.mark.parametrize("weight", [1.0, 2.0])
def test_guidance_is_traced_once(x, weight):
    chex.clear_trace_counter()  # the counter knows a function by its source, which both cases share
    denoise = guided(conditional, LABELS, weight)
    compiled = jax.jit(chex.assert_max_traces(n=1)(lambda x, sigma: denoise(x, sigma)))
    for sigma in (0.1, 0.2, 0.3):
        chex.assert_shape(compiled(x, jnp.float32(sigma)), x.shape)


def test_compose_applies_the_first_transform_first(x):
    def scaled(conditional):
        return lambda x, sigma, labels: 2 * conditional(x, sigma, labels)

    def shifted(conditional):
        return lambda x, sigma, labels: conditional(x, sigma, labels) + 1

    one = conditional(x, jnp.asarray(0.7), LABELS)
    both = compose(scaled, shifted)(conditional)(x, jnp.asarray(0.7), LABELS)
    chex.assert_trees_all_equal(both, 2 * one + 1)
    chex.assert_trees_all_equal(compose()(conditional)(x, jnp.asarray(0.7), LABELS), one)


def test_classifier_free_takes_any_tree(x):
    """A condition of several arrays, such as text with a mask."""

    class Pair:
        def null(self, condition):
            return jax.tree.map(jnp.zeros_like, condition)

    def of_tree(x, sigma, tree):
        return conditional(x, sigma, tree["a"] + tree["b"][:, 0])

    tree = {"a": LABELS, "b": jnp.stack([LABELS, LABELS], 1)}
    out = ClassifierFree(2.0, Pair())(of_tree)(x, jnp.asarray(0.7), tree)
    chex.assert_trees_all_close(
        out, guided(conditional, 2 * LABELS, 2.0)(x, jnp.asarray(0.7)), atol=5e-6
    )
