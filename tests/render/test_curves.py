"""Curves over training."""

import sys

import pytest

from rdm_jax.render import curves
from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.files import is_whole_png

POINTS = {"stage1": {8: {"fid": 3.0, "kid": 0.1}, 16: {"fid": 2.0}}}


def test_curves_have_a_panel_per_metric(tmp_path):
    curves.draw_metrics(POINTS, tmp_path / "curves.png")
    assert is_whole_png(tmp_path / "curves.png")


def test_curves_name_the_extra_that_draws_them(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for draw, data in ((curves.draw_losses, []), (curves.draw_metrics, POINTS)):
        with pytest.raises(InputError, match="matplotlib is not installed") as refusal:
            draw(data, tmp_path / "curves.png")
        assert refusal.value.fix == "Run pip install 'rdm_jax[plots]'."
    assert not list(tmp_path.iterdir())
