"""Which kinds of a fault are tested in which tier."""

from collections.abc import Iterable

import pytest


def one_of_many(kinds: Iterable[str], everyday: str) -> list:
    """A test's parameters: one for the first tier, the others for the campaign."""
    others = [pytest.param(kind, marks=pytest.mark.long) for kind in kinds if kind != everyday]
    return [everyday, *others]
