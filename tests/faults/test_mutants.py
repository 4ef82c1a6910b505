"""Each mutant fits the code: the text that it replaces occurs exactly once."""

import pytest

from tests.faults.mutants import MUTANTS
from tests.support.paths import ROOT


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant[1])
def test_mutant_replaces_one_place(mutant):
    _, _, file, old, new, _ = mutant
    assert (ROOT / "rdm_jax" / file).read_text().count(old) == 1 and new != old
