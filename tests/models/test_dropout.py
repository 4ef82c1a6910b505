"""Dropout's masks: the rate, independence of positions, images and blocks, and of the batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rdm_jax.models.layers import dropout

SHAPE = (32, 32, 64)
VALUES = 32 * 32 * 64


def masks(keys, rate, shape=SHAPE):
    """Whether each value of each image is kept."""
    return np.asarray(dropout(jnp.ones((len(keys), *shape)), rate, keys) != 0)


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


@pytest.mark.parametrize("rate", [0.1, 0.13, 0.5])
def test_dropout_rate_within_five_standard_errors(rate):
    dropped = 1 - masks(keys(16), rate).mean((1, 2, 3))
    error = (rate * (1 - rate) / VALUES) ** 0.5
    assert np.all(np.abs(dropped - rate) < 5 * error)
    assert abs(dropped.mean() - rate) < 5 * error / 4


def test_dropout_rate_of_every_row_column_and_channel():
    kept = masks(keys(64), 0.1)
    for axes in ((0, 2, 3), (0, 1, 3), (0, 1, 2)):
        share = kept.mean(axes)
        count = kept.size / share.size
        assert np.all(np.abs(share - 0.9) < 5 * (0.09 / count) ** 0.5)


@pytest.mark.parametrize(
    "shift", [(0, 0, 0, 1), (0, 0, 1, 0), (0, 1, 0, 0), (1, 0, 0, 0), (0, 0, 0, 2)]
)
def test_dropout_of_neighbours_is_uncorrelated(shift):
    """Neighbouring channels, columns, rows and images."""
    centred = masks(keys(16), 0.5).astype(np.float64) * 2 - 1
    correlation = (centred * np.roll(centred, shift, (0, 1, 2, 3))).mean()
    assert abs(correlation) < 5 / centred.size**0.5


def test_dropout_of_blocks_of_an_image_is_uncorrelated():
    """Blocks fold their number into the image's key."""
    image = jax.random.key(3)
    first, second = (
        masks(jax.random.fold_in(image, block)[None], 0.5).astype(np.float64) * 2 - 1
        for block in (0, 1)
    )
    assert abs((first * second).mean()) < 5 / VALUES**0.5


def test_dropout_of_image_does_not_depend_on_batch():
    np.testing.assert_array_equal(masks(keys(5), 0.1)[3:4], masks(keys(5)[3:4], 0.1))


def test_dropout_keeps_the_mean():
    x = jnp.full((4, *SHAPE), 3.0)
    assert float(dropout(x, 0.25, keys(4)).mean()) == pytest.approx(3, rel=0.01)


def test_dropout_takes_few_operations():
    """It is drawn up to three times per step; threefry takes a hundred operations per value."""
    text = str(
        jax.make_jaxpr(lambda x, keys: dropout(x, 0.1, keys))(jnp.ones((2, *SHAPE)), keys(2))
    )
    assert "threefry" not in text and "random_bits" not in text
