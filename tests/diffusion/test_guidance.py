import dataclasses
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rdm_jax.diffusion import guidance
from rdm_jax.diffusion.guidance import Autoguidance, ClassifierFree
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
    denoise = ClassifierFree(weight).transform(conditional, ClassLabels(labels.shape[1]).null)
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


@dataclasses.dataclass(frozen=True)
class Own:
    """A kind of guidance that is any function."""

    function: Callable
    guide: str = ""
    passes: int = 1
    needs_null: bool = False

    def check(self, path):
        pass

    def transform(self, conditional, null, guide):
        return self.function(conditional)


def test_first_entry_of_a_list_is_applied_first(x):
    def scaled(conditional):
        return lambda x, sigma, labels: 2 * conditional(x, sigma, labels)

    def shifted(conditional):
        return lambda x, sigma, labels: conditional(x, sigma, labels) + 1

    one = conditional(x, jnp.asarray(0.7), LABELS)
    both = guidance.guided((Own(scaled), Own(shifted)), conditional, jnp.zeros_like)
    chex.assert_trees_all_equal(both(x, jnp.asarray(0.7), LABELS), 2 * one + 1)
    none = guidance.guided((), conditional, jnp.zeros_like)
    chex.assert_trees_all_equal(none(x, jnp.asarray(0.7), LABELS), one)


def test_classifier_free_takes_any_tree(x):
    """A condition of several arrays, such as text with a mask."""

    class Pair:
        def null(self, condition):
            return jax.tree.map(jnp.zeros_like, condition)

    def of_tree(x, sigma, tree):
        return conditional(x, sigma, tree["a"] + tree["b"][:, 0])

    tree = {"a": LABELS, "b": jnp.stack([LABELS, LABELS], 1)}
    out = ClassifierFree(2.0).transform(of_tree, Pair().null)(x, jnp.asarray(0.7), tree)
    chex.assert_trees_all_close(
        out, guided(conditional, 2 * LABELS, 2.0)(x, jnp.asarray(0.7)), atol=5e-6
    )


# Two classes at +-1 with variance V, of equal probability: every denoiser is known in closed form.
V, NEAR, FAR = 0.25, 0.6, 4.0
CLASSES = jax.nn.one_hot(jnp.asarray([0, 1, 0]), 2)


def of_class(x, sigma, sign):
    """E[x0 | x, class]: a Gaussian."""
    return sign + V / (V + sigma**2) * (x - sign)


def of_mixture(x, sigma):
    """E[x0 | x]: both classes, weighted by their posterior, of independent pixels."""
    second = jax.nn.sigmoid(-2 * x / (V + sigma**2))
    return (1 - second) * of_class(x, sigma, 1.0) + second * of_class(x, sigma, -1.0)


def oracle(x, sigma, labels):
    """The conditional denoiser of the mixture; the null condition is the mixture itself."""
    sigma = jnp.broadcast_to(sigma, x.shape[:1])[:, None, None, None]
    label = labels[:, :, None, None, None]
    known = label[:, 0] * of_class(x, sigma, 1.0) + label[:, 1] * of_class(x, sigma, -1.0)
    return jnp.where(label.sum(1) > 0, known, of_mixture(x, sigma))


def too_wide(x, sigma, labels):
    """A worse network: it takes every Gaussian to be twice as wide."""
    shift = jnp.asarray([1.0, -1.0])
    sign = (labels @ shift)[:, None, None, None]
    sigma = jnp.broadcast_to(sigma, x.shape[:1])[:, None, None, None]
    return sign + 4 * V / (4 * V + sigma**2) * (x - sign)


def signs():
    return jnp.asarray([1.0, -1.0, 1.0])[:, None, None, None]


@pytest.mark.parametrize(("sigma", "weight"), [(NEAR, 2.5), (FAR, 1.0), (0.1, 1.0)])
def test_classifier_free_of_a_mixture(x, sigma, weight):
    """Inside of the interval by w, outside the class's own denoiser."""
    entry = ClassifierFree(2.5, (0.2, 2.0))
    out = entry.transform(oracle, jnp.zeros_like)(x, jnp.asarray(sigma), CLASSES)
    known, mixture = of_class(x, sigma, signs()), of_mixture(x, sigma)
    np.testing.assert_allclose(out, weight * known - (weight - 1) * mixture, atol=5e-6)


@pytest.mark.parametrize(("sigma", "weight"), [(NEAR, 1.8), (FAR, 1.0)])
def test_autoguidance_of_a_gaussian(x, sigma, weight):
    """Linear in x: the gain is that of the formula inside of the interval."""
    out = Autoguidance(1.8, "a/1", (0.2, 2.0)).transform(oracle, jnp.zeros_like, too_wide)(
        x, jnp.asarray(sigma), CLASSES
    )
    gain = weight * V / (V + sigma**2) - (weight - 1) * 4 * V / (4 * V + sigma**2)
    np.testing.assert_allclose(out, signs() + gain * (x - signs()), atol=5e-6)


def test_autoguidance_interval_is_per_image(x):
    sigma = jnp.asarray([NEAR, FAR, NEAR])
    out = Autoguidance(1.8, "a/1", (0.2, 2.0)).transform(oracle, jnp.zeros_like, too_wide)(
        x, sigma, CLASSES
    )
    plain = oracle(x, sigma, CLASSES)
    changed = [not np.allclose(out[i], plain[i], atol=1e-4) for i in range(3)]
    assert changed == [True, False, True]
    np.testing.assert_array_equal(out[1], plain[1])


def test_what_a_guide_returns_outside_of_the_interval_does_not_matter(x):
    def undefined(x, sigma, labels):
        return too_wide(x, sigma, labels) / jnp.where(sigma > 2, 0.0, 1.0)

    entry = Autoguidance(1.8, "a/1", (0.2, 2.0))
    for sigma, applies in ((NEAR, True), (FAR, False)):
        sigma = jnp.asarray(sigma)
        out, expected = (
            entry.transform(oracle, jnp.zeros_like, guide)(x, sigma, CLASSES)
            for guide in (undefined, too_wide)
        )
        np.testing.assert_array_equal(out, expected)
        assert np.isfinite(out).all() and applies == (
            np.abs(out - oracle(x, sigma, CLASSES)).max() > 0.01
        )


def test_autoguidance_by_the_network_itself_is_the_identity(x):
    out = Autoguidance(3.0, "a/1").transform(oracle, jnp.zeros_like, oracle)(
        x, jnp.asarray(0.7), CLASSES
    )
    np.testing.assert_allclose(out, oracle(x, 0.7, CLASSES), atol=2e-6)


def test_autoguidance_needs_its_guide():
    with pytest.raises(ValueError, match="1.5 by a/1 has no guide"):
        Autoguidance(1.5, "a/1").transform(oracle, jnp.zeros_like, None)
    assert Autoguidance(1.0, "a/1").transform(oracle, jnp.zeros_like, None) is oracle
    with pytest.raises(ValueError, match="0 guides for"):
        guidance.guided((Autoguidance(1.5, "a/1"),), oracle, jnp.zeros_like)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["free-then-auto", "auto-then-free"])
def test_list_of_guidance_equals_the_composed_formula(x, order):
    """The order matters: what comes first is guided by what follows."""
    free, auto = ClassifierFree(2.0), Autoguidance(1.5, "a/1")
    entries = tuple((free, auto)[i] for i in order)
    sigma, null = jnp.asarray(NEAR), jnp.zeros_like(CLASSES)
    out = guidance.guided(entries, oracle, jnp.zeros_like, [too_wide])(x, sigma, CLASSES)
    known, unknown = oracle(x, sigma, CLASSES), oracle(x, sigma, null)
    wide, wide_unknown = too_wide(x, sigma, CLASSES), too_wide(x, sigma, null)
    if order == (0, 1):
        expected = 1.5 * (2 * known - unknown) - 0.5 * wide
    else:
        expected = 2 * (1.5 * known - 0.5 * wide) - (1.5 * unknown - 0.5 * wide_unknown)
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_passes_are_those_that_are_made(x):
    """The count of every list equals the images that the networks see."""
    free, auto = ClassifierFree(2.0), Autoguidance(1.5, "a/1")
    none = (ClassifierFree(1.0), Autoguidance(1.0))
    lists = [(), (free,), (auto,), (free, auto), (auto, free), (auto, free, auto), none]
    expected = [(1,), (2,), (1, 1), (2, 1), (2, 2), (2, 2, 1), (1,)]
    for entries, counts in zip(lists, expected, strict=True):
        calls = [[] for _ in counts]
        own, *others = map(counted_images, calls)
        guidance.guided(entries, own, jnp.zeros_like, others)(x, jnp.asarray(NEAR), CLASSES)
        made = tuple(sum(seen) // len(x) for seen in calls)
        assert made == guidance.passes(entries) == counts


def counted_images(calls):
    def denoise(x, sigma, labels):
        calls.append(len(x))
        return oracle(x, sigma, labels)

    return denoise


def test_short_forms():
    free = ClassifierFree(1.5)
    for value in (1.5, [1.5], (free,), free, [1, free]):
        assert guidance.as_list(value) == (free,)
    assert guidance.as_list(1) == guidance.as_list(1.0) == guidance.as_list(()) == ()
    assert guidance.shown(()) == 1.0 and guidance.shown((free,)) == 1.5
    both = (ClassifierFree(2.0, (0.3, 5.0)), Autoguidance(1.4, "runs/small/stage1"))
    assert guidance.text(()) == "1"
    assert guidance.text(both) == "2 at sigma 0.3 to 5, 1.4 by runs/small/stage1"
    assert guidance.shown(both) == ["2 at sigma 0.3 to 5", "1.4 by runs/small/stage1"]
