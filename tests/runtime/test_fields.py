"""Bounds of fields: what they allow, in words and in values."""

import dataclasses
import math

import pytest

from rdm_jax.runtime import fields
from rdm_jax.runtime.errors import InputError


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: float = fields.below(1, default=0.5)


@dataclasses.dataclass(frozen=True)
class Outer:
    size: int = fields.at_least(1, default=2)
    scale: float = fields.positive(default=1.0)
    share: float = fields.between(0, 1, default=0.5)
    length: float = fields.inside(0, 1, default=0.5)
    kind: str = fields.one_of("png", "jpeg", default="png")
    widths: tuple[int, ...] = fields.all_positive(default=(1, 2))
    free: int = -7
    inner: Inner = Inner()


def test_check_bounds_accepts_defaults_and_ends():
    fields.check_bounds(Outer(), "config")
    fields.check_bounds(Outer(1, 1e-30, 0.0, 1e-30, "jpeg", (1,), 0, Inner(0.0)), "config")
    fields.check_bounds(Outer(share=1.0), "config")


@pytest.mark.parametrize(
    ("changes", "field", "bounds"),
    [
        ({"size": 0}, "size=0", "1 or more"),
        ({"scale": 0.0}, "scale=0.0", "a positive number"),
        ({"scale": math.inf}, "scale=inf", "a positive number"),
        ({"scale": math.nan}, "scale=nan", "a positive number"),
        ({"share": 1.5}, "share=1.5", "a number from 0 to 1"),
        ({"length": 1.0}, "length=1.0", "a number above 0 and below 1"),
        ({"kind": "gif"}, "kind='gif'", "'png' or 'jpeg'"),
        ({"widths": ()}, "widths=()", "one or more positive numbers"),
        ({"widths": (1, 0)}, "widths=(1, 0)", "one or more positive numbers"),
        ({"inner": Inner(1.0)}, "inner.rate=1.0", "a number from 0 to below 1"),
    ],
)
def test_check_bounds_names_field_value_and_remedy(changes, field, bounds):
    with pytest.raises(InputError) as refusal:
        fields.check_bounds(Outer(**changes), "config.part")
    assert refusal.value.problem == f"config.part.{field} cannot be used"
    assert refusal.value.fix == f"Use {bounds}."
    name = next(iter(changes))
    fields.check_bounds(Outer(**changes), "config.part", skip=(name,))


def test_bounds_of_documents_bounded_fields():
    texts = {name: str(bounds) for name, bounds in fields.bounds_of(Outer).items()}
    assert texts["size"] == "1 or more" and texts["kind"] == "'png' or 'jpeg'"
    assert set(texts) == {"size", "scale", "share", "length", "kind", "widths"}
    assert dataclasses.replace(Outer(), size=3).size == 3 and Outer(5).size == 5
