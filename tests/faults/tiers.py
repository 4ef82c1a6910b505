"""Which kinds of a fault belong to which tier."""

from collections.abc import Iterable

import pytest


def one_of_many(kinds: Iterable[str], chosen: str, *marks: pytest.MarkDecorator) -> list:
    """Parameters of a test: the chosen kind gets these marks, all others are `long`."""
    others = [pytest.param(kind, marks=pytest.mark.long) for kind in kinds if kind != chosen]
    return [pytest.param(chosen, marks=marks), *others]
