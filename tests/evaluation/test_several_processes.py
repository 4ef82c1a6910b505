"""Each process measures its share of the images, and all have the statistics of the whole."""

import json

import numpy as np
import pytest

from rdm_jax.evaluation.gathering import Gatherer
from rdm_jax.runtime.signals import StopOnSignal
from tests.support.commands import ended, two
from tests.support.measured_images import (
    BATCH,
    COUNT,
    FEW,
    RandomStream,
    as_arrays,
    gathered,
    space,
)

EXACT = ("count", "features", "pictures")


def of_kind(found, kind):
    return {name.partition("/")[2]: value for name, value in found.items() if kind in name}


@pytest.fixture(scope="module")
def by_two(tmp_path_factory):
    """What two processes have found, the images that each has read, and the folder."""
    folder = tmp_path_factory.mktemp("gathered")
    outputs = ended(two("tests.support.measured_images", str(folder), devices=2))
    read = [json.loads(output.splitlines()[-1]) for output, _ in outputs]
    with np.load(folder / "found.npz") as file:
        return dict(file), read, folder


def check_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if name in EXACT:
            np.testing.assert_array_equal(found[name], value, err_msg=name)
        else:
            np.testing.assert_allclose(found[name], value, rtol=1e-6, atol=1e-8, err_msg=name)


@pytest.mark.long
def test_two_processes_measure_half_each_and_equal_one(by_two, tmp_path):
    found, read, _ = by_two
    for part, (straight, _) in enumerate(read):
        assert {n // BATCH % 2 for n in straight} == {part}
    assert sorted(read[0][0] + read[1][0]) == list(range(COUNT))
    expected = as_arrays(gathered(tmp_path)[0])
    for kind in ("straight", "resumed"):
        check_equal(of_kind(found, kind), expected)


@pytest.mark.long
def test_process_without_a_batch_has_part_in_the_statistics(by_two, tmp_path):
    check_equal(of_kind(by_two[0], "few"), as_arrays(gathered(tmp_path, count=FEW)[0]))


@pytest.mark.long
def test_sums_of_float64_are_exact_to_2_to_the_minus_45_of_the_largest(by_two):
    with np.load(by_two[2] / "sums.npz") as file:
        first, second = file["parts"].view(np.float64)
        bound = np.abs(first).max() + np.abs(second).max()
        np.testing.assert_allclose(file["sum"], first + second, rtol=0, atol=bound * 2.0**-45)


@pytest.mark.long
def test_processes_resume_what_others_have_gathered(by_two, tmp_path):
    """Two are stopped: two read the rest, or one that adds up what the two have saved."""
    _, read, folder = by_two
    # The signal comes with image 30, which the second process reads in its second turn.
    rest = list(range(32, COUNT))
    assert sorted(read[0][1] + read[1][1]) == rest
    accumulator, more = gathered(folder / "left")
    assert more == rest
    check_equal(as_arrays(accumulator), as_arrays(gathered(tmp_path)[0]))
    Gatherer(space(), 20, StopOnSignal()).remove_saved(
        RandomStream(StopOnSignal()), folder / "left"
    )
    assert not list((folder / "left").iterdir())
