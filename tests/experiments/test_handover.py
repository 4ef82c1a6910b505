"""The comparison of hand-overs: its configs, and its tables."""

from pathlib import Path

import pytest

from experiments.handover.variants import variants as handovers
from experiments.methods import ORDERS, Method, check
from tests.support.experiments import config_of, run, smallest, tables


@pytest.mark.parametrize("config", ["digits", "imagenet"])
def test_handovers_compare_methods_on_equal_terms(config):
    """Of the same networks, images and first stage; `check` holds that each of them can work."""
    found = handovers(config_of(f"configs/{config}.py"))
    check(found, (5, 19))
    relay = found["relay"].config
    for name in ("jump", "coupling", "cascade"):
        first, second = found[name].config.stages
        assert second.network == relay.stages[1].network
        assert second.training == relay.stages[1].training
        for field in ("network", "process", "training", "guidance"):
            assert getattr(first, field) == getattr(relay.stages[0], field)
        assert first.nfe == relay.stages[0].nfe
    jump, patch = found["jump"], relay.stages[1].process.patch
    for begin in jump.begins:
        method = Method("jump", jump, jump.config, Path()).with_sampler(**begin)
        stop = method.config.stages[0].sampler.stop
        assert stop * patch == pytest.approx(begin["sigma_max"])
        assert method.with_nfe(9).config.stages[-1].nfe == 9


@pytest.mark.long
def test_handover(tmp_path):
    printed = run(
        "-m", "experiments.handover.compare", *smallest(tmp_path), "--nfe=3,5", "--usual=3"
    )
    found = {title.partition(",")[0]: rows[2:] for title, rows in tables(printed).items()}
    names = ["block noise", "exact jump", "coupling", "classic cascade", "one stage"]
    evaluated = found["By NFE of the last network"]
    assert [row[:2] for row in evaluated] == [
        [name, count] for name in names for count in ("3", "5")
    ]
    assert {row[0] for row in found["By training images"]} == set(names)
    assert all(float(row[5]) > 0 and row[4] in ORDERS.values() for row in evaluated)
    for picture in ("curves.png", "images.png"):
        assert (tmp_path / "runs" / picture).stat().st_size > 1000
