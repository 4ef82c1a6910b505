"""Which class each image gets."""

import numpy as np
import pytest

from rdm_jax.data.classes import Classes
from rdm_jax.runtime.errors import InputError
from rdm_jax.sampling.labels import labels_of


def labels(rule: str, seeds=np.arange(2000), classes: int = 10, run_seed: int = 0):  # noqa: B008
    return labels_of(seeds, rule, Classes(tuple("abcdefghijkl"[:classes])), run_seed=run_seed)


def test_balanced_is_exactly_so():
    found = labels("balanced")
    assert found.dtype == np.int32 and np.bincount(found).tolist() == [200] * 10
    assert found[:12].tolist() == [
        0,
        1,
        2,
        3,
        4,
        5,
        6,
        7,
        8,
        9,
        0,
        1,
    ]  # seed mod classes, as in the published 1.87


def test_random_is_uniform_and_the_seeds_alone():
    found = labels("random")
    counts = np.bincount(found, minlength=10)
    assert ((counts - 200) ** 2 / 200).sum() < 27.9  # chi-squared, 9 degrees of freedom: 1 in 1,000
    np.testing.assert_array_equal(labels("random", np.array([7, 1999, 3])), found[[7, 1999, 3]])
    assert (labels("random", run_seed=1) != found).mean() > 0.8


def test_listed_ones_are_taken_in_turn():
    assert set(labels("3").tolist()) == {3}
    assert labels("3,1,5-6", np.arange(6)).tolist() == [3, 1, 5, 6, 3, 1]
    assert labels("9,9,0", np.array([2, 0])).tolist() == [0, 9]
    assert labels("d, b, 5-6", np.arange(6)).tolist() == [3, 1, 5, 6, 3, 1]


def test_data_without_classes_has_the_null_label():
    for rule in ("balanced", "random"):
        assert set(labels(rule, classes=0).tolist()) == {-1}


@pytest.mark.parametrize("wrong", ["", "balance", "3-1", "-1"])
def test_other_rules_are_refused(wrong):
    with pytest.raises(InputError, match="config.sampling.labels"):
        labels(wrong)
