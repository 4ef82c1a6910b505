"""Which kinds of a fault are tested in which tier."""

from collections.abc import Iterable

import pytest


def one_of_many(kinds: Iterable[str], chosen: str, *marks: pytest.MarkDecorator) -> list:
    """A test's parameters: one with these marks, the others for the campaign."""
    others = [pytest.param(kind, marks=pytest.mark.long) for kind in kinds if kind != chosen]
    return [pytest.param(chosen, marks=marks), *others]
